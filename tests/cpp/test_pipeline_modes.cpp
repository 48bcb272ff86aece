// What the four modes have in common, and what sets them apart.

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "core/error.h"
#include "core/pipeline.h"
#include "pipeline_fixture.h"

namespace torch_offload {
namespace {

using testing::demand_onloads;
using testing::layers_of;
using testing::num_units_ahead;
using testing::plan_of;
using testing::Rig;
using testing::sequence_of;

constexpr std::size_t kSlice = kAlignmentBytes;

using Choice = std::tuple<Mode, StreamLayout>;

std::vector<Choice> all_choices() {
  return {{Mode::kSync, StreamLayout::kShared},   {Mode::kStreams, StreamLayout::kShared},
          {Mode::kStreams, StreamLayout::kSplit}, {Mode::kEvents, StreamLayout::kShared},
          {Mode::kEvents, StreamLayout::kSplit},  {Mode::kPipeline, StreamLayout::kShared},
          {Mode::kPipeline, StreamLayout::kSplit}};
}

std::string name(const Choice& choice) {
  return std::string(name_of(std::get<0>(choice))) + "_" + name_of(std::get<1>(choice));
}

TEST(PipelineModeTest, SyncWithSplitIsRefusedAndGivesTheWindowBack) {
  testing::TestDevice device;
  const Plan plan = plan_of(layers_of(2, 1, 1));
  testing::Masters masters(device, plan.units);
  testing::RawLoader loader(device, masters);
  EXPECT_THROW(Pipeline(device, loader, plan, {Mode::kSync, StreamLayout::kSplit, false}),
               ValueError);
  EXPECT_EQ(device.counters().allocated_bytes, 0U);
}

class PipelineChoiceTest : public ::testing::TestWithParam<Choice> {
 protected:
  Mode mode() const { return std::get<0>(GetParam()); }

  /// Passes in module order: right bytes, and exactly the copies that the places make necessary.
  void expect_exact_passes(const Plan& plan, bool poison, int num_passes = 3) {
    Rig rig(plan, {mode(), std::get<1>(GetParam()), poison});
    const std::vector<UnitIndex> sequence = sequence_of(plan.units.size());
    std::vector<UnitIndex> uses;
    for (int pass = 0; pass < num_passes; ++pass) {
      const std::uint64_t misses_before = rig.pipeline->stats().misses;
      rig.pass(sequence);
      uses.insert(uses.end(), sequence.begin(), sequence.end());
      const std::uint64_t misses = rig.pipeline->stats().misses - misses_before;
      if (mode() == Mode::kPipeline) {
        EXPECT_EQ(misses, pass == 0 ? 1U : 0U) << "only the very first unit comes unannounced";
      }
      if (policy_of(mode()).lookahead == Lookahead::kNone) {
        EXPECT_EQ(rig.pipeline->stats().misses, rig.pipeline->stats().onloads);
      }
    }
    rig.expect_at_rest_and_right();
    const Stats& stats = rig.pipeline->stats();
    EXPECT_EQ(stats.forwards, static_cast<std::uint64_t>(num_passes));
    EXPECT_EQ(stats.prefetched + stats.misses, stats.onloads);
    EXPECT_EQ(stats.extra_places, 0U);
    EXPECT_EQ(rig.device.counters().copies, stats.onloads);
    EXPECT_EQ(rig.device.counters().bytes_copied, stats.bytes_onloaded);
    if (poison) {
      EXPECT_EQ(stats.hits, 0U);
      EXPECT_GE(stats.onloads, uses.size());
      return;
    }
    if (mode() == Mode::kPipeline) {
      const std::size_t ahead = num_units_ahead(plan, sequence);
      uses.insert(uses.end(), sequence.begin(),
                  sequence.begin() + static_cast<std::ptrdiff_t>(ahead));
    } else if (mode() == Mode::kEvents &&
               plan.units.front().layer_index == plan.units.back().layer_index) {
      return;  // one layer: its copies start with it, for the next pass as well
    }
    EXPECT_EQ(stats.onloads, demand_onloads(plan, uses));
  }
};

TEST_P(PipelineChoiceTest, OddAndEvenLayerCountsAtSeveralDepths) {
  for (const std::size_t num_layers : {1U, 2U, 3U, 5U, 7U, 9U}) {
    for (const auto& [mha, ffn] : {std::pair{1U, 2U}, {2U, 2U}, {5U, 1U}}) {
      const std::size_t layer_bytes = (mha + ffn) * kSlice;
      for (const std::size_t depth :
           {std::size_t{0}, layer_bytes / 2, layer_bytes, 2 * layer_bytes, 100 * layer_bytes}) {
        SCOPED_TRACE(std::to_string(num_layers) + " layers of " + std::to_string(mha) + " and " +
                     std::to_string(ffn) + ", depth " + std::to_string(depth));
        expect_exact_passes(plan_of(layers_of(num_layers, mha, ffn), depth), false);
      }
    }
  }
}

TEST_P(PipelineChoiceTest, UnequalSizesAndResidentUnits) {
  std::mt19937 random(11);
  for (int round = 0; round < 40; ++round) {
    SCOPED_TRACE(round);
    std::vector<Unit> units = layers_of(2 + random() % 5, 1, 1);
    for (Unit& unit : units) {
      unit.size_bytes = (1 + random() % 9) * kSlice;
    }
    units.resize(units.size() - random() % 2);
    expect_exact_passes(plan_of(units), false);
  }
}

TEST_P(PipelineChoiceTest, PoisonedPlacesAreNeverReadAgain) {
  expect_exact_passes(plan_of(layers_of(5, 1, 2)), true);
  // Everything fits, so without poison the later passes would copy nothing.
  expect_exact_passes(plan_of(layers_of(2, 1, 2), 100 * kSlice), true);
  expect_exact_passes(plan_of({layers_of(1, 3, 1)[0]}), true);
}

TEST_P(PipelineChoiceTest, PoisonFillsThePlaceAtRelease) {
  Rig rig(plan_of(layers_of(1, 2, 2)), {mode(), std::get<1>(GetParam()), true});
  rig.pipeline->enter();
  rig.acquire_marks.clear();
  const std::byte* place = rig.pipeline->acquire(1);
  rig.read(1, place);
  rig.pipeline->release(1);
  rig.pipeline->leave(true);
  rig.drain();
  bool filled = false;
  for (const Op& op : rig.log.ops()) {
    filled = filled || (op.kind == OpKind::kFill && op.unit == 1 &&
                        op.memory.begin == reinterpret_cast<std::uintptr_t>(place) &&
                        op.memory.size_bytes() == 2 * kSlice);
  }
  EXPECT_TRUE(filled);
  rig.expect_at_rest_and_right();
}

/// One unit used many times in a pass (ALBERT), and one shared by all layers (Zamba).
TEST_P(PipelineChoiceTest, RepeatedUnits) {
  const Plan albert = plan_of(layers_of(1, 2, 3));
  Rig small(albert, {mode(), std::get<1>(GetParam()), false});
  for (int pass = 0; pass < 3; ++pass) {
    small.pass({0, 1, 0, 1, 0, 1});
  }
  small.expect_at_rest_and_right();
  EXPECT_EQ(small.pipeline->stats().onloads, 2U) << "both fit: each is copied once, ever";

  const Plan zamba = plan_of(layers_of(4, 2, 2));
  Rig shared(zamba, {mode(), std::get<1>(GetParam()), false});
  const std::vector<UnitIndex> sequence{0, 7, 1, 2, 7, 3, 4, 7, 5, 6, 7};
  for (int pass = 0; pass < 4; ++pass) {
    const std::uint64_t misses = shared.pipeline->stats().misses;
    shared.pass(sequence);
    if (pass > 1 && mode() == Mode::kPipeline) {
      EXPECT_EQ(shared.pipeline->stats().misses, misses) << "a repeated pass is no surprise";
    }
  }
  shared.expect_at_rest_and_right();
}

INSTANTIATE_TEST_SUITE_P(All, PipelineChoiceTest, ::testing::ValuesIn(all_choices()),
                         [](const auto& info) { return name(info.param); });

/// What one forward looks like in the op log.
struct Trace {
  std::set<std::string> streams;
  std::size_t num_host_waits = 0;
  std::size_t num_stream_waits = 0;
  std::size_t furthest_units = 0;  // a copy issued for the unit that comes so much later
  std::size_t furthest_bytes = 0;

  bool operator==(const Trace& other) const {
    return std::tie(streams, num_host_waits, num_stream_waits, furthest_units, furthest_bytes) ==
           std::tie(other.streams, other.num_host_waits, other.num_stream_waits,
                    other.furthest_units, other.furthest_bytes);
  }
};

/// Traces the second forward of four layers: the first one also starts up.
Trace trace_of(const Choice& choice) {
  const Plan plan = plan_of(layers_of(4, 1, 3));
  const std::vector<UnitIndex> sequence = sequence_of(plan.units.size());
  Rig rig(plan, {std::get<0>(choice), std::get<1>(choice), false});
  rig.pass(sequence);
  const std::size_t begin = rig.log.ops().size();
  rig.pass(sequence);
  const std::size_t end = rig.log.ops().size();
  rig.pass(sequence);
  rig.expect_at_rest_and_right();

  Trace trace;
  for (std::size_t at = begin; at < end; ++at) {
    const Op& op = rig.log.ops()[at];
    if (op.stream != kNoStream) {
      trace.streams.insert(rig.device.stream_name(op.stream));
    }
    trace.num_host_waits += op.kind == OpKind::kSynchronize ? 1U : 0U;
    trace.num_stream_waits += op.kind == OpKind::kWait ? 1U : 0U;
    if (op.kind != OpKind::kCopy) {
      continue;
    }
    // The use that the host had come to, and from there to the one that this copy is for.
    const auto& marks = rig.acquire_marks;
    std::size_t use = 0;
    while (use + 1 < marks.size() && marks[use + 1].op_index <= at) {
      ++use;
    }
    std::size_t ahead_units = 0;
    std::size_t ahead_bytes = 0;
    while (marks[use + ahead_units].unit != op.unit) {
      ++ahead_units;
      ahead_bytes += plan.units[marks[use + ahead_units].unit].size_bytes;
    }
    trace.furthest_units = std::max(trace.furthest_units, ahead_units);
    trace.furthest_bytes = std::max(trace.furthest_bytes, ahead_bytes);
  }
  return trace;
}

TEST(PipelineTraceTest, StatesWhatSetsTheFourModesApart) {
  const std::size_t units = 8;
  const Trace sync = trace_of({Mode::kSync, StreamLayout::kShared});
  EXPECT_EQ(sync.streams, (std::set<std::string>{"caller"}));
  EXPECT_EQ(sync.num_host_waits, 2 * units) << "after each copy and after each unit";
  EXPECT_EQ(sync.num_stream_waits, 0U);
  EXPECT_EQ(sync.furthest_units, 0U);

  const Trace streams = trace_of({Mode::kStreams, StreamLayout::kShared});
  EXPECT_EQ(streams.streams, (std::set<std::string>{"caller", "weight_h2d"}));
  EXPECT_EQ(streams.num_host_waits, 2 * units);
  EXPECT_EQ(streams.num_stream_waits, 0U);
  EXPECT_EQ(streams.furthest_units, 0U);

  const Trace events = trace_of({Mode::kEvents, StreamLayout::kShared});
  EXPECT_EQ(events.streams, (std::set<std::string>{"caller", "weight_h2d"}));
  EXPECT_EQ(events.num_host_waits, 0U);
  EXPECT_EQ(events.num_stream_waits, 2 * units + units / 2)
      << "one for ready, one for free, and one of the copies for each layer";
  EXPECT_EQ(events.furthest_units, 1U) << "the FFN of the layer in use";
  EXPECT_EQ(events.furthest_bytes, 3 * kSlice);

  const Trace pipeline = trace_of({Mode::kPipeline, StreamLayout::kShared});
  EXPECT_EQ(pipeline.streams, (std::set<std::string>{"caller", "weight_h2d"}));
  EXPECT_EQ(pipeline.num_host_waits, 0U);
  EXPECT_EQ(pipeline.num_stream_waits, 2 * units);
  EXPECT_EQ(pipeline.furthest_units, 2U) << "one whole layer";
  EXPECT_EQ(pipeline.furthest_bytes, 4 * kSlice);

  const std::vector<Trace> all{sync, streams, events, pipeline};
  for (std::size_t i = 0; i < all.size(); ++i) {
    for (std::size_t j = i + 1; j < all.size(); ++j) {
      EXPECT_FALSE(all[i] == all[j]) << "modes " << i << " and " << j << " do the same";
    }
  }
}

TEST(PipelineTraceTest, SplitUsesFourStreamsAndTheCallers) {
  const std::set<std::string> five{"caller", "weight_h2d_mha", "weight_h2d_ffn", "compute_mha",
                                   "compute_ffn"};
  for (const Mode mode : {Mode::kStreams, Mode::kEvents, Mode::kPipeline}) {
    const Trace trace = trace_of({mode, StreamLayout::kSplit});
    EXPECT_EQ(trace.streams, five) << name_of(mode);
    EXPECT_EQ(trace.num_host_waits, mode == Mode::kStreams ? 16U : 0U) << name_of(mode);
    EXPECT_EQ(trace.furthest_units,
              mode == Mode::kPipeline ? 2U : (mode == Mode::kEvents ? 1U : 0U));
  }
}

}  // namespace
}  // namespace torch_offload
