#include <gtest/gtest.h>

#include <array>
#include <set>
#include <string>
#include <vector>

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

TEST(OpLogTest, MarksBecomeTimesWhenTheyAreResolved) {
  OpLog log;
  Op op;
  op.host_time_ns = 100;
  log.append(op);
  log.append(op, {0, 2});
  log.append(op, {1, 1});
  log.append(op, {kNoMark, 2});
  EXPECT_FALSE(log.has_times());
  EXPECT_EQ(log.ops()[1].begin_ns, kUnknownTime);
  log.resolve({150, 90, 300});
  EXPECT_TRUE(log.has_times());
  EXPECT_EQ(log.ops()[0].begin_ns, kUnknownTime);
  EXPECT_EQ(log.ops()[1].begin_ns, 150);
  EXPECT_EQ(log.ops()[1].end_ns, 300);
  EXPECT_EQ(log.ops()[2].begin_ns, 100) << "nothing begins before the host has made the call";
  EXPECT_EQ(log.ops()[2].end_ns, 100);
  EXPECT_EQ(log.ops()[3].begin_ns, kUnknownTime);
  EXPECT_EQ(log.ops()[3].end_ns, 300);
  log.resolve({});  // nothing is left to resolve
  EXPECT_EQ(log.ops()[1].end_ns, 300);
}

TEST(OpLogTest, ClearForgetsOpsAndMarksButNoNames) {
  OpLog log;
  log.set_stream_names({"caller"});
  log.set_unit_names({"layers.0"});
  log.append(Op(), {0, 0});
  log.clear();
  log.append(Op());
  log.resolve({5});
  EXPECT_EQ(log.ops()[0].begin_ns, kUnknownTime);
  log.clear();
  EXPECT_FALSE(log.has_times());
  EXPECT_EQ(log.stream_names(), std::vector<std::string>{"caller"});
  EXPECT_EQ(log.unit_names(), std::vector<std::string>{"layers.0"});
}

TEST(OpLogTest, EveryKindHasANameOfItsOwn) {
  std::set<std::string> names;
  for (auto kind = static_cast<int>(OpKind::kCopy); kind <= static_cast<int>(OpKind::kHostWrite);
       ++kind) {
    EXPECT_TRUE(names.insert(name_of(static_cast<OpKind>(kind))).second);
  }
  EXPECT_EQ(names.count("?"), 0U);
  EXPECT_EQ(names.count("read_end"), 1U);
}

TEST(AddressRangeTest, CoversExactlyTheBytesGiven) {
  const std::array<char, 16> bytes{};
  const AddressRange range = AddressRange::of(bytes.data(), bytes.size());
  EXPECT_EQ(range.begin, reinterpret_cast<std::uintptr_t>(bytes.data()));
  EXPECT_EQ(range.size_bytes(), bytes.size());
}

/// An event whose record was cleared away was recorded nevertheless.
TEST(OpLogTest, ClearingRemembersWhichEventsWereRecorded) {
  OpLog log;
  log.clear();
  EXPECT_TRUE(log.beginnings().empty());
  log.begin({true});
  for (const OpKind kind : {OpKind::kRecord, OpKind::kWait}) {
    Op op;
    op.kind = kind;
    op.event = kind == OpKind::kRecord ? 2 : 3;
    log.append(op);
  }
  ASSERT_EQ(log.beginnings().size(), 1U);
  EXPECT_EQ(log.beginnings()[0].recorded, (std::vector<bool>{true}));
  log.clear();
  ASSERT_EQ(log.beginnings().size(), 1U);
  EXPECT_EQ(log.beginnings()[0].op_index, 0U);
  EXPECT_EQ(log.beginnings()[0].recorded, (std::vector<bool>{true, false, true}));
}

}  // namespace
}  // namespace torch_offload
