#pragma once

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/pinned_arena.h"
#include "cuda/cuda_device.h"
#include "require_gpu.h"

namespace torch_offload::testing {

constexpr std::size_t kMiB = std::size_t{1} << 20;

/// Holds a stream until it is opened: proves order without sleeping. Nothing that may wait for the
/// whole device (such as a first allocation) belongs between making a gate and opening it.
class Gate {
 public:
  explicit Gate(cudaStream_t stream) { check_cuda(cudaLaunchHostFunc(stream, &Gate::hold, this)); }
  /// Blocks until the stream has passed, for it still looks at this object.
  ~Gate() {
    open();
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return is_passed_; });
  }
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;

  void open() {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_open_ = true;
    changed_.notify_all();
  }

 private:
  static void hold(void* gate) {
    auto* self = static_cast<Gate*>(gate);
    std::unique_lock<std::mutex> lock(self->mutex_);
    self->changed_.wait(lock, [self] { return self->is_open_; });
    self->is_passed_ = true;
    self->changed_.notify_all();
  }

  std::mutex mutex_;  // guards both
  std::condition_variable changed_;
  bool is_open_ = false;
  bool is_passed_ = false;
};

class CudaDeviceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    require_gpu();
    if (HasFatalFailure() || IsSkipped()) {
      return;
    }
    device_ = std::make_shared<CudaDevice>(0);
    caller_ = device_->current_stream();
  }

  /// The CUDA stream behind a number.
  cudaStream_t stream_of(StreamId stream) {
    const c10::cuda::CUDAStreamGuard restore(at::cuda::getCurrentCUDAStream(0));
    device_->set_current_stream(stream);
    return at::cuda::getCurrentCUDAStream(0).stream();
  }

  StreamId create_stream(const char* name, int priority = 0) {
    StreamOptions options;
    options.name = name;
    options.priority = priority;
    return device_->create_stream(options);
  }

  void copy(StreamId stream, void* destination, const void* source, std::size_t size_bytes) {
    Copy copy;
    copy.destination = destination;
    copy.source = source;
    copy.size_bytes = size_bytes;
    device_->copy(stream, copy);
  }

  std::vector<std::byte> read_back(const void* memory, std::size_t size_bytes) {
    std::vector<std::byte> bytes(size_bytes);
    // Not ordered behind any pool stream: what is read here was synchronized before.
    EXPECT_EQ(cudaMemcpy(bytes.data(), memory, size_bytes, cudaMemcpyDeviceToHost), cudaSuccess);
    return bytes;
  }

  /// Lets the allocator cache `count` blocks of 32 MiB, so that none has to be made behind a gate.
  void cache_blocks(int count) {
    std::vector<void*> blocks;
    for (int index = 0; index < count; ++index) {
      blocks.push_back(c10::cuda::CUDACachingAllocator::raw_alloc(32 * kMiB));
    }
    for (void* const block : blocks) {
      c10::cuda::CUDACachingAllocator::raw_delete(block);
    }
  }

  /// An arena of one sealed piece, every byte `value`.
  std::unique_ptr<PinnedArena> sealed_arena(std::size_t size_bytes, std::byte value) {
    auto arena = std::make_unique<PinnedArena>(device_, std::vector<std::size_t>{size_bytes});
    const std::vector<std::byte> bytes(size_bytes, value);
    arena->fill(0, bytes.data(), size_bytes);
    arena->seal_up_to(0);
    return arena;
  }

  std::shared_ptr<CudaDevice> device_;
  StreamId caller_ = kNoStream;
};

}  // namespace torch_offload::testing
