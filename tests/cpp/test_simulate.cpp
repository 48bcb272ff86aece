#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/error.h"
#include "lanes/log_builder.h"
#include "pipeline_fixture.h"
#include "sim/simulate.h"

namespace torch_offload {
namespace {

using lanes::without_kernels;
using testing::layers_of;
using testing::plan_of;
using testing::Rig;
using testing::sequence_of;

// SPEC.md, section 2: one layer of Llama-3.1-70B.
constexpr std::int64_t kMhaCopyNs = 6'740'000;
constexpr std::int64_t kMhaNs = 152'420'000;
constexpr std::int64_t kFfnCopyNs = 13'540'000;
constexpr std::int64_t kFfnNs = 25'940'000;
constexpr std::size_t kLayers = 80;

/// A figure of the reference, in ms: exact to 0.01 ms. All of ours are exact to the nanosecond.
void expect_ms(std::int64_t time_ns, double expected_ms) {
  EXPECT_NEAR(static_cast<double>(time_ns) * 1e-6, expected_ms, 0.005);
}

SimRequest request_of(Mode mode, StreamLayout layout, std::size_t num_layers,
                      std::optional<std::size_t> depth_bytes = {}) {
  SimRequest request;
  request.plan = plan_of(layers_of(num_layers, 1, 2), depth_bytes);
  request.options.mode = mode;
  request.options.layout = layout;
  request.costs.copy_ns.emplace();
  for (std::size_t layer = 0; layer < num_layers; ++layer) {
    request.costs.copy_ns->insert(request.costs.copy_ns->end(), {kMhaCopyNs, kFfnCopyNs});
    request.costs.compute_ns.insert(request.costs.compute_ns.end(), {kMhaNs, kFfnNs});
  }
  request.passes = {sequence_of(2 * num_layers)};
  return request;
}

/// The same layers, each of them a pass whose result the caller waits for.
SimRequest layer_by_layer(SimRequest request) {
  request.passes.clear();
  for (UnitIndex unit = 0; unit < request.plan.units.size(); unit += 2) {
    request.passes.push_back({unit, unit + 1});
  }
  request.synchronize_passes = true;
  return request;
}

std::vector<Op> ops_of(const SimResult& result, OpKind kind) {
  std::vector<Op> ops;
  for (const Op& op : result.log.ops()) {
    if (op.kind == kind) {
      ops.push_back(op);
    }
  }
  return ops;
}

using Choice = std::tuple<Mode, StreamLayout>;

class SimulateChoiceTest : public ::testing::TestWithParam<Choice> {
 protected:
  SimRequest request(std::size_t num_layers, std::optional<std::size_t> depth_bytes = {}) const {
    return request_of(std::get<0>(GetParam()), std::get<1>(GetParam()), num_layers, depth_bytes);
  }
};

class SimulateWaitingHostTest : public SimulateChoiceTest {};

/// One copy after the other and never a copy beside a kernel, on one stream or on several.
TEST_P(SimulateWaitingHostTest, LayerCostsTheSumOfItsParts) {
  for (const SimRequest& driven : {request(kLayers), layer_by_layer(request(kLayers))}) {
    const SimResult result = simulate(driven);
    expect_ms(result.elapsed_ns, kLayers * 198.64);
    expect_ms(result.host_blocked_ns, kLayers * 198.64);
    EXPECT_EQ(result.stats.misses, 2 * kLayers);
  }
}

INSTANTIATE_TEST_SUITE_P(All, SimulateWaitingHostTest,
                         ::testing::Values(Choice{Mode::kSync, StreamLayout::kShared},
                                           Choice{Mode::kStreams, StreamLayout::kShared},
                                           Choice{Mode::kStreams, StreamLayout::kSplit}));

class SimulateEventsTest : public SimulateChoiceTest {};

/// The copies of a layer start with the layer: the first of them is not hidden.
TEST_P(SimulateEventsTest, LayerByLayerTheFirstCopyOfEachShows) {
  const SimResult result = simulate(layer_by_layer(request(kLayers)));
  expect_ms(result.elapsed_ns, 14808.0);
  for (std::size_t layer = 0; layer < kLayers; ++layer) {
    expect_ms(result.pass_end_ns[layer] - result.pass_begin_ns[layer], 185.10);
  }
  EXPECT_EQ(result.stats.misses, kLayers);
  EXPECT_EQ(result.counters.host_synchronizes, kLayers) << "the caller's own";
}

/// Nor is it in one pass, though nothing holds the host there.
TEST_P(SimulateEventsTest, InOnePassTheFirstCopyOfEachLayerShowsAsWell) {
  const SimResult result = simulate(request(kLayers));
  expect_ms(result.elapsed_ns, 14808.0);
  EXPECT_EQ(result.counters.host_synchronizes, 0U);
}

INSTANTIATE_TEST_SUITE_P(All, SimulateEventsTest,
                         ::testing::Values(Choice{Mode::kEvents, StreamLayout::kShared},
                                           Choice{Mode::kEvents, StreamLayout::kSplit}));

class SimulatePipelineTest : public SimulateChoiceTest {};

TEST_P(SimulatePipelineTest, OnlyTheVeryFirstCopyShows) {
  SimRequest driven = request(kLayers);
  driven.passes.resize(3, driven.passes[0]);
  for (const bool synchronizes : {false, true}) {
    driven.synchronize_passes = synchronizes;
    const SimResult result = simulate(driven);
    expect_ms(result.pass_end_ns[0], 14275.54);
    expect_ms(result.pass_end_ns[1] - result.pass_end_ns[0], kLayers * 178.36);
    expect_ms(result.elapsed_ns, 6.74 + 3 * kLayers * 178.36);
    EXPECT_EQ(result.stats.misses, 1U);
    EXPECT_EQ(result.stats.forwards, 3U);
    EXPECT_EQ(result.host_blocked_ns, synchronizes ? result.elapsed_ns : 0);
    EXPECT_EQ(result.counters.host_synchronizes, synchronizes ? 3U : 0U);
  }
}

TEST_P(SimulatePipelineTest, LayerByLayerIsNoSlower) {
  const SimResult result = simulate(layer_by_layer(request(kLayers)));
  expect_ms(result.elapsed_ns, 14275.54);
  for (std::size_t layer = 1; layer < kLayers; ++layer) {
    expect_ms(result.pass_end_ns[layer] - result.pass_end_ns[layer - 1], 178.36);
  }
}

/// The timeline of SPEC.md, section 2, calls included, where the window holds one layer.
TEST_P(SimulatePipelineTest, TimelineOfOneLayer) {
  SimRequest driven = request(3, /*depth_bytes=*/kAlignmentBytes);
  ASSERT_EQ(driven.plan.window_bytes, 3 * kAlignmentBytes) << "one layer";
  driven.costs.calls = {10'000, 1'000, 1'000, 0, 10'000};
  const SimResult result = simulate(driven);
  const std::vector<Op> copies = ops_of(result, OpKind::kCopy);
  const std::vector<Op> reads = ops_of(result, OpKind::kRead);
  const std::vector<Op> read_ends = ops_of(result, OpKind::kReadEnd);
  const auto expect_copy = [&](std::size_t index, double begin_ms, double end_ms) {
    EXPECT_EQ(copies[index].unit, index);
    expect_ms(copies[index].begin_ns, begin_ms);
    expect_ms(copies[index].end_ns, end_ms);
  };
  const auto expect_compute = [&](std::size_t index, double begin_ms, double end_ms) {
    EXPECT_EQ(reads[index].unit, index);
    expect_ms(reads[index].end_ns, begin_ms);
    expect_ms(read_ends[index].begin_ns, end_ms);
  };
  expect_copy(0, 0, 6.74);
  expect_compute(0, 6.74, 159.16);
  expect_copy(1, 6.74, 20.28);
  expect_compute(1, 159.16, 185.10);
  expect_copy(2, 159.16, 165.90);
  expect_copy(3, 185.10, 198.64);
  expect_compute(2, 185.10, 337.52);
  EXPECT_EQ(result.host_blocked_ns, 0);
  EXPECT_LT(result.host_end_ns[0], 3 * 100'000) << "the host is back before the first copy ends";
}

INSTANTIATE_TEST_SUITE_P(All, SimulatePipelineTest,
                         ::testing::Values(Choice{Mode::kPipeline, StreamLayout::kShared},
                                           Choice{Mode::kPipeline, StreamLayout::kSplit}));

/// What the host does in one layer, call by call.
TEST(SimulateTest, HostPaysForEachCallOfALayer) {
  SimRequest request = request_of(Mode::kPipeline, StreamLayout::kShared, 1);
  request.costs.calls = {10'000, 1'000, 2'000, 0, 50'000};
  const SimResult result = simulate(request);
  std::vector<std::tuple<OpKind, UnitIndex, std::int64_t>> calls;
  for (const Op& op : result.log.ops()) {
    calls.emplace_back(op.kind, op.unit, op.host_time_ns / 1000);
  }
  // Both units stay whole: nothing is copied for a next pass.
  const std::vector<std::tuple<OpKind, UnitIndex, std::int64_t>> expected{
      {OpKind::kCopy, 0, 0},        {OpKind::kRecord, kNoUnit, 10},   // the miss
      {OpKind::kWait, kNoUnit, 11},                                   //
      {OpKind::kCopy, 1, 13},       {OpKind::kRecord, kNoUnit, 23},   // the prefetch
      {OpKind::kRead, 0, 24},                                         // now kernels may come
      {OpKind::kReadEnd, 0, 74},    {OpKind::kRecord, kNoUnit, 74},   // behind the launch
      {OpKind::kWait, kNoUnit, 75}, {OpKind::kRead, 1, 77},           //
      {OpKind::kReadEnd, 1, 127},   {OpKind::kRecord, kNoUnit, 127},  //
  };
  EXPECT_EQ(calls, expected);
  EXPECT_EQ(result.host_end_ns, (std::vector<std::int64_t>{128'000}));
  EXPECT_EQ(result.pass_begin_ns, (std::vector<std::int64_t>{0}));
}

/// Where launching takes longer than running, the host sets the pace.
TEST(SimulateTest, SlowLaunchesBoundTheForward) {
  SimRequest request = request_of(Mode::kPipeline, StreamLayout::kShared, 4);
  request.costs.calls.launch_ns = 500'000'000;
  const SimResult result = simulate(request);
  EXPECT_EQ(result.host_end_ns[0], 8 * 500'000'000LL);
  EXPECT_EQ(result.elapsed_ns, 8 * 500'000'000LL);
}

/// The same kernels and launches: with all units resident the host sets the pace; with one place
/// for all, what a copy waits for is the kernels alone, as the host is ahead.
TEST(SimulateTest, LaunchesCountWhereTheHostIsNotAhead) {
  constexpr std::int64_t kKernelNs = 100;
  constexpr std::int64_t kLaunchNs = 700;
  constexpr std::int64_t kCopyNs = 5000;
  constexpr std::size_t kUnits = 8;
  SimRequest request;
  PlanRequest planned;
  planned.units = layers_of(kUnits / 2, 1, 1);
  planned.window_bytes = planned.units[0].size_bytes;
  request.plan = make_plan(planned);
  request.costs.copy_ns.emplace(kUnits, kCopyNs);
  request.costs.compute_ns.assign(kUnits, kKernelNs);
  request.costs.launch_ns.assign(kUnits, kLaunchNs);
  request.passes.assign(4, sequence_of(kUnits));
  const auto steady_ns = [](const SimResult& result) {
    return result.pass_end_ns[3] - result.pass_end_ns[2];
  };
  const auto count = static_cast<std::int64_t>(kUnits);
  EXPECT_EQ(steady_ns(simulate(request)), count * (kCopyNs + kKernelNs));
  planned.window_bytes.reset();
  planned.resident.assign(kUnits, true);
  request.plan = make_plan(planned);
  EXPECT_EQ(steady_ns(simulate(request)), count * kLaunchNs);
}

TEST(SimulateTest, LinkBoundForwardTakesAsLongAsItsBytes) {
  SimRequest request = request_of(Mode::kPipeline, StreamLayout::kShared, 5);
  request.costs.copy_ns.reset();
  request.costs.copy_bytes_per_second = 256e6;  // 1 us a slice
  request.costs.compute_ns.assign(10, 1);
  request.passes.resize(4, request.passes[0]);
  const SimResult result = simulate(request);
  EXPECT_EQ(result.pass_end_ns[3] - result.pass_end_ns[2], 5 * 3000);
}

/// One pipeline: the scheduler makes the same calls here as on a device that really copies.
TEST(SimulateTest, CallsAreThoseOnAnotherDevice) {
  for (const auto& [mode, layout] : {Choice{Mode::kSync, StreamLayout::kShared},
                                     {Mode::kStreams, StreamLayout::kSplit},
                                     {Mode::kEvents, StreamLayout::kSplit},
                                     {Mode::kPipeline, StreamLayout::kShared},
                                     {Mode::kPipeline, StreamLayout::kSplit}}) {
    SimRequest request = request_of(mode, layout, 5);
    request.passes.resize(3, request.passes[0]);
    const SimResult result = simulate(request);
    Rig rig(request.plan, request.options);
    rig.log.clear();
    for (const std::vector<UnitIndex>& pass : request.passes) {
      rig.pass(pass);
    }
    const std::vector<Op> real = without_kernels(rig.log.ops());
    ASSERT_EQ(result.log.ops().size(), real.size());
    for (std::size_t at = 0; at < real.size(); ++at) {
      const Op& simulated = result.log.ops()[at];
      EXPECT_EQ(std::tuple(simulated.kind, simulated.event, simulated.unit, simulated.generation),
                std::tuple(real[at].kind, real[at].event, real[at].unit, real[at].generation));
      const auto name = [](const OpLog& log, const Op& op) {
        return op.stream == kNoStream ? "" : log.stream_names().at(op.stream);
      };
      EXPECT_EQ(name(result.log, simulated), rig.device.stream_name(real[at].stream));
    }
    rig.expect_at_rest_and_right();
    EXPECT_EQ(result.stats.onloads, rig.pipeline->stats().onloads);
  }
}

TEST(SimulateTest, ResidentUnitsComputeWithoutACopy) {
  SimRequest request = request_of(Mode::kPipeline, StreamLayout::kShared, 4);
  PlanRequest planned;
  planned.units = layers_of(4, 1, 2);
  planned.resident = {false, false, true, true, false, false, true, true};
  request.plan = make_plan(planned);
  std::size_t num_resident = 0;
  for (UnitIndex unit = 0; unit < 8; ++unit) {
    num_resident += request.plan.is_resident(unit) ? 1U : 0U;
  }
  ASSERT_GT(num_resident, 0U);
  ASSERT_LT(num_resident, 8U);
  const SimResult result = simulate(request);
  std::size_t num_resident_reads = 0;
  for (const Op& op : ops_of(result, OpKind::kRead)) {
    if (request.plan.is_resident(op.unit)) {
      ++num_resident_reads;
      EXPECT_EQ(op.generation, 0U);
      EXPECT_EQ(op.memory.begin, 0U);
      EXPECT_EQ(op.memory.end, 0U);
    } else {
      EXPECT_GE(op.generation, 1U);
      EXPECT_GT(op.memory.size_bytes(), 0U);
    }
  }
  EXPECT_EQ(num_resident_reads, num_resident);
  for (const Op& op : ops_of(result, OpKind::kCopy)) {
    EXPECT_FALSE(request.plan.is_resident(op.unit));
  }
  const bool first_is_copied = !request.plan.is_resident(0);
  expect_ms(result.elapsed_ns, (first_is_copied ? 6.74 : 0) + 4 * 178.36);
}

TEST(SimulateTest, LogIsWholeAndInOrder) {
  SimRequest request = request_of(Mode::kPipeline, StreamLayout::kSplit, 6);
  const SimResult result = simulate(request);
  EXPECT_TRUE(result.log.has_times());
  EXPECT_EQ(result.log.unit_names().at(3), "layers.1.ffn");
  EXPECT_EQ(result.log.stream_names(),
            (std::vector<std::string>{"caller", "weight_h2d_mha", "weight_h2d_ffn", "compute_mha",
                                      "compute_ffn"}));
  std::vector<std::int64_t> reached(5, 0);
  for (const Op& op : result.log.ops()) {
    ASSERT_NE(op.stream, kNoStream);
    if (op.kind == OpKind::kLeave || op.kind == OpKind::kEnter || op.kind == OpKind::kReturn) {
      continue;  // the host's doing, which takes no stream any time
    }
    EXPECT_GE(op.begin_ns, reached[op.stream]);
    EXPECT_GE(op.end_ns, op.begin_ns);
    reached[op.stream] = op.end_ns;
  }
  EXPECT_EQ(ops_of(result, OpKind::kCopy).size(), result.counters.copies);
  EXPECT_EQ(ops_of(result, OpKind::kWait).size(), result.counters.waits);
  EXPECT_EQ(ops_of(result, OpKind::kRecord).size(), result.counters.records);
}

TEST(SimulateTest, SameRequestGivesTheSameResult) {
  SimRequest request = request_of(Mode::kPipeline, StreamLayout::kSplit, 7);
  request.costs.calls = {9'001, 703, 655, 5'000, 80'000};
  request.passes.resize(3, request.passes[0]);
  const SimResult first = simulate(request);
  const SimResult second = simulate(request);
  ASSERT_EQ(first.log.ops().size(), second.log.ops().size());
  for (std::size_t at = 0; at < first.log.ops().size(); ++at) {
    const Op& a = first.log.ops()[at];
    const Op& b = second.log.ops()[at];
    EXPECT_EQ(std::tuple(a.kind, a.stream, a.memory.begin, a.host_time_ns, a.begin_ns, a.end_ns),
              std::tuple(b.kind, b.stream, b.memory.begin, b.host_time_ns, b.begin_ns, b.end_ns));
  }
  request.keep_log = false;
  const SimResult third = simulate(request);
  EXPECT_TRUE(third.log.ops().empty());
  EXPECT_EQ(third.pass_end_ns, first.pass_end_ns) << "looking on changes nothing";
  EXPECT_EQ(third.elapsed_ns, first.elapsed_ns);
}

TEST(SimulateTest, TimesCountFromTheFirstPassToTheHostsReturn) {
  SimRequest request = request_of(Mode::kPipeline, StreamLayout::kShared, 1);
  request.costs.calls.synchronize_ns = 5'000;
  request.synchronize_passes = true;
  const SimResult result = simulate(request);
  EXPECT_EQ(result.pass_begin_ns[0], 0) << "making the pipeline is not part of it";
  EXPECT_EQ(result.pass_end_ns[0], kMhaCopyNs + kMhaNs + kFfnNs);
  EXPECT_EQ(result.host_end_ns[0], result.pass_end_ns[0] + 5'000);
  EXPECT_EQ(result.elapsed_ns, result.host_end_ns[0]);
  EXPECT_EQ(result.host_blocked_ns, result.pass_end_ns[0]);
}

TEST(SimulateTest, NoPassesAndEmptyPassesTakeNoTime) {
  SimRequest request = request_of(Mode::kPipeline, StreamLayout::kShared, 2);
  request.passes = {};
  EXPECT_EQ(simulate(request).elapsed_ns, 0);
  request.passes = {{}, {}};
  const SimResult result = simulate(request);
  EXPECT_EQ(result.elapsed_ns, 0);
  EXPECT_EQ(result.pass_end_ns, (std::vector<std::int64_t>{0, 0}));
}

TEST(SimulateTest, BadRequestsAreRefused) {
  const SimRequest good = request_of(Mode::kPipeline, StreamLayout::kShared, 2);
  EXPECT_NO_THROW(simulate(good));
  SimRequest bad = good;
  bad.costs.compute_ns.pop_back();
  EXPECT_THROW(simulate(bad), ValueError);
  bad = good;
  bad.costs.launch_ns = {1};
  EXPECT_THROW(simulate(bad), ValueError);
  bad = good;
  bad.costs.copy_ns->push_back(1);
  EXPECT_THROW(simulate(bad), ValueError);
  bad = good;
  bad.costs.num_copy_engines = 0;
  EXPECT_THROW(simulate(bad), ValueError);
  bad = good;
  bad.passes.push_back({0, 4});
  EXPECT_THROW(simulate(bad), IndexError);
  bad = good;
  bad.options = {Mode::kSync, StreamLayout::kSplit, false};
  EXPECT_THROW(simulate(bad), ValueError);
}

/// Not a test: prints the speed. Run it by name with --gtest_also_run_disabled_tests.
TEST(SimulateTest, DISABLED_PrintsRecordsPerSecond) {
  for (const Mode mode : {Mode::kSync, Mode::kStreams, Mode::kEvents, Mode::kPipeline}) {
    SimRequest request = request_of(mode, StreamLayout::kShared, kLayers);
    request.passes.resize(1000, request.passes[0]);
    const auto start = std::chrono::steady_clock::now();
    const SimResult result = simulate(request);
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("%-8s %zu records in %.3f s: %.2f million a second\n", name_of(mode),
                result.log.ops().size(), seconds,
                static_cast<double>(result.log.ops().size()) / seconds * 1e-6);
  }
}

}  // namespace
}  // namespace torch_offload
