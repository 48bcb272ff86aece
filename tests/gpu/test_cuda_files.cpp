#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "../cpp/checkpoint_file.h"
#include "core/file_view.h"
#include "core/locked_files.h"
#include "core/masters.h"
#include "cuda/cuda_device.h"
#include "cuda_fixture.h"

namespace torch_offload {
namespace {

using testing::check_cuda;
using testing::kMiB;

class CudaFilesTest : public testing::CudaDeviceTest {};

TEST_F(CudaFilesTest, KnowsTheNodeOfItsLinkOrNone) {
  const std::optional<int> node = device_->host_node();
  EXPECT_TRUE(!node || (*node >= 0 && *node < 1024)) << *node;
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

TEST_F(CudaFilesTest, CopiesFromLockedPagesOfAFile) {
  const CheckpointFile file(3 * kMiB + 100);
  const auto mapping = std::make_shared<FileMapping>(file.path());
  LockedFiles files(device_, {mapping}, LockedFiles::kNoLimit, kMiB);
  const std::vector<CopySegment> segments =
      files.cut({{mapping->data() + 40, 0, 2 * kMiB + 4096}, {mapping->data() + 3 * kMiB, 0, 64}});
  ASSERT_EQ(segments.size(), 4U);
  files.lock(segments);
  const StreamId copies = device_->create_stream({"copies", StreamRole::kCopy, -1});
  auto* const place = static_cast<std::byte*>(device_->allocate(2 * kMiB + 4096));
  for (std::size_t i = 0; i < 3; ++i) {
    device_->copy(copies,
                  {place + segments[i].offset, segments[i].source, segments[i].size_bytes, 0, 1});
  }
  device_->synchronize(copies);
  std::vector<std::byte> got(2 * kMiB + 4096);
  check_cuda(cudaMemcpy(got.data(), place, got.size(), cudaMemcpyDeviceToHost));
  EXPECT_TRUE(std::equal(got.begin(), got.end(), file.bytes().begin() + 40));
  device_->free(place);
}

TEST_F(CudaFilesTest, CopiesFromOwnPagesOfAnEditedView) {
  const CheckpointFile file(3 * kMiB);
  const auto mapping = std::make_shared<FileMapping>(file.path());
  const auto view = std::make_shared<FileView>(
      std::vector<FileBlock>{{mapping, 40, kMiB}, {mapping, 2 * kMiB + 40, kMiB / 2}});
  Masters masters(device_, {3 * kMiB / 2}, {0}, {view}, LockedFiles::kNoLimit);
  view->data()[5] ^= std::byte{1};
  const std::vector<std::byte> expected(view->data(), view->data() + view->size_bytes());
  masters.make_own(0);
  const StreamId copies = device_->create_stream({"copies", StreamRole::kCopy, -1});
  auto* const place = static_cast<std::byte*>(device_->allocate(2 * kMiB));
  for (const CopySegment& segment : masters.segments(0, 1, {0})) {
    device_->copy(copies, {place + segment.offset, segment.source, segment.size_bytes, 0, 1});
  }
  device_->synchronize(copies);
  std::vector<std::byte> got(expected.size());
  check_cuda(cudaMemcpy(got.data(), place, got.size(), cudaMemcpyDeviceToHost));
  EXPECT_EQ(got, expected);
  device_->free(place);
}

}  // namespace
}  // namespace torch_offload
