#include "lanes/complaints.h"

#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <sstream>
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
  std::istringstream lines(text_);
  std::string left;
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind(begin, 0) == 0) {
      ++num_taken;
    } else {
      left += line + '\n';
    }
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
