// What a caller sees of the pipeline: hits, nesting, edits, refusals.

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <thread>
#include <vector>

#include "core/error.h"
#include "core/pipeline.h"
#include "pipeline_fixture.h"

namespace torch_offload {
namespace {

using testing::Gate;
using testing::InjectedFault;
using testing::layers_of;
using testing::plan_of;
using testing::plan_with_places;
using testing::Rig;
using testing::sequence_of;

constexpr std::size_t kSlice = kAlignmentBytes;

/// Four units in two places: 0 and 2 share bytes, 1 and 3 do.
Plan two_places() {
  return plan_with_places(layers_of(2, 2, 2), {{0, 512}, {512, 1024}, {0, 512}, {512, 1024}},
                          2 * kSlice);
}

TEST(PipelineTest, PlacesLieInTheWindowWhereThePlanSays) {
  const Plan plan = plan_of(layers_of(3, 1, 2));
  Rig rig(plan);
  EXPECT_EQ(rig.pipeline->window().size_bytes(), plan.window_bytes);
  rig.pipeline->enter();
  for (UnitIndex unit = 0; unit < plan.units.size(); ++unit) {
    const auto place = reinterpret_cast<std::uintptr_t>(rig.pipeline->acquire(unit));
    EXPECT_EQ(place, rig.pipeline->window().begin + plan.places[unit]->begin);
    EXPECT_EQ(place % kAlignmentBytes, 0U);
    rig.pipeline->release(unit);
  }
  rig.pipeline->leave(true);
}

TEST(PipelineTest, UnitStillWholeIsAHitAndNotCopied) {
  Rig rig(plan_of(layers_of(2, 1, 1), 100 * kSlice));  // everything fits
  for (int pass = 0; pass < 3; ++pass) {
    rig.pass(sequence_of(4));
  }
  rig.expect_at_rest_and_right();
  EXPECT_EQ(rig.pipeline->stats().onloads, 4U);
  EXPECT_EQ(rig.pipeline->stats().hits, 8U);
  EXPECT_EQ(rig.pipeline->stats().misses, 1U);
  EXPECT_EQ(rig.pipeline->unit_stats(2).acquired, 3U);
  EXPECT_EQ(rig.pipeline->unit_stats(2).onloads, 1U);
  EXPECT_EQ(rig.pipeline->unit_stats(2).misses, 0U);
  EXPECT_EQ(rig.pipeline->unit_stats(0).misses, 1U);
}

TEST(PipelineTest, CopiedBeforeThisPassIsToldApart) {
  Rig rig(plan_of(layers_of(3, 1, 1)));
  rig.pass(sequence_of(6));
  EXPECT_TRUE(rig.pipeline->is_whole(0)) << "the wrap-around prefetch";
  rig.pipeline->enter();
  EXPECT_TRUE(rig.pipeline->copied_before_this_pass(0));
  EXPECT_TRUE(rig.pipeline->copied_before_this_pass(1));
  rig.use(0);
  rig.use(1);
  rig.use(2);
  EXPECT_TRUE(rig.pipeline->is_whole(3));
  EXPECT_FALSE(rig.pipeline->copied_before_this_pass(3));
  rig.pipeline->leave(false);
  rig.expect_at_rest_and_right();
}

TEST(PipelineTest, NestedUseOfTheSameUnitIsCountedAndHeldUntilTheLastRelease) {
  for (const StreamLayout layout : {StreamLayout::kShared, StreamLayout::kSplit}) {
    Rig rig(two_places(), {Mode::kPipeline, layout, false});
    rig.pipeline->enter();
    const std::byte* outer = rig.pipeline->acquire(0);
    const std::byte* inner = rig.pipeline->acquire(0);
    EXPECT_EQ(outer, inner);
    rig.read(0, inner);
    rig.pipeline->release(0);
    EXPECT_TRUE(rig.pipeline->is_acquired(0));
    rig.read(0, outer);
    rig.pipeline->release(0);
    EXPECT_FALSE(rig.pipeline->is_acquired(0));
    rig.pipeline->leave(true);
    rig.expect_at_rest_and_right();
    EXPECT_EQ(rig.pipeline->stats().onloads, 1U + rig.pipeline->stats().prefetched);
    EXPECT_EQ(rig.pipeline->stats().misses, 1U);
  }
}

TEST(PipelineTest, ReleaseWithoutAcquireThrows) {
  Rig rig(two_places());
  rig.pipeline->enter();
  EXPECT_THROW(rig.pipeline->release(0), InternalError);
  rig.use(0);
  EXPECT_THROW(rig.pipeline->release(0), InternalError);
  rig.pipeline->leave(true);
  EXPECT_THROW(rig.pipeline->leave(true), InternalError);
}

/// Called inside a unit that it shares bytes with: it gets a place of its own, once.
TEST(PipelineTest, NestedOverlappingUnitGetsAPlaceOfItsOwn) {
  for (const Mode mode : {Mode::kSync, Mode::kStreams, Mode::kEvents, Mode::kPipeline}) {
    for (const StreamLayout layout : {StreamLayout::kShared, StreamLayout::kSplit}) {
      if (mode == Mode::kSync && layout == StreamLayout::kSplit) {
        continue;
      }
      Rig rig(two_places(), {mode, layout, false});
      for (int pass = 0; pass < 3; ++pass) {
        rig.pipeline->enter();
        rig.use(2);
        rig.use(0);
        const std::byte* outer = rig.pipeline->acquire(0);
        const std::byte* inner = rig.pipeline->acquire(2);
        rig.read(2, inner);
        rig.read(0, outer);
        rig.pipeline->release(2);
        rig.read(0, outer);
        rig.pipeline->release(0);
        rig.use(1);
        rig.use(2);
        rig.pipeline->leave(true);
        EXPECT_FALSE(rig.pipeline->window().begin <= reinterpret_cast<std::uintptr_t>(inner) &&
                     reinterpret_cast<std::uintptr_t>(inner) < rig.pipeline->window().end);
      }
      rig.expect_at_rest_and_right();
      EXPECT_EQ(rig.pipeline->stats().extra_places, 1U);
      if (mode != Mode::kPipeline) {  // which may have copied them ahead in vain
        EXPECT_EQ(rig.pipeline->unit_stats(2).onloads, 2U) << "once into each of its places";
        EXPECT_EQ(rig.pipeline->unit_stats(0).onloads, 1U) << "nobody shares its bytes any more";
      }
      EXPECT_EQ(rig.device.counters().allocations, 2U)
          << "the window and one place, not one a pass";
      rig.pipeline.reset();
      EXPECT_EQ(rig.device.counters().allocated_bytes, 0U);
    }
  }
}

TEST(PipelineTest, EditedMasterIsCopiedAfreshAfterInvalidate) {
  Rig rig(plan_of(layers_of(2, 1, 2), 100 * kSlice));
  rig.pass(sequence_of(4));
  for (UnitIndex unit = 0; unit < 4; ++unit) {
    rig.pipeline->synchronize_onload(unit);
    rig.masters.edit(unit);
    rig.pipeline->invalidate(unit);
    EXPECT_FALSE(rig.pipeline->is_whole(unit));
    rig.pass(sequence_of(4));
  }
  rig.expect_at_rest_and_right();
  EXPECT_EQ(rig.pipeline->stats().onloads, 8U);
}

/// Without `invalidate` the old bytes are used: what makes the test above a test.
TEST(PipelineTest, EditedMasterWithoutInvalidateIsNotSeen) {
  Rig rig(plan_of(layers_of(2, 1, 2), 100 * kSlice));
  rig.pass(sequence_of(4));
  rig.drain();
  rig.masters.edit(1);
  rig.pass(sequence_of(4));
  rig.drain();
  rig.device.await([] { return true; });
  EXPECT_EQ(rig.wrong_reads, 1);
}

TEST(PipelineTest, InvalidateInsideAPassIsRefusedOnlyWhileTheUnitIsInUse) {
  Rig rig(plan_of(layers_of(3, 1, 2)));
  rig.pass(sequence_of(6));
  rig.pipeline->enter();
  const std::byte* place = rig.pipeline->acquire(0);
  try {
    rig.pipeline->invalidate(0);
    FAIL() << "an edit under a reader was accepted";
  } catch (const StateError& error) {
    EXPECT_NE(std::string(error.what()).find("layers.0.mha"), std::string::npos) << error.what();
  }
  rig.read(0, place);
  ASSERT_TRUE(rig.pipeline->is_whole(1)) << "prefetched";
  rig.pipeline->synchronize_onload(1);
  rig.masters.edit(1);
  rig.pipeline->invalidate(1);  // prefetched, not in use
  rig.pipeline->release(0);
  rig.use(1);
  rig.pipeline->leave(true);
  rig.expect_at_rest_and_right();
}

TEST(PipelineTest, AcquireOutsideAPassOrOfAResidentUnitIsRefused) {
  PlanRequest request;
  request.units = layers_of(4, 2, 2);
  request.resident = {false, false, true, true, false, false, false, false};
  const Plan plan = make_plan(request);
  UnitIndex resident = 0;
  while (!plan.is_resident(resident)) {
    ++resident;
    ASSERT_LT(resident, plan.units.size());
  }
  Rig rig(plan);
  EXPECT_THROW(rig.pipeline->acquire(resident == 0 ? 1 : 0), StateError);
  rig.pipeline->enter();
  EXPECT_THROW(rig.pipeline->acquire(resident), StateError);
  std::vector<UnitIndex> streamed;
  for (UnitIndex unit = 0; unit < plan.units.size(); ++unit) {
    if (!plan.is_resident(unit)) {
      streamed.push_back(unit);
      rig.use(unit);
    }
  }
  rig.pipeline->leave(true);
  rig.pass(streamed);
  rig.expect_at_rest_and_right();
  EXPECT_EQ(rig.pipeline->stats().misses, 1U);
}

TEST(PipelineTest, SecondThreadIsRefusedAndTheFirstUnharmed) {
  Rig rig(plan_of(layers_of(3, 1, 2)));
  rig.pipeline->enter();
  const std::byte* place = rig.pipeline->acquire(0);
  int refused = 0;
  std::thread([&] {
    EXPECT_FALSE(rig.pipeline->is_mine());
    for (const auto& call : std::vector<std::function<void()>>{[&] { rig.pipeline->enter(); },
                                                               [&] { rig.pipeline->acquire(0); },
                                                               [&] { rig.pipeline->acquire(1); }}) {
      try {
        call();
      } catch (const StateError&) {
        ++refused;
      }
    }
    EXPECT_THROW(rig.pipeline->leave(true), InternalError);
  }).join();
  EXPECT_EQ(refused, 3);
  EXPECT_TRUE(rig.pipeline->in_pass());
  EXPECT_TRUE(rig.pipeline->is_acquired(0));
  rig.read(0, place);
  rig.pipeline->release(0);
  rig.use(1);
  rig.pipeline->leave(true);
  // Between passes the second thread is welcome.
  std::thread([&] {
    EXPECT_TRUE(rig.pipeline->is_mine());
    rig.pass(sequence_of(6));
  }).join();
  rig.expect_at_rest_and_right();
  EXPECT_EQ(rig.pipeline->stats().forwards, 2U);
}

TEST(PipelineTest, NestedEntersAreOnePass) {
  Rig rig(plan_of(layers_of(2, 1, 2)));
  rig.pipeline->enter();
  rig.pipeline->enter();
  rig.use(0);
  rig.pipeline->leave(true);
  EXPECT_TRUE(rig.pipeline->in_pass());
  EXPECT_EQ(rig.pipeline->stats().forwards, 0U);
  rig.use(1);
  rig.pipeline->leave(true);
  EXPECT_FALSE(rig.pipeline->in_pass());
  EXPECT_EQ(rig.pipeline->stats().forwards, 1U);
}

TEST(PipelineTest, AbortedPassesCountNothingAndCostAtMostOneMiss) {
  const std::vector<UnitIndex> sequence = sequence_of(10);
  Rig rig(plan_of(layers_of(5, 1, 2)));
  rig.pass(sequence);
  for (std::size_t length = 0; length <= sequence.size(); ++length) {
    rig.pipeline->enter();
    for (std::size_t i = 0; i < length; ++i) {
      rig.use(sequence[i]);
    }
    rig.pipeline->leave(false);
    const std::uint64_t misses = rig.pipeline->stats().misses;
    rig.pass(sequence);
    EXPECT_LE(rig.pipeline->stats().misses - misses, 1U) << "aborted after " << length;
    rig.pass(sequence);
    EXPECT_LE(rig.pipeline->stats().misses - misses, 1U) << "aborted after " << length;
  }
  rig.expect_at_rest_and_right();
  EXPECT_EQ(rig.pipeline->stats().forwards, 1U + 2U * 11U);
}

/// What was copied ahead of an early exit stands in nobody's way afterwards.
TEST(PipelineTest, EarlyExitCostsAtMostOneMiss) {
  Rig rig(plan_of(layers_of(8, 1, 2)));
  rig.pass(sequence_of(16));
  const std::vector<UnitIndex> early{0, 1, 2, 3, 4};
  rig.pass(early);
  const std::uint64_t misses = rig.pipeline->stats().misses;
  rig.pass(early);
  EXPECT_LE(rig.pipeline->stats().misses, misses + 1);
  rig.pass(early);
  rig.pass(early);
  EXPECT_LE(rig.pipeline->stats().misses, misses + 1);
  rig.expect_at_rest_and_right();
}

TEST(PipelineTest, EncoderAndDecoderPassesThatRepeatHaveNoMiss) {
  Rig rig(plan_of(layers_of(8, 1, 2)));
  const std::vector<UnitIndex> encoder{0, 1, 2, 3, 4, 5};
  const std::vector<UnitIndex> decoder{6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int round = 0; round < 4; ++round) {
    rig.pass(encoder);
    for (int pass = 0; pass < 5; ++pass) {
      const std::uint64_t misses = rig.pipeline->stats().misses;
      rig.pass(decoder);
      if (round > 0 && pass > 0) {
        EXPECT_EQ(rig.pipeline->stats().misses, misses) << "round " << round << ", pass " << pass;
      }
    }
  }
  rig.expect_at_rest_and_right();
}

TEST(PipelineTest, WithoutStreamedUnitsAPassIsEmpty) {
  for (const StreamLayout layout : {StreamLayout::kShared, StreamLayout::kSplit}) {
    PlanRequest request;
    request.units = layers_of(2, 1, 2);
    request.resident.assign(request.units.size(), true);
    for (const Plan& plan : {plan_of({}), make_plan(request)}) {
      Rig rig(plan, {Mode::kPipeline, layout, false});
      rig.pass({});
      rig.pass({});
      rig.expect_at_rest_and_right();
      EXPECT_EQ(rig.pipeline->stats().onloads, 0U);
      EXPECT_EQ(rig.device.counters().allocations, 0U);
      EXPECT_EQ(rig.pipeline->window().size_bytes(), 0U);
    }
  }
}

TEST(PipelineTest, OneUnitIsCopiedOnce) {
  Rig rig(plan_of({layers_of(1, 3, 1)[0]}));
  for (int pass = 0; pass < 3; ++pass) {
    rig.pass({0});
    rig.pass({0, 0});
  }
  rig.expect_at_rest_and_right();
  EXPECT_EQ(rig.pipeline->stats().onloads, 1U);
}

/// A guess that goes wrong in the middle must not leave a copy that nobody waits for.
TEST(PipelineTest, PrefetchedUnitThatIsSkippedIsOverwrittenInOrder) {
  for (const StreamLayout layout : {StreamLayout::kShared, StreamLayout::kSplit}) {
    Rig rig(two_places(), {Mode::kPipeline, layout, false});
    rig.pass({0, 1, 2, 3});
    Gate gate;
    gate.hold(rig.device, rig.copy_stream(0));
    rig.pass({1, 3, 2, 0});
    rig.pass({3, 0, 1, 2});
    gate.open();
    rig.expect_at_rest_and_right();
  }
}

Plan with_window(Plan plan, std::size_t window_bytes) {
  plan.window_bytes = window_bytes;
  return plan;
}

TEST(PipelineTest, ReplanStartsAnewInTheSameWindowAndKeepsTheCounts) {
  for (const StreamLayout layout : {StreamLayout::kShared, StreamLayout::kSplit}) {
    const std::vector<Unit> units = layers_of(3, 1, 2);
    const Plan first = plan_of(units);
    Rig rig(first, {Mode::kPipeline, layout, false});
    rig.pass(sequence_of(6));
    rig.pass(sequence_of(6));
    const Stats before = rig.pipeline->stats();
    const AddressRange window = rig.pipeline->window();
    const std::uint64_t allocations = rig.device.counters().allocations;
    // Copies and readers of the old plan are still under way when it is asked for.
    Plan other = plan_with_places(
        units, {{0, 256}, {0, 512}, {512, 768}, {0, 512}, {512, 768}, {0, 512}}, 512);
    rig.pipeline->replan(with_window(other, first.window_bytes));
    for (UnitIndex unit = 0; unit < units.size(); ++unit) {
      EXPECT_FALSE(rig.pipeline->is_whole(unit));
      EXPECT_EQ(rig.pipeline->unit_stats(unit).onloads, 0U);
    }
    EXPECT_EQ(rig.pipeline->window().begin, window.begin);
    EXPECT_EQ(rig.pipeline->window_bytes(), first.window_bytes);
    EXPECT_EQ(rig.device.counters().allocations, allocations);
    for (int pass = 0; pass < 3; ++pass) {
      rig.pass({0, 1, 2, 3, 4, 5});
    }
    EXPECT_GE(rig.pipeline->stats().onloads, before.onloads + 15U);
    EXPECT_EQ(rig.pipeline->stats().forwards, before.forwards + 3U);
    EXPECT_EQ(rig.pipeline->stats().misses, before.misses + 1U);
    rig.expect_at_rest_and_right();
  }
}

TEST(PipelineTest, ReplanThatCannotBeLeavesThePipelineAsItWas) {
  const Plan plan = plan_of(layers_of(3, 1, 2));
  Rig rig(plan);
  rig.pass(sequence_of(6));
  rig.pipeline->enter();
  EXPECT_THROW(rig.pipeline->replan(plan), StateError);
  rig.pipeline->leave(true);
  std::vector<Unit> more = layers_of(4, 1, 2);
  const Plan larger = plan_with_places(more, std::vector<ByteRange>(8, {0, 512}), 0);
  rig.device.fail_at(2);  // of the events that two more units need
  EXPECT_THROW(rig.pipeline->replan(with_window(larger, plan.window_bytes)), InjectedFault);
  EXPECT_EQ(rig.pipeline->plan().units.size(), 6U);
  rig.pass(sequence_of(6));
  rig.expect_at_rest_and_right();
}

TEST(PipelineTest, ReplanGivesTheWindowAnotherSize) {
  for (const StreamLayout layout : {StreamLayout::kShared, StreamLayout::kSplit}) {
    const std::vector<Unit> units = layers_of(4, 1, 2);
    Rig rig(plan_of(units), {Mode::kPipeline, layout, false});
    rig.pass(sequence_of(8));
    for (const std::size_t depth : {std::size_t{0}, 4 * kSlice, 2 * kSlice, 100 * kSlice}) {
      const Plan other = plan_of(units, depth);
      rig.pipeline->replan(other);
      EXPECT_EQ(rig.pipeline->window_bytes(), other.window_bytes);
      EXPECT_EQ(rig.device.counters().allocated_bytes, other.window_bytes);
      rig.pass(sequence_of(8));
      rig.pass(sequence_of(8));
    }
    PlanRequest everything;
    everything.units = units;
    everything.resident.assign(units.size(), true);
    rig.pipeline->replan(make_plan(everything));
    EXPECT_EQ(rig.device.counters().allocated_bytes, 0U);
    rig.pass({});
    rig.pipeline->replan(plan_of(units));
    rig.pass(sequence_of(8));
    rig.expect_at_rest_and_right();
  }
}

TEST(PipelineTest, ReplanThatFailsAnywhereLeavesThePipelineAsItWas) {
  const std::vector<Unit> units = layers_of(3, 1, 2);
  const Plan plan = plan_of(units);
  const Plan larger = plan_of(layers_of(4, 1, 2), 100 * kSlice);
  int num_failed = 0;
  for (int at = 1; at <= 12; ++at) {
    Rig rig(plan);
    rig.pass(sequence_of(6));
    rig.device.fail_at(at);
    try {
      rig.pipeline->replan(larger);
    } catch (const InjectedFault&) {
      ++num_failed;
      rig.device.fail_at(0);
      EXPECT_EQ(rig.pipeline->plan().units.size(), 6U);
      EXPECT_EQ(rig.pipeline->window_bytes(), plan.window_bytes);
      rig.pass(sequence_of(6));
      rig.pass(sequence_of(6));
      rig.expect_at_rest_and_right();
    }
  }
  EXPECT_GE(num_failed, 3);
}

TEST(PipelineTest, PlansThatComeAgainNeedNoMoreEvents) {
  const Plan most = plan_of(layers_of(4, 1, 2));
  const Plan fewer = plan_of(layers_of(2, 1, 2));
  Rig rig(most);
  rig.pass(sequence_of(8));
  rig.pipeline->replan(fewer);
  const std::uint64_t events = rig.device.counters().events;
  for (int round = 0; round < 3; ++round) {
    rig.pass(sequence_of(4));
    rig.pass(sequence_of(4));
    rig.pipeline->replan(most);
    // Each of these events tells of a copy and a use of another unit, under way at the most.
    rig.pass(sequence_of(8));
    rig.pass(sequence_of(8));
    rig.pipeline->replan(fewer);
  }
  EXPECT_EQ(rig.device.counters().events, events);
  rig.expect_at_rest_and_right();
}

TEST(PipelineTest, WindowLostOnTheWayLosesNoEvents) {
  const Plan plan = plan_of(layers_of(3, 1, 2));
  const Plan other = with_window(plan, 2 * plan.window_bytes);
  Rig rig(plan);
  const std::uint64_t events = rig.device.counters().events;
  for (int round = 0; round < 2; ++round) {
    rig.device.is_out_of_memory = true;
    EXPECT_THROW(rig.pipeline->replan(other), InjectedFault);
    EXPECT_FALSE(rig.pipeline->has_window());
    rig.device.is_out_of_memory = false;
    rig.pipeline->replan(plan);
    rig.pass(sequence_of(6));
    rig.pass(sequence_of(6));
  }
  EXPECT_EQ(rig.device.counters().events, events);
  rig.expect_at_rest_and_right();
}

TEST(PipelineTest, ReturnWithoutRoomLeavesThePlanWithoutAWindow) {
  const Plan plan = plan_of(layers_of(3, 1, 2));
  Rig rig(plan);
  rig.pipeline->replan(with_window(plan, 2 * plan.window_bytes));
  rig.device.is_out_of_memory = true;
  rig.pipeline->return_to(plan);
  EXPECT_FALSE(rig.pipeline->has_window());
  EXPECT_EQ(rig.pipeline->plan().window_bytes, plan.window_bytes);
  rig.pipeline->enter();
  EXPECT_THROW(rig.pipeline->acquire(0), StateError);
  rig.pipeline->leave(false);
  rig.device.is_out_of_memory = false;
  rig.pipeline->return_to(plan);
  rig.pass(sequence_of(6));
  rig.pass(sequence_of(6));
  rig.expect_at_rest_and_right();
}

TEST(PipelineTest, ReplanAfterANestedCallForgetsItsPlace) {
  const std::vector<Unit> units = layers_of(2, 1, 1);
  Rig rig(plan_with_places(units, {{0, 256}, {0, 256}, {256, 512}, {256, 512}}, 0));
  rig.pipeline->enter();
  rig.pipeline->acquire(0);
  rig.use(1);  // inside the one that it overlaps
  rig.pipeline->release(0);
  rig.pipeline->leave(true);
  ASSERT_EQ(rig.pipeline->stats().extra_places, 1U);
  const Plan other = plan_of(units);
  rig.pipeline->replan(other);
  EXPECT_EQ(rig.device.counters().allocated_bytes, other.window_bytes);
  rig.pass(sequence_of(4));
  rig.pass(sequence_of(4));
  rig.expect_at_rest_and_right();
}

TEST(PipelineTest, OwnsWindowAndPlacesOfTheirOwn) {
  Rig rig(plan_with_places(layers_of(1, 1, 1), {{0, 256}, {0, 256}}, 0));
  const auto* window = reinterpret_cast<const std::byte*>(rig.pipeline->window().begin);
  EXPECT_TRUE(rig.pipeline->owns(window));
  EXPECT_TRUE(rig.pipeline->owns(window + 255));
  EXPECT_FALSE(rig.pipeline->owns(window + 256));
  EXPECT_FALSE(rig.pipeline->owns(&rig));
  rig.pipeline->enter();
  rig.pipeline->acquire(0);
  const std::byte* own = rig.pipeline->acquire(1);  // inside the one that it overlaps
  EXPECT_TRUE(rig.pipeline->owns(own));
  EXPECT_TRUE(own < window || own >= window + 256);
  rig.pipeline->release(1);
  rig.pipeline->release(0);
  rig.pipeline->leave(true);
}

TEST(PipelineTest, ForwardInAForkedChildIsRefusedAndItsDestructorsReturn) {
  Rig rig(plan_of(layers_of(2, 1, 2)));
  rig.pass(sequence_of(4));
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(20);  // a hang ends the child by signal
    bool refused = false;
    try {
      rig.pipeline->enter();
    } catch (const StateError&) {
      refused = true;
    }
    rig.pipeline.reset();
    _exit(refused ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << "ended by signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0);
  rig.pass(sequence_of(4));
  rig.expect_at_rest_and_right();
}

/// As the Python product runs it without a GPU: the caller's stream is this thread.
TEST(PipelineTest, InlineCallerBlocksForItsCopiesAndReadsRightBytes) {
  for (const StreamLayout layout : {StreamLayout::kShared, StreamLayout::kSplit}) {
    const Plan plan = plan_of(layers_of(5, 1, 2));
    Rig rig(plan, {Mode::kPipeline, layout, false}, HostDevice::ComputeStreams::kInline);
    rig.device.set_current_stream(HostDevice::kCallerStream);
    const DeviceCounters before = rig.device.counters();
    for (int pass = 0; pass < 3; ++pass) {
      rig.pass(sequence_of(10));
    }
    EXPECT_EQ(rig.device.counters().host_synchronizes, before.host_synchronizes);
    rig.expect_at_rest_and_right();
    EXPECT_EQ(rig.pipeline->stats().misses, 1U);
  }
}

}  // namespace
}  // namespace torch_offload
