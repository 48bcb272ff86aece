#include <gtest/gtest.h>

#include "core/unit.h"

namespace torch_offload {
namespace {

TEST(UnitTest, AlignedSizeRoundsUpToWholeSlices) {
  EXPECT_EQ(aligned_size(0), 0U);
  EXPECT_EQ(aligned_size(1), kAlignmentBytes);
  EXPECT_EQ(aligned_size(kAlignmentBytes), kAlignmentBytes);
  EXPECT_EQ(aligned_size(kAlignmentBytes + 1), 2 * kAlignmentBytes);
}

TEST(ByteRangeTest, NeighboursDoNotOverlap) {
  const ByteRange range{256, 512};
  EXPECT_EQ(range.size_bytes(), 256U);
  EXPECT_FALSE(range.overlaps({0, 256}));
  EXPECT_FALSE(range.overlaps({512, 768}));
  EXPECT_TRUE(range.overlaps({0, 257}));
  EXPECT_TRUE(range.overlaps({511, 768}));
  EXPECT_TRUE(range.overlaps({300, 301}));
  EXPECT_TRUE(range.overlaps({0, 768}));
  EXPECT_TRUE(range.overlaps(range));
}

TEST(ByteRangeTest, EmptyRangeOutsideOverlapsNothing) {
  EXPECT_FALSE((ByteRange{256, 512}.overlaps({512, 512})));
  EXPECT_FALSE((ByteRange{256, 512}.overlaps({256, 256})));
}

}  // namespace
}  // namespace torch_offload
