#pragma once

#include <cstdint>
#include <string>

namespace torch_offload {

/// What a device throws that fails.
enum class FailureKind {
  kMemory,    ///< MemoryError, as when pages cannot be locked.
  kBadAlloc,  ///< std::bad_alloc, as when the host has no memory for the call itself.
  kRuntime,   ///< std::runtime_error, as what a driver says.
};

/// Throws: ValueError that lists the names there are.
FailureKind parse_failure_kind(const std::string& name);

/// Lets one call of a device fail, once or from then on. Threads: those of its device's caller.
struct DeviceFailure {
  FailureKind kind = FailureKind::kRuntime;
  std::uint64_t calls_until_failure = 0;  ///< The so-manieth call from now on; 0: none does.
  /// Whether all later calls fail too, as CUDA's do after a kernel has died.
  bool is_sticky = false;
  std::uint64_t num_calls = 0;  ///< That could have failed so far.
  std::string failed_call;      ///< Which one has; empty if none has.

  /// Counts a call, which fails if its time has come.
  void count(const char* call);
};

}  // namespace torch_offload
