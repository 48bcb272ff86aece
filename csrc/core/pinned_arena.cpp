#include "core/pinned_arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "core/error.h"
#include "core/host_limits.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; C libraries learned the name later
#endif

namespace torch_offload {

namespace {

/// What one thread copies at a time: a huge page, and small enough for its cache.
constexpr std::size_t kBlockBytes = std::size_t{2} << 20;
/// Starting a thread costs about as much as copying 1 MiB; each gets several times that.
constexpr std::size_t kLeastBytesPerThread = std::size_t{8} << 20;
/// More threads than this only wait for memory.
constexpr std::size_t kMaxThreads = 16;

/// Takes the pages behind [begin, begin + size_bytes) before they are written, so that a system
/// without memory answers with an error and not with SIGBUS. Returns an errno, or zero.
int take_pages(std::byte* begin, std::size_t size_bytes) {
  const std::size_t lead = reinterpret_cast<std::uintptr_t>(begin) % HostMapping::page_bytes();
  const std::size_t length = HostMapping::whole_pages(lead + size_bytes);
  if (madvise(begin - lead, length, MADV_POPULATE_WRITE) == 0) {
    return 0;
  }
  return errno == EINVAL ? 0 : errno;  // EINVAL: a kernel that does not know it; go on without
}

/// Copies with as many threads as pay off. Returns an errno, or zero.
int copy_in_parallel(std::byte* destination, const std::byte* source, std::size_t size_bytes) {
  std::atomic<std::size_t> next{0};
  std::atomic<int> error{0};
  const auto work = [&] {
    while (error.load(std::memory_order_relaxed) == 0) {
      const std::size_t begin = next.fetch_add(kBlockBytes, std::memory_order_relaxed);
      if (begin >= size_bytes) {
        return;
      }
      const std::size_t length = std::min(kBlockBytes, size_bytes - begin);
      if (const int failure = take_pages(destination + begin, length)) {
        error.store(failure, std::memory_order_relaxed);
        return;
      }
      std::memcpy(destination + begin, source + begin, length);
    }
  };
  const std::size_t num_threads =
      std::min({size_bytes / kLeastBytesPerThread, kMaxThreads,
                static_cast<std::size_t>(std::thread::hardware_concurrency())});
  std::vector<std::thread> helpers;
  helpers.reserve(num_threads);
  try {
    while (helpers.size() + 1 < num_threads) {
      helpers.emplace_back(work);
    }
  } catch (const std::system_error&) {
    // A process that may not start threads is slower, not broken: those there are do it all.
  }
  work();
  for (std::thread& helper : helpers) {
    helper.join();
  }
  return error.load();
}

}  // namespace

PinnedArena::Layout PinnedArena::lay_out(const std::vector<std::size_t>& unit_sizes,
                                         std::size_t max_chunk_bytes) {
  const std::size_t page = HostMapping::page_bytes();
  if (max_chunk_bytes == 0 || max_chunk_bytes % page != 0) {
    throw ValueError("expected chunks of a multiple of the page size, " + std::to_string(page) +
                     " bytes, got " + std::to_string(max_chunk_bytes));
  }
  Layout layout;
  layout.units.reserve(unit_sizes.size());
  std::size_t end = 0;         // of the units so far
  bool chunk_is_open = false;  // whether the last chunk may take another unit
  const auto close_chunk = [&] {
    if (chunk_is_open) {
      end = HostMapping::whole_pages(end);
      layout.chunks.back().size_bytes = end - layout.chunks.back().begin;
      chunk_is_open = false;
    }
  };
  for (std::size_t index = 0; index < unit_sizes.size(); ++index) {
    const auto unit = static_cast<UnitIndex>(index);
    const std::size_t size = unit_sizes[index];
    if (size % kAlignmentBytes != 0) {
      throw ValueError("expected unit " + std::to_string(index) + " to take a multiple of " +
                       std::to_string(kAlignmentBytes) + " bytes, got " + std::to_string(size));
    }
    if (chunk_is_open && end - layout.chunks.back().begin + size > max_chunk_bytes) {
      close_chunk();
    }
    if (!chunk_is_open && size > 0) {
      layout.chunks.push_back({end, 0, unit});
      chunk_is_open = true;
    }
    UnitRecord record;
    record.begin = end;
    record.size_bytes = size;
    record.first_chunk = size > 0 ? layout.chunks.size() - 1 : layout.chunks.size();
    // Only a unit that is alone in its chunk can be larger than one: then it gets more of them.
    std::size_t rest = size;
    for (; rest > max_chunk_bytes; rest -= max_chunk_bytes) {
      end += max_chunk_bytes;
      layout.chunks.back().size_bytes = max_chunk_bytes;
      layout.chunks.push_back({end, 0, unit});
    }
    end += rest;
    if (size > 0) {
      layout.chunks.back().last_unit = unit;
    }
    record.end_chunk = layout.chunks.size();
    if (size > max_chunk_bytes) {
      close_chunk();
    }
    layout.units.push_back(std::move(record));
  }
  close_chunk();
  layout.size_bytes = end;
  return layout;
}

PinnedArena::PinnedArena(std::shared_ptr<Device> device, const std::vector<std::size_t>& unit_sizes,
                         std::size_t max_chunk_bytes)
    : PinnedArena(lay_out(unit_sizes, max_chunk_bytes), std::move(device)) {}

PinnedArena::PinnedArena(Layout layout, std::shared_ptr<Device> device)
    : device_(std::move(device)),
      units_(std::move(layout.units)),
      chunks_(std::move(layout.chunks)),
      memory_(layout.size_bytes) {
  check_internal(device_ != nullptr, "an arena needs a device");
  for (UnitRecord& unit : units_) {
    for (std::size_t index = unit.first_chunk; index < unit.end_chunk; ++index) {
      const Chunk& chunk = chunks_[index];
      const std::size_t begin = std::max(chunk.begin, unit.begin);
      const std::size_t end =
          std::min(chunk.begin + chunk.size_bytes, unit.begin + unit.size_bytes);
      unit.segments.push_back({memory_.data() + begin, begin - unit.begin, end - begin});
    }
  }
}

PinnedArena::~PinnedArena() {
  if (device_->in_forked_child()) {
    return;  // The registrations are the parent's, and its device must not be touched here.
  }
  while (num_sealed_ > 0) {
    --num_sealed_;
    const Chunk& chunk = chunks_[num_sealed_];
    try {
      device_->unregister_host(memory_.data() + chunk.begin);
    } catch (const std::exception& error) {
      memory_.leak();
      std::fprintf(stderr,
                   "torch_offload: warning: could not unlock %zu bytes of host memory, so %zu "
                   "bytes stay in use: %s\n",
                   chunk.size_bytes, memory_.size_bytes(), error.what());
    }
  }
}

const PinnedArena::UnitRecord& PinnedArena::at(UnitIndex unit) const {
  if (unit >= units_.size()) {
    throw IndexError("expected a unit below " + std::to_string(units_.size()) + ", got " +
                     std::to_string(unit));
  }
  return units_[unit];
}

std::byte* PinnedArena::unit_memory(UnitIndex unit) const {
  return memory_.data() + at(unit).begin;
}

std::size_t PinnedArena::unit_bytes(UnitIndex unit) const { return at(unit).size_bytes; }

const std::vector<CopySegment>& PinnedArena::segments(UnitIndex unit) const {
  return at(unit).segments;
}

void PinnedArena::fill(UnitIndex unit, std::size_t offset, const void* source,
                       std::size_t size_bytes) {
  const UnitRecord& record = at(unit);
  check_internal(offset <= record.size_bytes && size_bytes <= record.size_bytes - offset,
                 "a unit filled beyond its end");
  if (size_bytes == 0) {
    return;
  }
  std::byte* const destination = memory_.data() + record.begin + offset;
  const int error =
      copy_in_parallel(destination, static_cast<const std::byte*>(source), size_bytes);
  if (error != 0) {
    throw MemoryError("expected " + format_bytes(size_bytes) + " of host memory for unit " +
                      std::to_string(unit) + ", got: " + std::strerror(error) + " (" +
                      describe(read_host_limits()) + ")");
  }
  if (!device_->in_forked_child()) {
    device_->host_write(destination, size_bytes, unit);
  }
}

void PinnedArena::seal_up_to(UnitIndex unit) {
  at(unit);
  if (device_->in_forked_child()) {
    throw StateError(
        "expected to page-lock memory in the process that made it, got a forked child; offload "
        "the model anew there, or start the child by spawn");
  }
  while (num_sealed_ < chunks_.size() && chunks_[num_sealed_].last_unit <= unit) {
    const Chunk& chunk = chunks_[num_sealed_];
    try {
      device_->register_host(memory_.data() + chunk.begin, chunk.size_bytes);
    } catch (const MemoryError& error) {
      throw MemoryError(std::string(error.what()) + "; of " + format_bytes(size_bytes()) +
                        " to be page-locked, " + format_bytes(registered_bytes()) + " are (" +
                        describe(read_host_limits()) +
                        "); offload fewer weights, or raise the limit that was met");
    }
    ++num_sealed_;
  }
}

bool PinnedArena::is_sealed(UnitIndex unit) const { return at(unit).end_chunk <= num_sealed_; }

std::size_t PinnedArena::registered_bytes() const {
  std::size_t bytes = 0;
  for (std::size_t index = 0; index < num_sealed_; ++index) {
    bytes += chunks_[index].size_bytes;
  }
  return bytes;
}

}  // namespace torch_offload
