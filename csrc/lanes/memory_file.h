#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <string>
#include <system_error>
#include <vector>

namespace torch_offload::lanes {

/// A file that is in no folder, and gone with the object.
class MemoryFile {
 public:
  /// Throws: std::system_error.
  explicit MemoryFile(const std::vector<std::byte>& bytes)
      : descriptor_(memfd_create("torch_offload_file", MFD_CLOEXEC)) {
    const auto size = static_cast<ssize_t>(bytes.size());
    if (descriptor_ < 0 || write(descriptor_, bytes.data(), bytes.size()) != size) {
      const int error = errno;
      close(descriptor_);
      throw std::system_error(error, std::generic_category(), "could not write a file in memory");
    }
  }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  ~MemoryFile() { close(descriptor_); }

  /// Good for this process alone.
  std::string path() const { return "/proc/self/fd/" + std::to_string(descriptor_); }

 private:
  const int descriptor_;
};

}  // namespace torch_offload::lanes
