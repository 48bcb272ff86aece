#pragma once

#include <cstddef>

namespace torch_offload {

/// Anonymous host memory that may be page-locked, and that a forked child may read.
///
/// Note [Page-locked memory and fork]
/// Private anonymous memory is wrong for what a device copies from. After a fork its pages are
/// copied on write: with a driver that takes plain references, the parent's next edit of a weight
/// moves to a new page while the device goes on reading the old one, silently; with one that marks
/// pages as pinned, fork copies all of them at once, so that each worker of a DataLoader costs
/// another model and the host runs out of memory. MADV_DONTFORK avoids both, but then a child that
/// reads a master dies of SIGSEGV. So the memory is a shared mapping of an unnamed memory file,
/// which fork leaves where it is and does not copy, and every child maps the same file privately
/// over the same addresses before fork returns: it reads the bytes that are there, what it writes
/// is its own, and nothing is copied before that. (Until the child writes to a page, it sees what
/// the parent writes there.) These pages count as RssShmem, not as RssAnon, and towards the
/// control group's limit like any other; the size of /dev/shm does not bound them.
///
/// Lifetime:  pages are taken as they are touched, and given back by the destructor.
/// Threads:   may be made and destroyed by any thread, also while another one forks.
class HostMapping {
 public:
  /// Reserves whole pages for `size_bytes`, which may be zero; they read as zero.
  /// Throws: MemoryError with the system's own words.
  explicit HostMapping(std::size_t size_bytes);
  HostMapping(const HostMapping&) = delete;
  HostMapping& operator=(const HostMapping&) = delete;
  ~HostMapping();

  /// Page-aligned; nullptr if the size is zero.
  std::byte* data() const { return data_; }
  /// A multiple of page_bytes().
  std::size_t size_bytes() const { return size_bytes_; }

  /// Keeps the memory mapped for good, since something may still refer to it.
  void leak() { leaked_ = true; }

  static std::size_t page_bytes();
  /// The least multiple of page_bytes() that holds `size_bytes`.
  static std::size_t whole_pages(std::size_t size_bytes);

 private:
  friend struct ForkHandlers;
  void make_private() const;

  int file_ = -1;
  std::byte* data_ = nullptr;
  std::size_t size_bytes_ = 0;
  bool leaked_ = false;
};

}  // namespace torch_offload
