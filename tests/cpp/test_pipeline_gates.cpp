// Order, proved by gates: a stream is held, what depends on it is seen to stand still, the gate is
// opened, the bytes are checked. Each proof is run a second time with its wait left out, and must
// then see the fault: a proof that cannot fail is none.

#include <gtest/gtest.h>

#include <tuple>

#include "core/pipeline.h"
#include "pipeline_fixture.h"

namespace torch_offload {
namespace {

using testing::Gate;
using testing::layers_of;
using testing::plan_of;
using testing::plan_with_places;
using testing::Rig;

constexpr std::size_t kSlice = kAlignmentBytes;

/// Two units of each kind; the second of a kind lies where the first does.
Plan two_places() {
  return plan_with_places(layers_of(2, 2, 2), {{0, 512}, {512, 1024}, {0, 512}, {512, 1024}},
                          2 * kSlice);
}

class PipelineGateTest : public ::testing::TestWithParam<std::tuple<Mode, StreamLayout>> {
 protected:
  Rig rig_{two_places(), {std::get<0>(GetParam()), std::get<1>(GetParam()), false}};

  StreamId compute_stream(UnitIndex unit) const {
    for (const Op& op : rig_.log.ops()) {
      if (op.kind == OpKind::kRead && op.unit == unit) {
        return op.stream;
      }
    }
    return kNoStream;
  }

  /// Whether the reader of unit 0 stands still behind the held copy of unit 0.
  bool reader_waits_for_held_copy() {
    Gate gate;
    gate.hold(rig_.device, rig_.copy_stream(0));
    rig_.pipeline->enter();
    rig_.use(0);
    bool waits = false;
    const StreamId reader = compute_stream(0);
    rig_.device.await([&] {
      waits = rig_.device.blocked_on(reader) == rig_.ready_event(0) && rig_.reads_run[0] == 0;
      return waits || rig_.reads_run[0] > 0;
    });
    gate.open();
    rig_.pipeline->leave(true);
    rig_.drain();
    return waits;
  }

  /// Whether the copy into the place of unit 0 stands still behind the held reader of unit 0.
  bool copy_waits_for_held_reader() {
    constexpr UnitIndex kNext = 2;  // lies where unit 0 does
    rig_.pipeline->enter();
    const std::byte* place = rig_.pipeline->acquire(0);
    Gate gate;
    gate.hold(rig_.device, rig_.device.current_stream());
    rig_.read(0, place);
    rig_.pipeline->release(0);
    const EventId free = rig_.free_event(0);
    // Not `use`: its reader would wait behind the gate. The copy is what must be submitted.
    rig_.pipeline->acquire(kNext);
    rig_.pipeline->release(kNext);
    // In `events` it waits for its layer to begin, which is behind that reader as well.
    const bool waits_for_layer = std::get<0>(GetParam()) == Mode::kEvents;
    bool waits = false;
    rig_.device.await([&] {
      const EventId blocked_on = rig_.device.blocked_on(rig_.copy_stream(kNext));
      waits = (waits_for_layer ? blocked_on != kNoEvent : blocked_on == free) &&
              rig_.device.copies_run(kNext) == 0;
      return waits || rig_.device.copies_run(kNext) > 0;
    });
    gate.open();
    rig_.pipeline->leave(true);
    rig_.drain();
    return waits;
  }

  bool copy_on(StreamId stream) const {
    return stream == rig_.copy_stream(0) || stream == rig_.copy_stream(1);
  }
};

TEST_P(PipelineGateTest, ReaderStandsStillUntilTheCopyIsDone) {
  EXPECT_TRUE(reader_waits_for_held_copy());
  rig_.expect_at_rest_and_right();
}

TEST_P(PipelineGateTest, WithoutTheReadyWaitTheReaderIsSeenToReadWrongBytes) {
  rig_.device.forgets_wait = [&](StreamId stream, EventId) {
    return !copy_on(stream) && stream != rig_.callers[0];
  };
  if (std::get<1>(GetParam()) == StreamLayout::kShared) {
    rig_.device.forgets_wait = [&](StreamId stream, EventId) { return !copy_on(stream); };
  }
  EXPECT_FALSE(reader_waits_for_held_copy());
  rig_.device.await([] { return true; });
  EXPECT_EQ(rig_.wrong_reads, 1);
}

TEST_P(PipelineGateTest, CopyStandsStillUntilTheLastReaderIsDone) {
  EXPECT_TRUE(copy_waits_for_held_reader());
  rig_.expect_at_rest_and_right();
}

TEST_P(PipelineGateTest, WithoutTheFreeWaitTheReaderIsSeenToReadWrongBytes) {
  rig_.device.forgets_wait = [&](StreamId stream, EventId) { return copy_on(stream); };
  EXPECT_FALSE(copy_waits_for_held_reader());
  rig_.device.await([] { return true; });
  EXPECT_EQ(rig_.wrong_reads, 1);
}

INSTANTIATE_TEST_SUITE_P(Modes, PipelineGateTest,
                         ::testing::Combine(::testing::Values(Mode::kEvents, Mode::kPipeline),
                                            ::testing::Values(StreamLayout::kShared,
                                                              StreamLayout::kSplit)),
                         [](const auto& info) {
                           return std::string(name_of(std::get<0>(info.param))) + "_" +
                                  name_of(std::get<1>(info.param));
                         });

/// `split`: the FFN reads what attention wrote, so one stream waits for the other.
TEST(PipelineSplitTest, EachComputeStreamWaitsForTheOneLeft) {
  Rig rig(two_places(), {Mode::kPipeline, StreamLayout::kSplit, false});
  rig.pipeline->enter();
  const std::byte* place = rig.pipeline->acquire(0);
  Gate gate;
  gate.hold(rig.device, rig.device.current_stream());
  rig.read(0, place);
  rig.pipeline->release(0);
  rig.use(1);
  const StreamId caller = rig.device.current_stream();
  EXPECT_EQ(caller, rig.callers[0]) << "the caller's stream is current again after each unit";
  bool both_were_done = false;
  rig.device.run(caller, [&] {
    rig.device.step([&] { both_were_done = rig.reads_run[0] == 1 && rig.reads_run[1] == 1; });
  });
  // The FFN's stream first waits for the one left, and that for attention.
  StreamId ffn_stream = kNoStream;
  EventId left = kNoEvent;
  for (const Op& op : rig.log.ops()) {
    if (op.kind == OpKind::kRead && op.unit == 1) {
      ffn_stream = op.stream;
    }
  }
  for (const Op& op : rig.log.ops()) {
    if (op.kind == OpKind::kWait && op.stream == ffn_stream && left == kNoEvent) {
      left = op.event;
    }
  }
  rig.device.await(
      [&] { return rig.device.blocked_on(ffn_stream) == left || rig.reads_run[1] > 0; });
  EXPECT_EQ(rig.reads_run[1], 0) << "the FFN ran before attention was done";
  gate.open();
  rig.pipeline->leave(true);
  rig.expect_at_rest_and_right();
  EXPECT_TRUE(both_were_done) << "the caller's later kernels read what both halves wrote";
}

/// The host is never held: with every stream standing still, a whole forward is submitted.
TEST(PipelineHostTest, ForwardIsSubmittedWhileEveryStreamStandsStill) {
  for (const StreamLayout layout : {StreamLayout::kShared, StreamLayout::kSplit}) {
    Rig rig(plan_of(layers_of(6, 1, 2)), {Mode::kPipeline, layout, false});
    Gate gate;
    for (const StreamId stream : rig.pipeline->streams()) {
      gate.hold(rig.device, stream);
    }
    gate.hold(rig.device, rig.callers[0]);
    const DeviceCounters before = rig.device.counters();
    rig.pass(testing::sequence_of(12));
    rig.pass(testing::sequence_of(12));
    EXPECT_EQ(rig.device.counters().host_synchronizes, before.host_synchronizes);
    EXPECT_EQ(rig.device.counters().caller_waits, before.caller_waits);
    EXPECT_EQ(rig.device.counters().allocations, before.allocations);
    rig.device.await([&] {
      EXPECT_TRUE(rig.reads_run.empty());
      return true;
    });
    gate.open();
    rig.expect_at_rest_and_right();
  }
}

TEST(PipelineDestructorTest, DrainsCopiesAndReadersInFlight) {
  for (const StreamLayout layout : {StreamLayout::kShared, StreamLayout::kSplit}) {
    Rig rig(plan_of(layers_of(4, 1, 2)), {Mode::kPipeline, layout, false});
    Gate gate;
    gate.hold(rig.device, rig.copy_stream(0));
    rig.pass(testing::sequence_of(8));
    rig.device.await([&] {
      EXPECT_TRUE(rig.reads_run.empty()) << "the first reader is held, and all behind it";
      return true;
    });
    std::thread opener([&] { gate.open(); });
    rig.pipeline.reset();
    opener.join();
    rig.device.await([] { return true; });
    int reads = 0;
    for (const auto& [unit, count] : rig.reads_run) {
      reads += count;
    }
    EXPECT_EQ(reads, 8) << "the window went before its readers were done";
    EXPECT_EQ(rig.wrong_reads, 0);
    EXPECT_EQ(rig.device.counters().allocated_bytes, 0U);
  }
}

}  // namespace
}  // namespace torch_offload
