#include "lanes/complaints.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <system_error>

namespace torch_offload {

namespace {

std::mutex& standard_error_mutex() {
  static std::mutex mutex;
  return mutex;
}

}  // namespace

Complaints::Complaints() : lock_(standard_error_mutex()) {
  std::fflush(stderr);
  standard_error_ = dup(STDERR_FILENO);
  said_ = memfd_create("torch_offload_complaints", MFD_CLOEXEC);
  if (standard_error_ < 0 || said_ < 0 || dup2(said_, STDERR_FILENO) < 0) {
    const int error = errno;
    close(standard_error_);
    close(said_);
    throw std::system_error(error, std::generic_category(), "could not listen to standard error");
  }
}

Complaints::~Complaints() {
  read();
  dup2(standard_error_, STDERR_FILENO);
  std::fputs(text_.c_str(), stderr);
  close(standard_error_);
  close(said_);
}

std::size_t Complaints::take(const std::string& begin) {
  read();
  std::size_t num_taken = 0;
  std::string left;
  for (std::size_t at = 0; at < text_.size();) {
    const std::size_t end = std::min(text_.find('\n', at), text_.size() - 1) + 1;
    if (text_.compare(at, begin.size(), begin) == 0) {
      ++num_taken;
    } else {
      left.append(text_, at, end - at);
    }
    at = end;
  }
  text_ = left;
  return num_taken;
}

void Complaints::read() {
  std::fflush(stderr);
  std::array<char, 4096> buffer{};
  for (ssize_t size = 0; (size = pread(said_, buffer.data(), buffer.size(), read_bytes_)) > 0;) {
    text_.append(buffer.data(), static_cast<std::size_t>(size));
    read_bytes_ += size;
  }
}

}  // namespace torch_offload
