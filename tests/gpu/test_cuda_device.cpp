#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "../cpp/process_probe.h"
#include "core/error.h"
#include "core/pinned_arena.h"
#include "cuda/cuda_device.h"
#include "cuda_fixture.h"

namespace torch_offload {
namespace {

using testing::check_cuda;
using testing::CudaDeviceTest;
using testing::Gate;
using testing::kMiB;

TEST_F(CudaDeviceTest, UnknownDeviceThrows) {
  EXPECT_THROW(CudaDevice(-1), IndexError);
  EXPECT_THROW(CudaDevice(at::cuda::device_count()), IndexError);
}

TEST_F(CudaDeviceTest, StreamsHaveTheirNamesAndPriorities) {
  const StreamId high = create_stream("high", -1);
  const StreamId normal = create_stream("normal", 0);
  EXPECT_EQ(device_->stream_name(high), "high");
  EXPECT_EQ(device_->stream_name(normal), "normal");
  int priority = 1;
  check_cuda(cudaStreamGetPriority(stream_of(high), &priority));
  EXPECT_EQ(priority, -1);
  check_cuda(cudaStreamGetPriority(stream_of(normal), &priority));
  EXPECT_EQ(priority, 0);
  EXPECT_THROW(create_stream("low", 1), ValueError);
}

TEST_F(CudaDeviceTest, StreamsAreNewOnesWhileThePoolHasAny) {
  // The caller works on a pool stream, and the pool comes round to it while we draw.
  const c10::cuda::CUDAStreamGuard guard(at::cuda::getStreamFromPool(0, 0));
  std::set<cudaStream_t> seen{stream_of(device_->current_stream())};
  for (int index = 0; index < 31; ++index) {
    EXPECT_TRUE(seen.insert(stream_of(create_stream("pool"))).second) << "stream " << index;
  }
}

TEST_F(CudaDeviceTest, CurrentStreamIsAskedLive) {
  EXPECT_EQ(device_->stream_name(caller_), "caller (default stream)");
  StreamId other = kNoStream;
  {
    const c10::cuda::CUDAStreamGuard guard(at::cuda::getStreamFromPool(0, 0));
    other = device_->current_stream();
    EXPECT_NE(other, caller_);
    EXPECT_EQ(device_->current_stream(), other);
  }
  EXPECT_EQ(device_->current_stream(), caller_);
  device_->set_current_stream(other);
  EXPECT_EQ(device_->current_stream(), other);
  device_->set_current_stream(caller_);
  EXPECT_EQ(at::cuda::getCurrentCUDAStream(0), at::cuda::getDefaultCUDAStream(0));
}

TEST_F(CudaDeviceTest, UnrecordedEventThrows) {
  const EventId event = device_->create_event();
  EXPECT_THROW(device_->wait(caller_, event), InternalError);
  EXPECT_THROW(device_->is_done(event), InternalError);
}

/// Three chunks, the second of them one piece that is larger than a chunk may be.
class CudaArenaTest : public CudaDeviceTest {
 protected:
  void SetUp() override {
    CudaDeviceTest::SetUp();
    if (device_ == nullptr) {
      return;
    }
    arena_ = std::make_unique<PinnedArena>(device_, sizes_, kMiB);
    for (PieceIndex piece = 0; piece < sizes_.size(); ++piece) {
      std::vector<std::byte> bytes(sizes_[piece]);
      for (std::size_t index = 0; index < bytes.size(); ++index) {
        bytes[index] = static_cast<std::byte>(index * 7 + piece);
      }
      arena_->fill(piece, bytes.data(), bytes.size());
      arena_->seal_up_to(piece);
      masters_.insert(masters_.end(), bytes.begin(), bytes.end());
    }
  }

  const std::vector<std::size_t> sizes_ = {256, 768, 3 * kMiB + 256, 512, 1280};
  std::unique_ptr<PinnedArena> arena_;
  std::vector<std::byte> masters_;  // one behind the other
};

TEST_F(CudaArenaTest, CopiesBringEveryByteOfEverySegment) {
  const StreamId copies = create_stream("copies", -1);
  auto* const place = static_cast<std::byte*>(device_->allocate(masters_.size()));
  const std::vector<CopySegment> segments = arena_->segments(0, sizes_.size());
  EXPECT_EQ(segments.size(), 3U);
  for (const CopySegment& segment : segments) {
    copy(copies, place + segment.offset, segment.source, segment.size_bytes);
  }
  device_->synchronize(copies);
  EXPECT_EQ(read_back(place, masters_.size()), masters_);
  device_->free(place);
}

TEST_F(CudaArenaTest, UserMayCopyAnyWholePieceBothWays) {
  void* const place = device_->allocate(masters_.size());
  const std::byte* expected = masters_.data();
  for (PieceIndex piece = 0; piece < sizes_.size(); ++piece) {
    std::byte* const master = arena_->piece_memory(piece);
    const std::vector<std::byte> bytes(expected, expected + sizes_[piece]);
    check_cuda(cudaMemcpy(place, master, sizes_[piece], cudaMemcpyHostToDevice));
    EXPECT_EQ(read_back(place, sizes_[piece]), bytes) << "piece " << piece;
    std::memset(master, 0, sizes_[piece]);
    check_cuda(cudaMemcpy(master, place, sizes_[piece], cudaMemcpyDeviceToHost));
    EXPECT_EQ(std::memcmp(master, bytes.data(), sizes_[piece]), 0) << "piece " << piece;
    expected += sizes_[piece];
  }
  device_->free(place);
}

TEST_F(CudaDeviceTest, DeviceFillsAPreparedPiece) {
  constexpr std::size_t kSize = 24 * kMiB;
  PinnedArena arena(device_, {kSize, kSize}, kSize);
  void* const source = device_->allocate(kSize);
  device_->fill(caller_, source, kSize, 6, kNoUnit);
  arena.prepare(1);
  EXPECT_FALSE(arena.is_sealed(0));
  ASSERT_TRUE(arena.is_sealed(1));
  check_cuda(cudaMemcpyAsync(arena.piece_memory(1), source, kSize, cudaMemcpyDeviceToHost,
                             stream_of(caller_)));
  device_->synchronize(caller_);
  arena.seal_up_to(1);
  EXPECT_EQ(device_->counters().registered_bytes, 2 * kSize);
  const std::vector<std::byte> expected(kSize, std::byte{6});
  EXPECT_EQ(std::memcmp(arena.piece_memory(1), expected.data(), kSize), 0);
  device_->free(source);
}

TEST_F(CudaDeviceTest, CopyFromPageableMemoryThrows) {
  void* const place = device_->allocate(256);
  const std::vector<std::byte> pageable(256);
  EXPECT_THROW(copy(caller_, place, pageable.data(), 256), ValueError);
  device_->free(place);
}

TEST_F(CudaDeviceTest, WaitHoldsTheReaderUntilTheCopyIsDone) {
  const auto arena = sealed_arena(kMiB, std::byte{9});
  void* const place = device_->allocate(kMiB);
  const StreamId copies = create_stream("copies");
  const StreamId compute = create_stream("compute");
  const EventId ready = device_->create_event();
  const EventId read = device_->create_event();
  std::byte* result = nullptr;
  check_cuda(cudaHostAlloc(reinterpret_cast<void**>(&result), 1, cudaHostAllocDefault));
  *result = std::byte{0};

  device_->fill(copies, place, kMiB, 0, kNoUnit);
  Gate gate(stream_of(copies));
  copy(copies, place, arena->piece_memory(0), kMiB);
  device_->record(ready, copies);
  device_->wait(compute, ready);
  check_cuda(cudaMemcpyAsync(result, place, 1, cudaMemcpyDeviceToHost, stream_of(compute)));
  device_->record(read, compute);
  EXPECT_FALSE(device_->is_done(ready));
  EXPECT_FALSE(device_->is_done(read));
  EXPECT_EQ(*result, std::byte{0});

  gate.open();
  device_->synchronize(compute);
  EXPECT_TRUE(device_->is_done(ready));
  EXPECT_TRUE(device_->is_done(read));
  EXPECT_EQ(*result, std::byte{9});
  check_cuda(cudaFreeHost(result));
  device_->free(place);
}

TEST_F(CudaDeviceTest, SubmittingNeverBlocksTheHost) {
  const auto arena = sealed_arena(kMiB, std::byte{1});
  void* const place = device_->allocate(kMiB);
  const StreamId copies = create_stream("copies");
  const EventId event = device_->create_event();
  Gate gate(stream_of(copies));  // whatever waited for this stream would never come back
  copy(copies, place, arena->piece_memory(0), kMiB);
  device_->record(event, copies);
  device_->wait(caller_, event);
  device_->fill(copies, place, kMiB, 0, kNoUnit);
  EXPECT_FALSE(device_->is_done(event));
  EXPECT_EQ(device_->counters().host_synchronizes, 0U);
  gate.open();
  device_->synchronize(copies);
  device_->free(place);
}

TEST_F(CudaDeviceTest, PyTorchKnowsOfTheMemory) {
  const auto allocated = [] {
    return c10::cuda::CUDACachingAllocator::getDeviceStats(0).allocated_bytes[0].current;
  };
  const auto before = allocated();
  void* const memory = device_->allocate(8 * kMiB);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory) % kAlignmentBytes, 0U);
  EXPECT_EQ(allocated() - before, static_cast<std::int64_t>(8 * kMiB));
  device_->free(memory);
  EXPECT_EQ(allocated(), before);
}

TEST_F(CudaDeviceTest, OutOfMemorySaysAskedAndFree) {
  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;
  check_cuda(cudaMemGetInfo(&free_bytes, &total_bytes));
  try {
    device_->allocate(total_bytes + 1024 * kMiB);
    FAIL() << "no error";
  } catch (const MemoryError& error) {
    const std::string text = error.what();
    for (const char* piece : {"cuda:0", "GiB are free", "gpu_budget", "PyTorch says"}) {
      EXPECT_NE(text.find(piece), std::string::npos) << piece << " is not in: " << text;
    }
  }
  EXPECT_EQ(device_->counters().allocations, 0U);
  device_->free(device_->allocate(kMiB));
}

TEST_F(CudaDeviceTest, AllocationIsBehindTheLastTenantOfItsBlock) {
  const auto arena = sealed_arena(32 * kMiB, std::byte{5});
  const StreamId before = create_stream("known before");
  cache_blocks(1);
  Gate gate(stream_of(caller_));
  void* const tenant = c10::cuda::CUDACachingAllocator::raw_alloc(32 * kMiB);
  check_cuda(cudaMemsetAsync(tenant, 1, 32 * kMiB, stream_of(caller_)));
  c10::cuda::CUDACachingAllocator::raw_delete(tenant);
  void* const place = device_->allocate(32 * kMiB);
  ASSERT_EQ(place, tenant) << "the allocator gave another block, so this test shows nothing";
  const StreamId after = create_stream("known after");
  const EventId written = device_->create_event();
  const EventId written_after = device_->create_event();
  copy(before, place, arena->piece_memory(0), 32 * kMiB);
  device_->record(written, before);
  copy(after, place, arena->piece_memory(0), 32 * kMiB);
  device_->record(written_after, after);
  EXPECT_FALSE(device_->is_done(written));
  EXPECT_FALSE(device_->is_done(written_after));
  gate.open();
  for (const StreamId stream : {caller_, before, after}) {
    device_->synchronize(stream);
  }
  EXPECT_EQ(read_back(place, 32 * kMiB), std::vector<std::byte>(32 * kMiB, std::byte{5}));
  device_->free(place);
}

TEST_F(CudaDeviceTest, FreedBlockIsNotHandedOutWhileItIsRead) {
  const StreamId compute = create_stream("compute");
  cache_blocks(2);
  void* const place = device_->allocate(32 * kMiB);
  Gate gate(stream_of(compute));
  device_->fill(compute, place, 32 * kMiB, 1, kNoUnit);
  device_->free(place);
  void* const next = c10::cuda::CUDACachingAllocator::raw_alloc(32 * kMiB);
  EXPECT_NE(next, place);
  gate.open();
  device_->synchronize(compute);
  c10::cuda::CUDACachingAllocator::raw_delete(next);
}

TEST_F(CudaDeviceTest, RefusedRegistrationLeavesNoTrace) {
  // By somebody else, or the device would notice before CUDA does.
  void* const memory = std::aligned_alloc(4096, kMiB);
  check_cuda(cudaHostRegister(memory, kMiB, cudaHostRegisterDefault));
  try {
    device_->register_host(memory, kMiB);
    FAIL() << "no error";
  } catch (const MemoryError& error) {
    const std::string text = error.what();
    for (const char* piece : {"1.00 MiB", "cudaError", "locked-memory limit"}) {
      EXPECT_NE(text.find(piece), std::string::npos) << piece << " is not in: " << text;
    }
  }
  EXPECT_EQ(cudaGetLastError(), cudaSuccess) << "the failure was left for whoever asks next";
  EXPECT_EQ(device_->counters().registrations, 0U);
  check_cuda(cudaHostUnregister(memory));
  std::free(memory);
}

TEST_F(CudaDeviceTest, ArenaGivesItsRegistrationsBack) {
  std::byte* memory = nullptr;
  {
    const auto arena = sealed_arena(kMiB, std::byte{1});
    memory = arena->piece_memory(0);
    cudaPointerAttributes attributes{};
    check_cuda(cudaPointerGetAttributes(&attributes, memory));
    EXPECT_EQ(attributes.type, cudaMemoryTypeHost);
  }
  EXPECT_EQ(device_->counters().registered_bytes, 0U);
  cudaPointerAttributes attributes{};
  check_cuda(cudaPointerGetAttributes(&attributes, memory));
  EXPECT_EQ(attributes.type, cudaMemoryTypeUnregistered);
}

TEST_F(CudaDeviceTest, ForkLeavesTheParentsMastersWhereTheDeviceReadsThem) {
  const auto arena = sealed_arena(64 * kMiB, std::byte{1});
  void* const place = device_->allocate(64 * kMiB);
  int to_child[2];
  ASSERT_EQ(pipe(to_child), 0);
  const pid_t child = fork();
  if (child == 0) {
    char released = 0;
    _exit(read(to_child[0], &released, 1) == 1 ? 0 : 1);
  }
  // While the child lives: this write would move pages that it shared.
  const std::vector<std::byte> edited(kMiB, std::byte{2});
  arena->fill(0, edited.data(), kMiB);
  copy(caller_, place, arena->piece_memory(0), 64 * kMiB);
  device_->synchronize(caller_);
  const std::vector<std::byte> seen = read_back(place, 64 * kMiB);
  EXPECT_EQ(seen[0], std::byte{2}) << "the device reads a page that the parent has left";
  EXPECT_EQ(seen[kMiB], std::byte{1});
  ASSERT_EQ(write(to_child[1], "x", 1), 1);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(succeeded(status));
  device_->free(place);
  close(to_child[0]);
  close(to_child[1]);
}

TEST_F(CudaDeviceTest, ForkedChildThatReadsAMasterDiesAndOneThatEndsCallsNoCuda) {
  auto arena = sealed_arena(64 * kMiB, std::byte{1});
  EXPECT_TRUE(died_of_segv(end_of_child([&] { return read_byte(arena->piece_memory(0)); })));
  EXPECT_TRUE(succeeded(end_of_child([&] {
    arena.reset();
    device_.reset();
    return 0;
  })));
  void* const place = device_->allocate(64 * kMiB);
  copy(caller_, place, arena->piece_memory(0), 64 * kMiB);
  device_->synchronize(caller_);
  EXPECT_EQ(read_back(place, 64 * kMiB), std::vector<std::byte>(64 * kMiB, std::byte{1}));
  device_->free(place);
}

TEST_F(CudaDeviceTest, WorksOnADeviceThatIsNotCurrent) {
  if (at::cuda::device_count() < 2) {
    GTEST_SKIP() << "one GPU only";
  }
  const c10::cuda::CUDAGuard first(0);
  device_ = std::make_shared<CudaDevice>(1);
  const StreamId copies = create_stream("copies");
  const auto arena = sealed_arena(kMiB, std::byte{3});
  void* const place = device_->allocate(kMiB);
  cudaPointerAttributes attributes{};
  check_cuda(cudaPointerGetAttributes(&attributes, place));
  EXPECT_EQ(attributes.device, 1);
  const EventId event = device_->create_event();
  copy(copies, place, arena->piece_memory(0), kMiB);
  device_->record(event, copies);
  device_->wait(device_->current_stream(), event);
  device_->synchronize(device_->current_stream());
  EXPECT_TRUE(device_->is_done(event));
  EXPECT_EQ(read_back(place, kMiB), std::vector<std::byte>(kMiB, std::byte{3}));
  device_->free(place);
  EXPECT_EQ(at::cuda::current_device(), 0);
}

/// Not a test: prints what the arena costs. Run it by name with --gtest_also_run_disabled_tests.
TEST_F(CudaDeviceTest, DISABLED_PrintsRatesOfTheArena) {
  constexpr std::size_t kPiece = 512 * kMiB;
  constexpr std::size_t kPieces = 16;
  const std::vector<std::size_t> sizes(kPieces, kPiece);
  const auto timed = [](const char* what, auto&& work) {
    const auto start = std::chrono::steady_clock::now();
    work();
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("%-10s %8.1f ms %6.1f GB/s\n", what, seconds * 1e3,
                static_cast<double>(kPieces * kPiece) / seconds / 1e9);
  };
  const std::vector<std::byte> source(kPiece, std::byte{1});
  auto arena = std::make_unique<PinnedArena>(device_, sizes);
  timed("fill, seal", [&] {
    for (PieceIndex piece = 0; piece < kPieces; ++piece) {
      arena->fill(piece, source.data(), kPiece);
      arena->seal_up_to(piece);
    }
  });
  void* const place = device_->allocate(kPiece);
  timed("copy", [&] {
    for (PieceIndex piece = 0; piece < kPieces; ++piece) {
      copy(caller_, place, arena->piece_memory(piece), kPiece);
    }
    device_->synchronize(caller_);
  });
  timed("fork", [] { EXPECT_TRUE(succeeded(end_of_child([] { return 0; }))); });
  timed("unregister", [&] { arena.reset(); });
  arena = std::make_unique<PinnedArena>(device_, sizes);
  timed("prepare", [&] {
    for (PieceIndex piece = 0; piece < kPieces; ++piece) {
      arena->prepare(piece);
    }
  });
  timed("copy back", [&] {
    for (PieceIndex piece = 0; piece < kPieces; ++piece) {
      check_cuda(cudaMemcpy(arena->piece_memory(piece), place, kPiece, cudaMemcpyDeviceToHost));
    }
  });
  arena.reset();
  arena = std::make_unique<PinnedArena>(device_, std::vector<std::size_t>{kPieces * kPiece});
  timed("one piece", [&] { arena->prepare(0); });
  device_->free(place);
}

}  // namespace
}  // namespace torch_offload
