#include "core/file_view.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>

#include "core/error.h"
#include "core/host_limits.h"
#include "core/host_mapping.h"

namespace torch_offload {

namespace {

std::size_t round_down(std::size_t bytes, std::size_t page) { return bytes / page * page; }
std::size_t round_up(std::size_t bytes, std::size_t page) {
  return (bytes + page - 1) / page * page;
}

// PAGEMAP_SCAN of Linux 6.7; C libraries and older kernel headers do not know it.
struct ScanArguments {
  std::uint64_t size, flags, start, end, walk_end, regions, max_regions, max_pages;
  std::uint64_t inverted, all_of, any_of, returned;
};
struct ScannedRegion {
  std::uint64_t begin, end, categories;
};
constexpr std::uint64_t kIsOfFile = 1U << 2, kIsInMemory = 1U << 3, kIsSwapped = 1U << 4;

/// The next anonymous pages in [begin, end), and where the search goes on; false if this system
/// cannot search. Addresses that nobody has touched cost nothing.
bool scan_anonymous(int pagemap, std::uintptr_t& begin, std::uintptr_t end,
                    std::vector<ScannedRegion>& regions) {
  regions.resize(256);
  ScanArguments scan{};
  scan.size = sizeof(scan);
  scan.start = begin;
  scan.end = end;
  scan.regions = reinterpret_cast<std::uintptr_t>(regions.data());
  scan.max_regions = regions.size();
  scan.inverted = scan.all_of = kIsOfFile;
  scan.any_of = kIsInMemory | kIsSwapped;
  scan.returned = kIsInMemory;
  const int found = ioctl(pagemap, _IOWR('f', 16, ScanArguments), &scan);
  if (found < 0 || scan.walk_end <= begin) {
    return false;
  }
  regions.resize(static_cast<std::size_t>(found));
  begin = scan.walk_end;
  return true;
}

[[noreturn]] void throw_unmapped(const FileBlock& block, const char* call) {
  throw MemoryError("expected to map " + format_bytes(block.size_bytes) + " of " +
                    block.file->path() + ", got " + call + ": " + std::strerror(errno) +
                    "; raise the limit on mappings (sysctl vm.max_map_count), or load with "
                    "masters='arena'");
}

}  // namespace

FileView::FileView(std::vector<FileBlock> blocks) : blocks_(std::move(blocks)) {
  for (const FileBlock& block : blocks_) {
    if (block.size_bytes > block.file->size_bytes() ||
        block.offset > block.file->size_bytes() - block.size_bytes) {
      throw ValueError("expected bytes within the " + std::to_string(block.file->size_bytes()) +
                       " of " + block.file->path() + ", got " + std::to_string(block.size_bytes) +
                       " from " + std::to_string(block.offset) + " on");
    }
    begins_.push_back(size_bytes_);
    size_bytes_ += block.size_bytes;
  }
  if (size_bytes_ == 0) {
    throw ValueError("expected a view of some bytes of a file, got none");
  }
  const std::size_t page = HostMapping::page_bytes();
  const std::size_t lead = blocks_.front().offset % page;
  pages_bytes_ = round_up(lead + size_bytes_, page);
  // Not accounted for: only pages that somebody edits will take memory.
  void* const reserved = mmap(nullptr, pages_bytes_, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) {
    throw_unmapped(blocks_.front(), "mmap");
  }
  pages_ = static_cast<std::byte*>(reserved);
  data_ = pages_ + lead;
  try {
    map_blocks();
  } catch (...) {
    munmap(pages_, pages_bytes_);
    throw;
  }
}

FileView::~FileView() {
  if (!leaked_ && munmap(pages_, pages_bytes_) != 0) {
    std::fprintf(stderr, "torch_offload: warning: could not unmap %zu bytes of a checkpoint: %s\n",
                 pages_bytes_, std::strerror(errno));
  }
}

void FileView::map_blocks() {
  const std::size_t page = HostMapping::page_bytes();
  const auto lead = static_cast<std::size_t>(data_ - pages_);
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    const FileBlock& block = blocks_[i];
    const std::size_t begin = lead + begins_[i];  // from pages_ on
    const std::size_t end = begin + block.size_bytes;
    // The page in which it meets the block before belongs to that one.
    const std::size_t first = i == 0 ? round_down(begin, page) : round_up(begin, page);
    const std::size_t last = round_up(end, page);
    std::size_t mapped_from = end;
    if (begin % page == block.offset % page && first < last && block.size_bytes > 0) {
      const auto file_offset = static_cast<off_t>(block.offset + first - begin);
      if (mmap(pages_ + first, last - first, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, block.file->descriptor(),
               file_offset) == MAP_FAILED) {
        throw_unmapped(block, "mmap");
      }
      mapped_from = std::max(first, begin);
    }
    const std::size_t copied = std::min(mapped_from, end) - begin;
    if (copied > 0) {
      const std::size_t lead_in_file = block.offset % page;
      block.file->read_pages(block.data() - lead_in_file, round_up(lead_in_file + copied, page));
      std::memcpy(pages_ + begin, block.data(), copied);
      copied_bytes_ += copied;
    }
  }
}

void FileView::check_unchanged() const {
  const FileMapping* last = nullptr;
  for (const FileBlock& block : blocks_) {
    if (block.file.get() != std::exchange(last, block.file.get())) {
      block.file->check_unchanged();
    }
  }
}

/// Whether bytes [begin, end) of the view differ from the files'.
bool FileView::differs(std::size_t begin, std::size_t end) const {
  auto next = std::upper_bound(begins_.begin(), begins_.end(), begin);
  for (auto i = static_cast<std::size_t>(next - begins_.begin()) - 1;
       i < blocks_.size() && begins_[i] < end; ++i) {
    const std::size_t from = std::max(begin, begins_[i]);
    const std::size_t to = std::min(end, begins_[i] + blocks_[i].size_bytes);
    if (from < to &&
        std::memcmp(data_ + from, blocks_[i].data() + (from - begins_[i]), to - from) != 0) {
      return true;
    }
  }
  return false;
}

/// Whether `visit` says yes to one of the runs of anonymous pages, as ranges of the view.
bool FileView::any_anonymous_run(const VisitRun& visit) const {
  constexpr std::uint64_t kInMemory = std::uint64_t{1} << 63;
  constexpr std::uint64_t kSwapped = std::uint64_t{1} << 62;
  constexpr std::uint64_t kOfFile = std::uint64_t{1} << 61;
  const std::size_t page = HostMapping::page_bytes();
  const auto lead = static_cast<std::size_t>(data_ - pages_);
  const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pagemap < 0) {
    return visit(0, size_bytes_);  // slower, and as exact
  }
  const auto visit_pages = [&](std::size_t first, std::size_t last) {
    const std::size_t begin = std::max(first * page, lead) - lead;
    const std::size_t end = std::min(last * page, lead + size_bytes_) - lead;
    return begin < end && visit(begin, end);
  };
  auto next = reinterpret_cast<std::uintptr_t>(pages_);
  const std::uintptr_t pages_begin = next;
  const std::uintptr_t pages_end = next + pages_bytes_;
  std::vector<ScannedRegion> regions;
  while (next < pages_end && scan_anonymous(pagemap, next, pages_end, regions)) {
    for (const ScannedRegion& region : regions) {
      if (visit_pages((region.begin - pages_begin) / page, (region.end - pages_begin) / page)) {
        close(pagemap);
        return true;
      }
    }
  }
  if (next >= pages_end) {
    close(pagemap);
    return false;
  }
  const std::size_t num_pages = pages_bytes_ / page;
  const std::size_t first_page = reinterpret_cast<std::uintptr_t>(pages_) / page;
  std::array<std::uint64_t, 4096> entries{};
  bool found = false;
  for (std::size_t at = 0; at < num_pages && !found;) {
    const std::size_t wanted = std::min(entries.size(), num_pages - at) * sizeof(std::uint64_t);
    const ssize_t got = pread(pagemap, entries.data(), wanted,
                              static_cast<off_t>((first_page + at) * sizeof(std::uint64_t)));
    if (got <= 0) {
      found = visit_pages(at, num_pages);
      break;
    }
    const std::size_t count = static_cast<std::size_t>(got) / sizeof(std::uint64_t);
    for (std::size_t i = 0; i < count && !found; ++i) {
      const bool is_anonymous =
          (entries[i] & (kInMemory | kSwapped)) != 0 && (entries[i] & kOfFile) == 0;
      found = is_anonymous && visit_pages(at + i, at + i + 1);
    }
    at += count;
  }
  close(pagemap);
  return found;
}

bool FileView::is_edited() const {
  return any_anonymous_run(
      [this](std::size_t begin, std::size_t end) { return differs(begin, end); });
}

bool FileView::looks_edited() const {
  constexpr std::size_t kWords = 64;
  const std::size_t word_bytes = std::min(size_bytes_, sizeof(std::uint64_t));
  for (std::size_t i = 0; i < kWords; ++i) {
    const std::size_t begin = (size_bytes_ - word_bytes) * i / (kWords - 1);
    if (differs(begin, begin + word_bytes)) {
      return true;
    }
  }
  return false;
}

void FileView::take_all_pages() { HostMapping::own_pages(pages_, pages_bytes_); }

}  // namespace torch_offload
