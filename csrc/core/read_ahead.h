#pragma once

#include <cstddef>
#include <memory>

#include "core/file_mapping.h"

namespace torch_offload {

/// Has pages of checkpoint files read into the page cache before they are needed.
///
/// A wish: whoever needs the pages reads what is not there yet, or not any more. Asking for pages
/// ahead keeps the disk busy with many requests at once, where faults follow one another.
///
/// Blocking:  never; asking the disk can block, so a thread of its own does that.
/// Threads:   one caller at a time.
/// Forks:     a child leaves the thread to its parent, and asks in vain.
class ReadAhead {
 public:
  ReadAhead();
  ReadAhead(const ReadAhead&) = delete;
  ReadAhead& operator=(const ReadAhead&) = delete;
  /// Drops what was not begun. Blocking: until the request under way is with the disk.
  ~ReadAhead();

  /// Has [begin, begin + size_bytes) of a file read, behind what was asked for before. The first
  /// call starts the thread; where the system has none to give, nothing is read ahead.
  void ask(std::shared_ptr<const FileMapping> file, const std::byte* begin, std::size_t size_bytes);

  /// Blocks until all that was asked for is with the disk. For tests.
  void drain();

 private:
  class Reader;
  std::unique_ptr<Reader> reader_;
};

}  // namespace torch_offload
