// The lanes of schedules, in slices that take a second each. The whole of them:
//
// TORCH_OFFLOAD_SCHEDULES=1200000 for the random one, TORCH_OFFLOAD_STRIDE=1 for the exhaustive
// one; TORCH_OFFLOAD_THREADS for both.

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>
#include <tuple>

#include "lanes/exhaustive_lane.h"
#include "lanes/random_lane.h"

namespace torch_offload {
namespace {

std::uint64_t from_environment(const char* name, std::uint64_t otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::strtoull(value, nullptr, 10);
}

unsigned num_threads() {
  return static_cast<unsigned>(from_environment("TORCH_OFFLOAD_THREADS", 1));
}

void expect_good(const LaneReport& report) {
  EXPECT_EQ(report.num_bad, 0U);
  for (const std::string& example : report.examples) {
    ADD_FAILURE() << example;
  }
}

TEST(RandomLaneTest, NoScheduleHasAHazard) {
  RandomLane lane;
  lane.num_schedules = from_environment("TORCH_OFFLOAD_SCHEDULES", 20'000);
  lane.num_threads = num_threads();
  std::uint64_t num_told = 0;
  lane.progress = [&](std::uint64_t num_done) { num_told = num_done; };
  const LaneReport report = run(lane);
  expect_good(report);
  EXPECT_EQ(report.num_schedules, lane.num_schedules);
  EXPECT_EQ(num_told, lane.num_schedules);
  EXPECT_GT(report.num_distinct, lane.num_schedules * 9 / 10);
  std::printf("%llu schedules, %llu of them distinct, of %llu ops\n",
              static_cast<unsigned long long>(report.num_schedules),
              static_cast<unsigned long long>(report.num_distinct),
              static_cast<unsigned long long>(report.num_ops));
}

TEST(RandomLaneTest, ControlIsCaught) {
  RandomLane lane;
  lane.num_schedules = 1000;
  lane.is_control = true;
  const LaneReport report = run(lane);
  EXPECT_GT(report.num_bad, 500U);
  EXPECT_EQ(report.examples.size(), 5U);
  EXPECT_EQ(report.examples[0].rfind("seed ", 0), 0U) << report.examples[0];
}

TEST(RandomLaneTest, SeedGivesTheSameScheduleAgainAndThreadsTheSameReport) {
  std::set<std::uint64_t> hashes;
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    const std::uint64_t hash = LaneJudge::hash_of(random_schedule(seed));
    EXPECT_EQ(LaneJudge::hash_of(random_schedule(seed)), hash);
    hashes.insert(hash);
  }
  EXPECT_GT(hashes.size(), 180U);

  RandomLane lane;
  lane.num_schedules = 500;
  const LaneReport alone = run(lane);
  lane.num_threads = 3;
  const LaneReport together = run(lane);
  EXPECT_EQ(together.num_schedules, alone.num_schedules);
  EXPECT_EQ(together.num_distinct, alone.num_distinct);
  EXPECT_EQ(together.num_ops, alone.num_ops);
}

class ExhaustiveLaneTest : public ::testing::TestWithParam<std::tuple<Mode, StreamLayout>> {
 protected:
  ExhaustiveLaneTest() {
    lane_.mode = std::get<0>(GetParam());
    lane_.layout = std::get<1>(GetParam());
    lane_.num_threads = num_threads();
  }

  ExhaustiveLane lane_;
};

TEST_P(ExhaustiveLaneTest, NoSmallScheduleHasAHazard) {
  lane_.max_units = lane_.max_calls = 3;
  const LaneReport report = run(lane_);
  expect_good(report);
  EXPECT_EQ(report.num_schedules, count_schedules(lane_));
}

TEST_P(ExhaustiveLaneTest, NoScheduleOfASliceHasAHazard) {
  lane_.stride = from_environment("TORCH_OFFLOAD_STRIDE", 100'003);
  lane_.progress = [](std::uint64_t num_done) {
    if (num_done % 10'000'000 < 10'000) {
      std::printf("%llu\n", static_cast<unsigned long long>(num_done));
      std::fflush(stdout);
    }
  };
  const LaneReport report = run(lane_);
  expect_good(report);
  EXPECT_EQ(report.num_schedules, count_schedules(lane_));
  std::printf("%llu schedules, %llu ops\n", static_cast<unsigned long long>(report.num_schedules),
              static_cast<unsigned long long>(report.num_ops));
}

TEST_P(ExhaustiveLaneTest, ControlIsCaught) {
  lane_.max_units = lane_.max_calls = 2;
  lane_.is_control = true;
  const LaneReport report = run(lane_);
  EXPECT_GT(report.num_bad * 4, report.num_schedules);
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
  ExhaustiveLane lane;
  lane.max_units = 2;
  lane.max_places = 2;
  lane.max_calls = 1;
  // One unit: 1 placement, first passes [] and [0], each completed or not, second passes [0].
  // Two units: 2 placements, first passes [], [0] and [1], second passes [0] and [1].
  EXPECT_EQ(count_schedules(lane), 1U * 4U * 1U + 2U * 6U * 2U);
  lane.max_units = 5;
  lane.max_places = 3;
  lane.max_calls = 5;
  // Placements: 1, 2, 5, 14 and 41; first passes: twice 6, 63, 364, 1365 and 3906.
  EXPECT_EQ(count_schedules(lane), 1U * 12U * 1U + 2U * 126U * 32U + 5U * 728U * 243U +
                                       14U * 2730U * 1024U + 41U * 7812U * 3125U);
}

}  // namespace
}  // namespace torch_offload
