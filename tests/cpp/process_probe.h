#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <vector>

/// What tests ask the system about memory and about children.
namespace torch_offload {

/// Runs `body` in a forked child and returns how it ended, as waitpid says; `body` returns the
/// child's status.
template <typename Body>
int end_of_child(Body body) {
  const pid_t child = fork();
  if (child == 0) {
    // What a sanitizer, or anybody, does at a fault would hide the signal.
    std::signal(SIGSEGV, SIG_DFL);
    _exit(body());
  }
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  return status;
}

inline bool died_of_segv(int status) { return WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV; }
inline bool succeeded(int status) { return WIFEXITED(status) && WEXITSTATUS(status) == 0; }

/// Reads one byte, whatever the compiler thinks of it.
inline int read_byte(const std::byte* memory) {
  return static_cast<int>(*static_cast<const volatile std::byte*>(memory));
}

inline bool is_mapped(void* memory) {
  unsigned char resident = 0;
  return mincore(memory, 1, &resident) == 0 || errno != ENOMEM;
}

/// How much of [memory, memory + size_bytes), which begins on a page, has memory behind it.
inline std::size_t resident_bytes(std::byte* memory, std::size_t size_bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> pages((size_bytes + page - 1) / page);
  EXPECT_EQ(mincore(memory, size_bytes, pages.data()), 0);
  return page * static_cast<std::size_t>(std::count_if(
                    pages.begin(), pages.end(), [](unsigned char bits) { return bits & 1U; }));
}

/// Some sandboxes say that all memory is there.
inline bool system_tells_residency() {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* const fresh =
      mmap(nullptr, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const bool tells = resident_bytes(static_cast<std::byte*>(fresh), page) == 0;
  munmap(fresh, page);
  return tells;
}

}  // namespace torch_offload
