// The caller's own streams: units may be used on any, on several, and come to others halfway.

#include <gtest/gtest.h>

#include <functional>

#include "core/pipeline.h"
#include "pipeline_fixture.h"

namespace torch_offload {
namespace {

using testing::Gate;
using testing::layers_of;
using testing::plan_with_places;
using testing::Rig;

constexpr std::size_t kSlice = kAlignmentBytes;

/// Four units in two places: 0 and 2 share bytes, 1 and 3 do.
Plan two_places() {
  return plan_with_places(layers_of(2, 2, 2), {{0, 512}, {512, 1024}, {0, 512}, {512, 1024}},
                          2 * kSlice);
}

std::uint64_t waits_on(const Rig& rig, StreamId stream, EventId event) {
  std::uint64_t count = 0;
  for (const Op& op : rig.log.ops()) {
    count += op.kind == OpKind::kWait && op.stream == stream && op.event == event ? 1U : 0U;
  }
  return count;
}

/// A hit on another stream: the copy that comes next must wait for both streams' readers, though
/// there is one free event.
TEST(PipelineStreamsTest, HitOnAnotherStreamKeepsTheFirstReaderSafe) {
  Plan plan = two_places();
  plan.depth_bytes = 0;
  Rig rig(plan, {Mode::kPipeline, StreamLayout::kShared, false});
  rig.pipeline->enter();
  rig.device.set_current_stream(rig.callers[0]);
  const std::byte* place = rig.pipeline->acquire(0);
  Gate gate;
  gate.hold(rig.device, rig.callers[0]);
  rig.read(0, place);  // held, and still to come
  rig.pipeline->release(0);
  const EventId free = rig.free_event(0);
  rig.device.set_current_stream(rig.callers[1]);
  rig.use(0);
  EXPECT_EQ(rig.pipeline->stats().hits, 1U);
  EXPECT_EQ(waits_on(rig, rig.callers[1], free), 1U) << "free, recorded anew, covers both uses";
  rig.pipeline->acquire(2);  // overwrites unit 0, behind both
  rig.pipeline->release(2);
  rig.device.await([&] {
    return rig.device.blocked_on(rig.copy_stream(2)) == free || rig.device.copies_run(2) > 0;
  });
  rig.device.await([&] {
    EXPECT_EQ(rig.device.copies_run(2), 0);
    return true;
  });
  gate.open();
  rig.pipeline->leave(true);
  rig.expect_at_rest_and_right();
}

TEST(PipelineStreamsTest, CallerSwitchesStreamsBetweenUnits) {
  for (const StreamLayout layout : {StreamLayout::kShared, StreamLayout::kSplit}) {
    Rig rig(two_places(), {Mode::kPipeline, layout, false});
    rig.pipeline->enter();
    for (std::size_t i = 0; i < 40; ++i) {
      rig.device.set_current_stream(rig.callers[i % 3 == 0 ? 0 : 1]);
      rig.use(static_cast<UnitIndex>(i % 4));
    }
    rig.pipeline->leave(true);
    rig.expect_at_rest_and_right();
    for (const Op& op : rig.log.ops()) {
      if (op.kind == OpKind::kRead && layout == StreamLayout::kSplit) {
        EXPECT_NE(op.stream, rig.callers[0]);
        EXPECT_NE(op.stream, rig.callers[1]);
      }
    }
  }
}

/// A module that ends on another stream than it began on: its use ends where both have ended.
TEST(PipelineStreamsTest, CallerSwitchesStreamsInsideAUnit) {
  for (const StreamLayout layout : {StreamLayout::kShared, StreamLayout::kSplit}) {
    Rig rig(two_places(), {Mode::kPipeline, layout, false});
    rig.pipeline->enter();
    const std::byte* place = rig.pipeline->acquire(0);
    const StreamId began_on = rig.device.current_stream();
    const EventId switched = rig.device.create_event();
    rig.device.record(switched, began_on);
    rig.device.set_current_stream(rig.callers[1]);
    rig.device.wait(rig.callers[1], switched);  // as the module itself has to
    Gate gate;
    gate.hold(rig.device, rig.callers[1]);
    rig.read(0, place);
    rig.pipeline->release(0);
    const EventId free = rig.free_event(0);
    rig.pipeline->acquire(2);
    rig.pipeline->release(2);
    const StreamId copies = rig.copy_stream(2);
    rig.device.await(
        [&] { return rig.device.blocked_on(copies) == free || rig.device.copies_run(2) > 0; });
    rig.device.await([&] {
      EXPECT_EQ(rig.device.copies_run(2), 0) << "the copy did not wait for the second stream";
      return true;
    });
    gate.open();
    rig.pipeline->leave(true);
    rig.expect_at_rest_and_right();
  }
}

TEST(PipelineStreamsTest, NestedUseOnAnotherStreamWaitsForTheCopyToo) {
  Rig rig(two_places(), {Mode::kPipeline, StreamLayout::kShared, false});
  Gate gate;
  gate.hold(rig.device, rig.copy_stream(0));
  rig.pipeline->enter();
  rig.pipeline->acquire(0);
  rig.device.set_current_stream(rig.callers[1]);
  rig.read(0, rig.pipeline->acquire(0));
  const EventId ready = rig.ready_event(0);
  rig.device.await(
      [&] { return rig.device.blocked_on(rig.callers[1]) == ready || rig.reads_run[0] > 0; });
  gate.open();
  rig.pipeline->release(0);
  rig.device.set_current_stream(rig.callers[0]);
  rig.pipeline->release(0);
  rig.pipeline->leave(true);
  rig.expect_at_rest_and_right();
}

/// A unit that calls itself on another stream, and comes back to the first before the call ends.
TEST(PipelineStreamsTest, NestedUseThatEndsOnAnotherStreamThanItBeganOnIsWaitedFor) {
  for (const bool comes_back : {false, true}) {
    Rig rig(two_places(), {Mode::kPipeline, StreamLayout::kShared, false});
    rig.pipeline->enter();
    const std::byte* place = rig.pipeline->acquire(0);
    rig.device.set_current_stream(rig.callers[1]);
    rig.pipeline->acquire(0);
    Gate gate;
    gate.hold(rig.device, rig.callers[1]);
    rig.read(0, place);
    if (comes_back) {
      rig.device.set_current_stream(rig.callers[0]);
    }
    rig.pipeline->release(0);
    rig.device.set_current_stream(rig.callers[0]);
    rig.pipeline->release(0);
    const EventId free = rig.free_event(0);
    rig.pipeline->acquire(2);
    rig.pipeline->release(2);
    const StreamId copies = rig.copy_stream(2);
    rig.device.await(
        [&] { return rig.device.blocked_on(copies) == free || rig.device.copies_run(2) > 0; });
    rig.device.await([&] {
      EXPECT_EQ(rig.device.copies_run(2), 0) << "the copy did not wait for the second stream";
      return true;
    });
    gate.open();
    rig.pipeline->leave(true);
    rig.expect_at_rest_and_right();
  }
}

}  // namespace
}  // namespace torch_offload
