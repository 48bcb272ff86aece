#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>

namespace torch_offload {

/// The three calls that every unit of a steady forward makes, at the driver instead of through
/// CUDA's runtime, which takes longer. Each returns whether it was done. If not, make the runtime's
/// call: it gives a thread that has no context yet the one of the current device, and its errors
/// are the ones that everybody knows.
///
/// Which device is current does not matter. Never blocks for page-locked sources.
class DriverCalls {
 public:
  DriverCalls();

  bool copy_to_device(void* destination, const void* source, std::size_t size_bytes,
                      cudaStream_t stream) const {
    return copy_ != nullptr && copy_(reinterpret_cast<CUdeviceptr>(destination), source, size_bytes,
                                     stream) == CUDA_SUCCESS;
  }
  bool record(cudaEvent_t event, cudaStream_t stream) const {
    return record_ != nullptr && record_(event, stream) == CUDA_SUCCESS;
  }
  bool wait(cudaStream_t stream, cudaEvent_t event) const {
    return wait_ != nullptr && wait_(stream, event, CU_EVENT_WAIT_DEFAULT) == CUDA_SUCCESS;
  }

 private:
  // As CUDA 12.0 declares them; none where the driver has no such call.
  CUresult (*copy_)(CUdeviceptr, const void*, std::size_t, CUstream) = nullptr;
  CUresult (*record_)(CUevent, CUstream) = nullptr;
  CUresult (*wait_)(CUstream, CUevent, unsigned int) = nullptr;
};

}  // namespace torch_offload
