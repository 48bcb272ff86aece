// What compute-sanitizer must find, and a twin in which there is nothing to find: tools/gpu.sh runs
// them before it believes the tool.
//
//   planted_fault bounds | race | none

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>

namespace {

constexpr int kThreads = 64;

__global__ void write(int* memory, int count) {
  const int at = static_cast<int>(threadIdx.x);
  if (at < count) {
    memory[at] = at;
  }
}

/// Each thread reads what its neighbour writes, and waits for that or not.
__global__ void exchange(int* memory, bool waits) {
  __shared__ int shared[kThreads];
  const int at = static_cast<int>(threadIdx.x);
  shared[at] = at;
  if (waits) {
    __syncthreads();
  }
  memory[at] = shared[kThreads - 1 - at];
}

}  // namespace

int main(int argc, char** argv) {
  const char* fault = argc > 1 ? argv[1] : "none";
  int* memory = nullptr;
  cudaError_t error = cudaMalloc(&memory, kThreads * sizeof(int));
  if (error == cudaSuccess) {
    // The tool knows what was asked for, however much more the allocator has.
    const bool is_beyond = std::strcmp(fault, "bounds") == 0;
    write<<<1, kThreads>>>(memory + (is_beyond ? kThreads : 0), kThreads);
    exchange<<<1, kThreads>>>(memory, std::strcmp(fault, "race") != 0);
    error = cudaDeviceSynchronize();
  }
  if (error != cudaSuccess) {
    std::fprintf(stderr, "%s: %s\n", fault, cudaGetErrorString(error));
    return 2;
  }
  return cudaFree(memory) == cudaSuccess ? 0 : 2;
}
