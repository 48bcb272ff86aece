#pragma once

#include <sys/types.h>

#include <cstddef>
#include <mutex>
#include <string>

namespace torch_offload {

/// What is said on standard error, by whomever in this process, while it lives: for calls that have
/// no other way to tell of a failure. What nobody has taken is passed on at its end.
///
/// Threads: one at a time; others wait in the constructor.
class Complaints {
 public:
  /// Throws: std::system_error if the system has no more descriptors.
  Complaints();
  Complaints(const Complaints&) = delete;
  Complaints& operator=(const Complaints&) = delete;
  ~Complaints();

  /// Takes the lines so far that begin with `begin`, and returns how many they were.
  std::size_t take(const std::string& begin);

 private:
  void read();

  const std::lock_guard<std::mutex> lock_;
  int standard_error_ = -1;  // where it goes to otherwise
  int said_ = -1;            // where it goes to now
  off_t read_bytes_ = 0;     // of that
  std::string text_;         // what was read of it, but for the lines taken
};

}  // namespace torch_offload
