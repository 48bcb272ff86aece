#include "core/host_mapping.h"

#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"
#include "core/host_limits.h"
#include "core/threads.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; C libraries learned the name later
#endif

namespace torch_offload {

/// The half of Note [Page-locked memory and fork] that runs at a fork: all mappings of this
/// process, and what is done to them in a child.
struct ForkHandlers {
  std::mutex mutex;  // guards `live`; held across fork, so that a child finds it whole
  std::vector<HostMapping*> live;
  const int error = pthread_atfork([] { instance().mutex.lock(); },
                                   [] { instance().mutex.unlock(); }, &ForkHandlers::in_child);

  /// Never destroyed, on purpose: a fork may come after static destructors have begun.
  static ForkHandlers& instance() {
    static auto* const handlers = new ForkHandlers;
    return *handlers;
  }

  /// Throws: MemoryError if forks could not be prepared for.
  void check() const {
    if (error != 0) {
      throw MemoryError(std::string("expected to prepare host memory for forks, got: ") +
                        std::strerror(error));
    }
  }

  static void in_child() {
    for (HostMapping* mapping : instance().live) {
      mapping->forbid_in_child();
    }
    // From here on they are ordinary mappings, which the child's own children inherit.
    instance().live.clear();
    instance().mutex.unlock();
  }

  void add(HostMapping* mapping) {
    const std::lock_guard<std::mutex> lock(mutex);
    live.push_back(mapping);
  }
  void remove(HostMapping* mapping) {
    const std::lock_guard<std::mutex> lock(mutex);
    live.erase(std::remove(live.begin(), live.end(), mapping), live.end());
  }
};

namespace {

/// Made as the library is loaded: were it made by the first mapping, a fork at that very moment
/// would leave the child with a static that is for ever being made.
const ForkHandlers* make_at_load() noexcept { return &ForkHandlers::instance(); }
[[maybe_unused]] const ForkHandlers* const kMadeAtLoad = make_at_load();

/// The huge page of x86-64, and what one thread fills at a time: small enough for its cache.
constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;
/// Starting a thread costs about as much as copying 1 MiB; each gets several times that.
constexpr std::size_t kLeastBytesPerThread = std::size_t{8} << 20;
/// More threads than this only wait for memory.
constexpr std::size_t kMaxThreads = 16;

[[noreturn]] void throw_system_error(int error, std::size_t size_bytes, const char* call) {
  throw MemoryError("expected " + format_bytes(size_bytes) + " of host memory, got " + call + ": " +
                    std::strerror(error) + " (" + describe(read_host_limits()) +
                    "); free host memory, raise the limit that was met, or offload fewer weights");
}

std::size_t address_of(const std::byte* memory) { return reinterpret_cast<std::uintptr_t>(memory); }

/// Takes pages before they are written, so that a system without memory answers with an error
/// where it can, and not with a signal. Returns an errno, or zero.
int take_block(std::byte* begin, std::size_t size_bytes) {
  const std::size_t page = HostMapping::page_bytes();
  const std::size_t lead = address_of(begin) % page;
  if (madvise(begin - lead, HostMapping::whole_pages(lead + size_bytes), MADV_POPULATE_WRITE) ==
      0) {
    return 0;
  }
  if (errno != EINVAL) {
    return errno;
  }
  for (std::size_t offset = 0; offset < lead + size_bytes; offset += page) {  // an older kernel
    volatile std::byte* const touched = begin - lead + offset;
    *touched = *touched;
  }
  return 0;
}

/// Calls `work(block_begin, block_size_bytes)`, which returns an errno or zero, for the parts of a
/// range, with as many threads as pay off. No two parts share a huge page: two threads that fault
/// in the same one would both clear it. Returns the first error.
template <typename Work>
int in_parallel(std::byte* begin, std::size_t size_bytes, const Work& work) {
  const std::size_t lead = address_of(begin) % kHugePageBytes;  // of the first huge page, not ours
  std::atomic<std::size_t> next{0};
  std::atomic<int> error{0};
  const auto run = [&] {
    while (error.load(std::memory_order_relaxed) == 0) {
      const std::size_t block = next.fetch_add(kHugePageBytes, std::memory_order_relaxed);
      if (block >= lead + size_bytes) {
        return;
      }
      const std::size_t from = std::max(block, lead);
      const std::size_t to = std::min(block + kHugePageBytes, lead + size_bytes);
      if (const int failure = work(begin + (from - lead), to - from)) {
        error.store(failure, std::memory_order_relaxed);
      }
    }
  };
  const std::size_t num_threads =
      std::min({size_bytes / kLeastBytesPerThread, kMaxThreads,
                static_cast<std::size_t>(std::thread::hardware_concurrency())});
  run_by_threads(num_threads, run);
  return error.load();
}

/// Asks for pages of one node's memory. A wish: where that node is full, or where the system knows
/// no nodes, pages come from elsewhere and copies are slower, not wrong.
void prefer_node(std::byte* begin, std::size_t size_bytes, int node) {
  constexpr int kPreferred = 1;  // MPOL_PREFERRED; its header belongs to a library of its own
  constexpr std::size_t kWordBits = 8 * sizeof(unsigned long);
  std::array<unsigned long, 16> mask{};
  const auto bit = static_cast<std::size_t>(node);
  if (node < 0 || bit >= mask.size() * kWordBits) {
    return;
  }
  mask[bit / kWordBits] |= 1UL << (bit % kWordBits);
  static_cast<void>(
      syscall(SYS_mbind, begin, size_bytes, kPreferred, mask.data(), mask.size() * kWordBits, 0U));
}

/// Maps whole pages of zeros on a huge page's boundary. Returns nullptr and sets errno if it
/// cannot.
std::byte* map_aligned(std::size_t size_bytes) {
  const std::size_t slack = kHugePageBytes - HostMapping::page_bytes();
  if (size_bytes > SIZE_MAX - slack) {
    errno = ENOMEM;
    return nullptr;
  }
  // Not accounted for here, since check_host_memory asked before, and can be told not to.
  void* const reserved = mmap(nullptr, size_bytes + slack, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) {
    return nullptr;
  }
  auto* const begin = static_cast<std::byte*>(reserved);
  const std::size_t head = (kHugePageBytes - address_of(begin) % kHugePageBytes) % kHugePageBytes;
  if (head > 0) {
    munmap(begin, head);
  }
  if (head < slack) {
    munmap(begin + head + size_bytes, slack - head);
  }
  return begin + head;
}

}  // namespace

std::size_t HostMapping::page_bytes() {
  static const auto bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

std::size_t HostMapping::whole_pages(std::size_t size_bytes) {
  return (size_bytes + page_bytes() - 1) / page_bytes() * page_bytes();
}

HostMapping::HostMapping(std::size_t size_bytes, std::optional<int> node)
    : size_bytes_(whole_pages(size_bytes)) {
  if (size_bytes_ == 0) {
    return;
  }
  ForkHandlers& handlers = ForkHandlers::instance();
  handlers.check();
  data_ = map_aligned(size_bytes_);
  if (data_ == nullptr) {
    throw_system_error(errno, size_bytes_, "mmap");
  }
  // Only what huge pages fill: the last one would take more memory than was asked for. A wish, so
  // the answer does not matter.
  if (const std::size_t huge = size_bytes_ / kHugePageBytes * kHugePageBytes) {
    static_cast<void>(madvise(data_, huge, MADV_HUGEPAGE));
  }
  if (node) {
    prefer_node(data_, size_bytes_, *node);
  }
  if (madvise(data_, size_bytes_, MADV_DONTFORK) != 0) {
    const int error = errno;
    munmap(data_, size_bytes_);
    throw_system_error(error, size_bytes_, "madvise(MADV_DONTFORK)");
  }
  try {
    handlers.add(this);
  } catch (...) {
    munmap(data_, size_bytes_);
    throw;
  }
}

HostMapping::~HostMapping() {
  if (data_ == nullptr) {
    return;
  }
  ForkHandlers::instance().remove(this);
  if (!leaked_ && munmap(data_, size_bytes_) != 0) {
    std::fprintf(stderr, "torch_offload: warning: could not unmap %zu bytes of host memory: %s\n",
                 size_bytes_, std::strerror(errno));
  }
}

void HostMapping::take_pages(std::byte* begin, std::size_t size_bytes) {
  own_pages(begin, size_bytes);
}

void HostMapping::own_pages(std::byte* begin, std::size_t size_bytes) {
  if (const int error = in_parallel(begin, size_bytes, take_block)) {
    throw_system_error(error, size_bytes, "madvise(MADV_POPULATE_WRITE)");
  }
}

void HostMapping::fill(std::byte* destination, const void* source, std::size_t size_bytes) {
  const auto copy_block = [destination, source](std::byte* begin, std::size_t length) {
    const int error = take_block(begin, length);
    if (error == 0) {
      std::memcpy(begin, static_cast<const std::byte*>(source) + (begin - destination), length);
    }
    return error;
  };
  if (const int error = in_parallel(destination, size_bytes, copy_block)) {
    throw_system_error(error, size_bytes, "madvise(MADV_POPULATE_WRITE)");
  }
}

/// Runs in a child, between fork and its return: system calls only, no allocation, no throw.
void HostMapping::forbid_in_child() {
  void* const taken =
      mmap(data_, size_bytes_, PROT_NONE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
  if (taken == data_) {
    return;
  }
  // Something else lies there already, such as what an earlier fork handler has mapped: it is not
  // ours to unmap.
  leaked_ = true;
  if (taken != MAP_FAILED) {
    munmap(taken, size_bytes_);  // a kernel that takes the address for a hint
  }
  constexpr char kWarning[] =
      "torch_offload: warning: offloaded weights must not be read in this forked process, where "
      "other memory has taken their addresses\n";
  static_cast<void>(!write(STDERR_FILENO, kWarning, sizeof(kWarning) - 1));
}

}  // namespace torch_offload
