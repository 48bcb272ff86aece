#include "core/file_mapping.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "core/error.h"
#include "core/host_limits.h"
#include "core/host_mapping.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // Linux 5.14; C libraries learned the name later
#endif

namespace torch_offload {

FileMapping::FileMapping(std::string path) : path_(std::move(path)) {
  const auto fail = [this](const std::string& got) {
    if (descriptor_ >= 0) {
      close(descriptor_);
    }
    throw ValueError("expected a checkpoint file that can be mapped at " + path_ + ", got " + got);
  };
  descriptor_ = open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) {
    fail(std::strerror(errno));
  }
  struct stat status{};
  if (fstat(descriptor_, &status) != 0) {
    fail(std::strerror(errno));
  }
  if (!S_ISREG(status.st_mode) || status.st_size == 0) {
    fail(S_ISREG(status.st_mode) ? "an empty file" : "something that is no file");
  }
  state_ = read_state();
  void* const mapped = mmap(nullptr, state_.size_bytes, PROT_READ, MAP_SHARED, descriptor_, 0);
  if (mapped == MAP_FAILED) {
    fail(std::string("mmap: ") + std::strerror(errno));
  }
  data_ = static_cast<std::byte*>(mapped);
}

FileMapping::~FileMapping() {
  if (munmap(data_, state_.size_bytes) != 0) {
    std::fprintf(stderr, "torch_offload: warning: could not unmap %s: %s\n", path_.c_str(),
                 std::strerror(errno));
  }
  close(descriptor_);
}

FileMapping::State FileMapping::read_state() const {
  struct stat status{};
  if (fstat(descriptor_, &status) != 0) {
    throw_changed(std::strerror(errno));
  }
  constexpr std::int64_t kSecond = 1000000000;
  return {static_cast<std::size_t>(status.st_size),
          status.st_mtim.tv_sec * kSecond + status.st_mtim.tv_nsec};
}

void FileMapping::throw_changed(const std::string& got) const {
  throw StateError("expected the checkpoint file " + path_ +
                   " to stay as it was when it was opened, since weights are streamed from it, "
                   "got " +
                   got +
                   "; load the model again (with masters='arena' files may change "
                   "afterwards), and replace files by renaming new ones over them");
}

void FileMapping::check_unchanged() const {
  const State now = read_state();
  if (now.size_bytes != state_.size_bytes) {
    throw_changed(format_bytes(now.size_bytes) + " where there were " +
                  format_bytes(state_.size_bytes));
  }
  if (now.modified_ns != state_.modified_ns) {
    throw_changed("one that was written to since");
  }
}

void FileMapping::read_pages(const std::byte* begin, std::size_t size_bytes) const {
  auto* const first = data_ + (begin - data_);
  if (madvise(first, size_bytes, MADV_POPULATE_READ) == 0 || errno == EINVAL) {
    return;  // an older kernel reads them as they are locked
  }
  throw_changed(std::string("pages that cannot be read: ") + std::strerror(errno));
}

void FileMapping::read_ahead(const std::byte* begin, std::size_t size_bytes) const {
  static_cast<void>(madvise(data_ + (begin - data_), size_bytes, MADV_WILLNEED));
}

void FileMapping::forget_pages(const std::byte* begin, std::size_t size_bytes) const {
  // Not mapped here any more, so that the cache may let go of them. The mapping is the file's:
  // nothing is lost.
  static_cast<void>(madvise(data_ + (begin - data_), size_bytes, MADV_DONTNEED));
  static_cast<void>(posix_fadvise(descriptor_, begin - data_, static_cast<off_t>(size_bytes),
                                  POSIX_FADV_DONTNEED));
}

}  // namespace torch_offload
