// The lanes of schedules, in slices that take a second each. The whole of them:
//
// TORCH_OFFLOAD_SCHEDULES=1200000 for the random one, TORCH_OFFLOAD_SMALL=5 for the exhaustive one,
// TORCH_OFFLOAD_SMALL_EACH=4 for its comparison with runs of each; TORCH_OFFLOAD_THREADS for all.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "check/hazard_checker.h"
#include "lanes/complaints.h"
#include "lanes/exhaustive_lane.h"
#include "lanes/placed_plan.h"
#include "lanes/random_lane.h"
#include "lanes/schedule_rig.h"

namespace torch_offload {
namespace {

std::uint64_t from_environment(const char* name, std::uint64_t otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::strtoull(value, nullptr, 10);
}

unsigned num_threads() {
  return static_cast<unsigned>(from_environment("TORCH_OFFLOAD_THREADS", 1));
}

/// Up to so many units, and as many calls.
unsigned size_of_exhaustive() {
  return static_cast<unsigned>(from_environment("TORCH_OFFLOAD_SMALL", 3));
}
unsigned size_of_comparison() {
  return static_cast<unsigned>(from_environment("TORCH_OFFLOAD_SMALL_EACH", 3));
}

void print(const LaneReport& report) {
  std::printf("%llu schedules of %llu ops, by %llu runs and %llu states\n",
              static_cast<unsigned long long>(report.num_schedules),
              static_cast<unsigned long long>(report.num_ops),
              static_cast<unsigned long long>(report.num_runs),
              static_cast<unsigned long long>(report.num_states));
}

void expect_good(const LaneReport& report) {
  EXPECT_EQ(report.num_bad, 0U);
  for (const std::string& example : report.examples) {
    ADD_FAILURE() << example;
  }
}

TEST(RandomLaneTest, NoScheduleHasAHazard) {
  const std::uint64_t num_schedules = from_environment("TORCH_OFFLOAD_SCHEDULES", 20'000);
  RandomLane lane(num_threads());
  lane.advance(num_schedules);
  const LaneReport report = lane.report();
  expect_good(report);
  EXPECT_EQ(report.num_schedules, num_schedules);
  EXPECT_GT(report.num_distinct, num_schedules * 9 / 10);
  std::printf("%llu schedules, %llu of them distinct, of %llu ops\n",
              static_cast<unsigned long long>(report.num_schedules),
              static_cast<unsigned long long>(report.num_distinct),
              static_cast<unsigned long long>(report.num_ops));
}

TEST(RandomLaneTest, ControlIsCaught) {
  RandomLane lane(1, /*is_control=*/true);
  lane.advance(1000);
  const LaneReport report = lane.report();
  EXPECT_GT(report.num_bad, 500U);
  EXPECT_EQ(report.examples.size(), 5U);
  EXPECT_EQ(report.examples[0].rfind("seed ", 0), 0U) << report.examples[0];
}

TEST(RandomLaneTest, SeedGivesTheSameScheduleAgainAndThreadsTheSameReport) {
  std::set<std::uint64_t> hashes;
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    const std::uint64_t hash = hash_of(random_schedule(seed));
    EXPECT_EQ(hash_of(random_schedule(seed)), hash);
    hashes.insert(hash);
  }
  EXPECT_GT(hashes.size(), 180U);

  RandomLane alone;
  alone.advance(500);
  RandomLane together(3);
  for (const int part : {200, 1, 299}) {
    together.advance(static_cast<std::uint64_t>(part));
  }
  EXPECT_EQ(together.report().num_schedules, 500U);
  EXPECT_EQ(together.report().num_distinct, alone.report().num_distinct);
  EXPECT_EQ(together.report().num_ops, alone.report().num_ops);
}

/// A loader may choose another stream than the one it is given; who frees its target must know.
TEST(ScheduleRigTest, CopiesThatALoaderMakesElsewhereAreDrainedBeforeTheWindowGoes) {
  ScheduleRig rig(lanes::plan_with_places(lanes::layers_of(1, 1, 1), {{0, 256}, {256, 512}}, 512),
                  {}, /*loads_elsewhere=*/true);
  rig.pipeline().enter();
  rig.call(0);  // unit 1 is copied ahead, and never used
  rig.pipeline().leave(true);
  const OpLog& log = rig.finish();
  const auto is_copy = [](const Op& op) { return op.kind == OpKind::kCopy; };
  EXPECT_EQ(std::count_if(log.ops().begin(), log.ops().end(), is_copy), 2);
  for (const Finding& finding : HazardChecker().check(log)) {
    ADD_FAILURE() << finding.message;
  }
}

TEST(ComplaintsTest, WhatNobodyHasTakenIsPassedOn) {
  ::testing::internal::CaptureStderr();
  {
    Complaints complaints;
    std::fprintf(stderr, "expected: one\nnot expected\n");
    EXPECT_EQ(complaints.take("expected: "), 1U);
    EXPECT_EQ(complaints.take("expected: "), 0U);
    std::fprintf(stderr, "expected: two\nexpected: three\nnor this\n");
    EXPECT_EQ(complaints.take("expected: "), 2U);
    std::fprintf(stderr, "expected: too late\n");
  }
  std::fprintf(stderr, "afterwards\n");
  EXPECT_EQ(::testing::internal::GetCapturedStderr(),
            "not expected\nnor this\nexpected: too late\nafterwards\n");
}

class ExhaustiveLaneTest : public ::testing::TestWithParam<std::tuple<Mode, StreamLayout>> {
 protected:
  ExhaustiveLaneTest() {
    options_.mode = std::get<0>(GetParam());
    options_.layout = std::get<1>(GetParam());
    options_.num_threads = num_threads();
  }

  ExhaustiveOptions options_;
};

TEST_P(ExhaustiveLaneTest, NoSmallScheduleHasAHazard) {
  options_.max_units = size_of_exhaustive();
  options_.max_calls = options_.max_units;
  ExhaustiveLane lane(options_);
  EXPECT_TRUE(lane.advance(1));
  EXPECT_GE(lane.report().num_schedules, 1U);
  while (lane.advance(1)) {
  }
  const LaneReport report = lane.report();
  expect_good(report);
  EXPECT_EQ(report.num_schedules, lane.count());
  print(report);
}

TEST_P(ExhaustiveLaneTest, NoSmallScheduleOfPackedUnitsHasAHazard) {
  constexpr Transport kRaw = Transport::kRaw;
  constexpr Transport kPacked = Transport::kPacked;
  constexpr Transport kStays = Transport::kPackedResident;
  options_.max_units = 3;
  options_.max_calls = 2;
  options_.merges = false;
  for (const std::vector<Transport>& transports :
       {std::vector{kPacked}, {kStays}, {kStays, kPacked}, {kRaw, kStays}}) {
    options_.transports = transports;
    ExhaustiveLane lane(options_);
    while (lane.advance(10'000)) {
    }
    expect_good(lane.report());
    EXPECT_EQ(lane.report().num_schedules, lane.count());
  }
}

/// Schedules that meet in a state go on as one, and nothing is lost: not an op, nor its place among
/// the others, nor how often it comes.
TEST_P(ExhaustiveLaneTest, MergedSchedulesAreThoseThatRunByThemselves) {
  options_.max_units = options_.max_calls = size_of_comparison();
  ExhaustiveLane merged(options_);
  options_.merges = false;
  ExhaustiveLane each(options_);
  ASSERT_FALSE(merged.advance(merged.count()));
  ASSERT_FALSE(each.advance(each.count()));
  const LaneReport expected = each.report();
  const LaneReport got = merged.report();
  expect_good(expected);
  expect_good(got);
  EXPECT_EQ(expected.num_runs, each.count());
  EXPECT_LT(got.num_runs * 3, expected.num_runs);
  EXPECT_EQ(got.num_schedules, expected.num_schedules);
  EXPECT_EQ(got.num_ops, expected.num_ops);
  EXPECT_EQ(got.digest, expected.digest);
}

TEST_P(ExhaustiveLaneTest, ControlIsCaught) {
  options_.max_units = options_.max_calls = 2;
  options_.is_control = true;
  for (const bool merges : {true, false}) {
    options_.merges = merges;
    ExhaustiveLane lane(options_);
    EXPECT_FALSE(lane.advance(lane.count()));
    EXPECT_EQ(lane.report().num_schedules, lane.count());
    EXPECT_GT(lane.report().num_bad * 4, lane.report().num_schedules);
    EXPECT_EQ(lane.report().examples.size(), kMaxExamples);
  }
}

INSTANTIATE_TEST_SUITE_P(All, ExhaustiveLaneTest,
                         ::testing::Values(std::tuple{Mode::kSync, StreamLayout::kShared},
                                           std::tuple{Mode::kStreams, StreamLayout::kShared},
                                           std::tuple{Mode::kStreams, StreamLayout::kSplit},
                                           std::tuple{Mode::kEvents, StreamLayout::kShared},
                                           std::tuple{Mode::kEvents, StreamLayout::kSplit},
                                           std::tuple{Mode::kPipeline, StreamLayout::kShared},
                                           std::tuple{Mode::kPipeline, StreamLayout::kSplit}),
                         [](const auto& info) {
                           return std::string(name_of(std::get<0>(info.param))) + "_" +
                                  name_of(std::get<1>(info.param));
                         });

TEST(ExhaustiveLaneCountTest, CountsWhatCanBeCountedByHand) {
  ExhaustiveOptions options;
  options.max_units = 2;
  options.max_places = 2;
  options.max_calls = 1;
  // One unit: 1 placement; two passes, each [] or [0], completed or not.
  // Two units: 2 placements; two passes, each [], [0] or [1], completed or not.
  EXPECT_EQ(ExhaustiveLane(options).count(), 1U * 4U * 4U + 2U * 6U * 6U);
  // Placements: 1, 2, 5, 14 and 41; passes: twice 6, 63, 364, 1365 and 3906.
  EXPECT_EQ(ExhaustiveLane({}).count(), 1U * 12U * 12U + 2U * 126U * 126U + 5U * 728U * 728U +
                                            14U * 2730U * 2730U + 41ULL * 7812U * 7812U);
}

TEST(ExhaustiveLaneCountTest, ThreadsGiveTheSameReport) {
  ExhaustiveOptions options;
  options.max_units = options.max_calls = 3;
  ExhaustiveLane alone(options);
  options.num_threads = 3;
  ExhaustiveLane together(options);
  EXPECT_FALSE(alone.advance(alone.count()));
  while (together.advance(2000)) {
  }
  EXPECT_EQ(together.report().num_runs, alone.report().num_runs);
  EXPECT_EQ(together.report().num_states, alone.report().num_states);
  EXPECT_EQ(together.report().num_ops, alone.report().num_ops);
  EXPECT_EQ(together.report().digest, alone.report().digest);
}

}  // namespace
}  // namespace torch_offload
