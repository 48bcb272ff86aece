#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace torch_offload {

/// One file of a checkpoint, mapped read-only and shared: its pages are those of the page cache.
///
/// Nothing is read when it is made; pages come as they are touched, and the system may take them
/// back at any time. Whoever reads a page beyond the end of a file that was cut short meanwhile
/// gets SIGBUS from the system: ask `check_unchanged` before.
///
/// Threads: readers need no lock.
/// Forks:   a child inherits the mapping.
class FileMapping {
 public:
  /// Throws: ValueError with the system's words if it is no readable file, or is empty.
  explicit FileMapping(std::string path);
  FileMapping(const FileMapping&) = delete;
  FileMapping& operator=(const FileMapping&) = delete;
  ~FileMapping();

  const std::string& path() const { return path_; }
  const std::byte* data() const { return data_; }
  /// Of the file as it was opened.
  std::size_t size_bytes() const { return state_.size_bytes; }
  int descriptor() const { return descriptor_; }

  /// Makes sure that the file is what was opened: of the same size, and not modified since.
  ///
  /// A file that was renamed over or deleted is still there for us, with the bytes that were
  /// opened, and is no error.
  /// Throws: StateError if it was written to or cut short, or cannot be asked any more.
  void check_unchanged() const;

  /// Brings pages of the file into memory, so that what cannot be read is an error, not a signal.
  /// Blocking: while the disk reads. Throws: StateError.
  void read_pages(const std::byte* begin, std::size_t size_bytes) const;
  /// Asks the disk for pages and does not wait for them. A wish.
  /// Blocking: while the disk's queue is full.
  void read_ahead(const std::byte* begin, std::size_t size_bytes) const;
  /// Lets the system have the memory of pages that nobody else maps: it is not to look for others
  /// to take. The next to need them reads them anew. A wish.
  void forget_pages(const std::byte* begin, std::size_t size_bytes) const;

 private:
  struct State {
    std::size_t size_bytes = 0;
    std::int64_t modified_ns = 0;
  };
  State read_state() const;
  [[noreturn]] void throw_changed(const std::string& got) const;

  std::string path_;
  int descriptor_ = -1;
  State state_;
  std::byte* data_ = nullptr;
};

/// Some bytes of a file.
struct FileBlock {
  std::shared_ptr<const FileMapping> file;
  std::size_t offset = 0;
  std::size_t size_bytes = 0;

  const std::byte* data() const { return file->data() + offset; }
};

}  // namespace torch_offload
