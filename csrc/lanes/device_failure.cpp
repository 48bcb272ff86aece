#include "lanes/device_failure.h"

#include <new>
#include <stdexcept>

#include "core/error.h"

namespace torch_offload {

FailureKind parse_failure_kind(const std::string& name) {
  if (name == "memory") {
    return FailureKind::kMemory;
  }
  if (name == "bad_alloc") {
    return FailureKind::kBadAlloc;
  }
  if (name == "runtime") {
    return FailureKind::kRuntime;
  }
  throw ValueError("expected a failure to be one of memory, bad_alloc, runtime, got '" + name +
                   "'");
}

void DeviceFailure::count(const char* call) {
  ++num_calls;
  if (calls_until_failure == 0) {
    return;
  }
  if (calls_until_failure > 1) {
    --calls_until_failure;
    return;
  }
  calls_until_failure = is_sticky ? 1 : 0;
  failed_call = call;
  switch (kind) {
    case FailureKind::kMemory:
      throw MemoryError("planted failure of " + failed_call);
    case FailureKind::kBadAlloc:
      throw std::bad_alloc();
    case FailureKind::kRuntime:
      throw std::runtime_error("planted failure of " + failed_call);
  }
}

}  // namespace torch_offload
