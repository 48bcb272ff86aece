#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

namespace torch_offload::testing {

inline void check_cuda(cudaError_t error) {
  ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
}

/// Skips the test where there is no GPU, or fails it if TORCH_OFFLOAD_REQUIRE_CUDA=1. The caller
/// returns when it has done either.
inline void require_gpu() {
  int num_devices = 0;
  if (cudaGetDeviceCount(&num_devices) != cudaSuccess || num_devices == 0) {
    static_cast<void>(cudaGetLastError());
    const char* required = std::getenv("TORCH_OFFLOAD_REQUIRE_CUDA");
    if (required != nullptr && std::string(required) == "1") {
      FAIL() << "no GPU, but TORCH_OFFLOAD_REQUIRE_CUDA=1";
    }
    GTEST_SKIP() << "no GPU";
  }
}

}  // namespace torch_offload::testing
