#include "cuda/driver_calls.h"

namespace torch_offload {

namespace {

/// Asked for through the runtime: no library of the driver to link against, which a machine that
/// only builds does not have.
template <typename Call>
void find(const char* name, Call& call) {
  constexpr unsigned int kCudaVersion = 12000;
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  if (cudaGetDriverEntryPointByVersion(name, &found, kCudaVersion, cudaEnableDefault, &result) ==
          cudaSuccess &&
      result == cudaDriverEntryPointSuccess) {
    call = reinterpret_cast<Call>(found);
  } else {
    static_cast<void>(cudaGetLastError());
  }
}

}  // namespace

DriverCalls::DriverCalls() {
  find("cuMemcpyHtoDAsync", copy_);
  find("cuEventRecord", record_);
  find("cuStreamWaitEvent", wait_);
}

}  // namespace torch_offload
