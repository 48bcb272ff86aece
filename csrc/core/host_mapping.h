#pragma once

#include <cstddef>
#include <optional>

namespace torch_offload {

/// Anonymous host memory for page-locking, quick to fill, absent from forked children.
///
/// Note [Page-locked memory and fork]
/// The memory is private, in huge pages, and not inherited (MADV_DONTFORK): with a driver that pins
/// pages, fork would copy all of them at once, so that each worker of a DataLoader costs another
/// model (4.3 s for 8 GiB, and the host's memory). In a child the addresses are taken by an
/// inaccessible mapping before fork returns: a child that reads a weight at rest dies of SIGSEGV,
/// and never reads what happens to be mapped there next.
///
/// A shared mapping of an unnamed memory file (memfd) would let children read the weights, and fork
/// in 6 ms. But most systems give it no huge pages (shmem_enabled), and filling and registering it
/// ran at 4.1 GB/s where this runs at 17.8 GB/s (fill 5.0 against 27, register 25 against 51; one
/// H200 machine, 16 threads, 8 GiB). Every user waits for that; children that compute with the
/// parent's weights are refused anyway, as CUDA does not survive a fork.
///
/// Lifetime:  pages are taken as they are touched, and given back by the destructor.
/// Threads:   may be made and destroyed by any thread, also while another one forks.
class HostMapping {
 public:
  /// Reserves whole pages for `size_bytes`, which may be zero; they read as zero. Pages are taken
  /// from the memory of `node` while it has some, where the system knows that node; without one
  /// they come from wherever the thread that touches them runs.
  /// Throws: MemoryError with the system's own words.
  explicit HostMapping(std::size_t size_bytes, std::optional<int> node = std::nullopt);
  HostMapping(const HostMapping&) = delete;
  HostMapping& operator=(const HostMapping&) = delete;
  ~HostMapping();

  /// Page-aligned, and on a huge page's boundary; nullptr if the size is zero.
  std::byte* data() const { return data_; }
  /// A multiple of page_bytes().
  std::size_t size_bytes() const { return size_bytes_; }

  /// Takes the pages behind [begin, begin + size_bytes), which lies in this mapping, and leaves
  /// their bytes as they are.
  ///
  /// Blocking:  until they are there; several threads where that pays, none outlives the call.
  /// Throws:    MemoryError if the system has no page left (some are then taken).
  void take_pages(std::byte* begin, std::size_t size_bytes);

  /// As take_pages, for private memory of another mapping.
  static void own_pages(std::byte* begin, std::size_t size_bytes);

  /// Copies `size_bytes` to `destination`, which lies in this mapping, and takes pages as it goes.
  /// Blocking and Throws: as take_pages.
  void fill(std::byte* destination, const void* source, std::size_t size_bytes);

  /// Keeps the memory mapped for good, since something may still refer to it.
  void leak() { leaked_ = true; }

  static std::size_t page_bytes();
  /// The least multiple of page_bytes() that holds `size_bytes`.
  static std::size_t whole_pages(std::size_t size_bytes);

 private:
  friend struct ForkHandlers;
  void forbid_in_child();

  std::byte* data_ = nullptr;
  std::size_t size_bytes_ = 0;
  bool leaked_ = false;
};

}  // namespace torch_offload
