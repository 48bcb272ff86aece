#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "core/file_mapping.h"

namespace torch_offload {

/// Blocks of checkpoint files, one behind the other in private copy-on-write memory: what a
/// parameter at rest shows while its unit is streamed from the file itself.
///
/// Note [Two mappings of the same pages]
/// Copies read the shared mapping (FileMapping), which nobody can write. The user sees this one. It
/// maps the same pages of the page cache, so it takes no memory of its own; a store into it takes a
/// private copy of its page and reaches neither the file nor the copies. So every edit, of whatever
/// kind, is an anonymous page, and `is_edited` finds it exactly. Blocks that do not begin where the
/// one before ends modulo a page cannot be mapped there; they are copied, as is the page in which
/// two blocks meet.
///
/// Lifetime:  keeps the files open. Pages are given back by the destructor.
/// Threads:   one caller at a time.
class FileView {
 public:
  /// Throws: ValueError for no bytes, or a block beyond the end of its file; MemoryError with the
  ///         system's words; StateError if a page that must be copied cannot be read.
  explicit FileView(std::vector<FileBlock> blocks);
  FileView(const FileView&) = delete;
  FileView& operator=(const FileView&) = delete;
  ~FileView();

  std::byte* data() const { return data_; }
  std::size_t size_bytes() const { return size_bytes_; }
  const std::vector<FileBlock>& blocks() const { return blocks_; }
  /// Bytes that could not be mapped and take memory of their own; without pages taken by edits.
  std::size_t copied_bytes() const { return copied_bytes_; }
  /// The whole pages around the bytes: no other memory lies in them.
  std::byte* pages() const { return pages_; }
  std::size_t pages_bytes() const { return pages_bytes_; }

  /// Throws: as FileMapping::check_unchanged, for any of the files.
  void check_unchanged() const;
  /// Whether any byte differs from the files'. Exact: of all kinds of edits none is missed.
  ///
  /// Blocking: reads /proc/self/pagemap, about 2 ms for each GiB, and compares anonymous pages.
  bool is_edited() const;
  /// Whether one of 64 words, evenly spread, differs from the files'. Cheap, and may miss an edit
  /// of a few elements.
  bool looks_edited() const;
  /// Takes private copies of all pages, whose bytes and addresses stay as they are.
  /// Blocking: while copying, by several threads. Throws: MemoryError.
  void take_all_pages();

  /// Keeps the memory mapped for good, since something may still refer to it.
  void leak() { leaked_ = true; }

 private:
  using VisitRun = std::function<bool(std::size_t begin, std::size_t end)>;
  void map_blocks();
  bool any_anonymous_run(const VisitRun& visit) const;
  bool differs(std::size_t begin, std::size_t end) const;

  std::vector<FileBlock> blocks_;
  std::vector<std::size_t> begins_;  // of each block, in the view
  std::size_t size_bytes_ = 0;
  std::size_t copied_bytes_ = 0;
  std::byte* pages_ = nullptr;
  std::size_t pages_bytes_ = 0;
  std::byte* data_ = nullptr;
  bool leaked_ = false;
};

}  // namespace torch_offload
