#include <gtest/gtest.h>

#include <array>

#include "core/op_log.h"

namespace torch_offload {
namespace {

TEST(OpLogTest, KeepsOpsInTheOrderOfSubmission) {
  OpLog log;
  for (const EventId event : {3U, 1U, 2U}) {
    Op op;
    op.event = event;
    log.append(op);
  }
  ASSERT_EQ(log.ops().size(), 3U);
  EXPECT_EQ(log.ops()[0].event, 3U);
  EXPECT_EQ(log.ops()[1].event, 1U);
  EXPECT_EQ(log.ops()[2].event, 2U);
  log.clear();
  EXPECT_TRUE(log.ops().empty());
}

TEST(OpLogTest, FieldsThatDoNotApplySaySo) {
  const Op op;
  EXPECT_EQ(op.stream, kNoStream);
  EXPECT_EQ(op.event, kNoEvent);
  EXPECT_EQ(op.unit, kNoUnit);
  EXPECT_EQ(op.memory.size_bytes(), 0U);
  EXPECT_EQ(op.source.size_bytes(), 0U);
}

TEST(AddressRangeTest, CoversExactlyTheBytesGiven) {
  const std::array<char, 16> bytes{};
  const AddressRange range = AddressRange::of(bytes.data(), bytes.size());
  EXPECT_EQ(range.begin, reinterpret_cast<std::uintptr_t>(bytes.data()));
  EXPECT_EQ(range.size_bytes(), bytes.size());
}

}  // namespace
}  // namespace torch_offload
