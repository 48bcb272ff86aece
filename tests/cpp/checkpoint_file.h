#pragma once

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace torch_offload {

/// A file of random bytes that is gone with the object.
class CheckpointFile {
 public:
  explicit CheckpointFile(std::size_t size_bytes, unsigned seed = 1) : bytes_(size_bytes) {
    std::mt19937 generator(seed);
    for (std::byte& byte : bytes_) {
      byte = static_cast<std::byte>(generator());
    }
    const char* folder = std::getenv("TMPDIR");
    path_ = std::string(folder != nullptr ? folder : "/tmp") + "/torch_offload_XXXXXX";
    const int descriptor = mkstemp(path_.data());
    if (descriptor >= 0) {
      close(descriptor);
    }
    write_all();
  }
  CheckpointFile(const CheckpointFile&) = delete;
  CheckpointFile& operator=(const CheckpointFile&) = delete;
  ~CheckpointFile() { unlink(path_.c_str()); }

  const std::string& path() const { return path_; }
  const std::vector<std::byte>& bytes() const { return bytes_; }

  /// Writes the same bytes once more, in place.
  void write_all() const {
    std::ofstream file(path_, std::ios::binary | std::ios::in | std::ios::out | std::ios::ate);
    file.seekp(0);
    file.write(reinterpret_cast<const char*>(bytes_.data()),
               static_cast<std::streamsize>(bytes_.size()));
  }
  /// What is in the file now.
  std::vector<std::byte> read_all() const {
    std::vector<std::byte> now(bytes_.size());
    std::ifstream file(path_, std::ios::binary);
    file.read(reinterpret_cast<char*>(now.data()), static_cast<std::streamsize>(now.size()));
    return now;
  }

 private:
  std::string path_;
  std::vector<std::byte> bytes_;
};

}  // namespace torch_offload
