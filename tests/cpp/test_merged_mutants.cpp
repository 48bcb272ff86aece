// The exhaustive lane over the pipeline whose steps can be left out: merged or not, it finds the
// same mutants, in the same schedules.

#include <gtest/gtest.h>

#include <cstdio>
#include <string>
#include <tuple>

#include "core/mode.h"
#include "core/steps.h"
#include "lanes/exhaustive_lane.h"
#include "lanes/mutant_run.h"
#include "lanes/mutants.h"

namespace torch_offload {
namespace {

using lanes::all_mutants;
using lanes::Mutant;
using lanes::mutation;

LaneReport report_of(ExhaustiveOptions options, const Mutant& mutant, bool merges) {
  options.merges = merges;
  ExhaustiveLane lane(options);
  mutation = {};
  mutation.step = mutant.step;
  mutation.is_armed = true;
  EXPECT_FALSE(lane.advance(lane.count()));
  mutation = {};
  return lane.report();
}

class MergedMutantsTest : public ::testing::TestWithParam<std::tuple<Mode, StreamLayout>> {
 protected:
  ExhaustiveOptions options() const {
    ExhaustiveOptions options;
    options.mode = std::get<0>(GetParam());
    options.layout = std::get<1>(GetParam());
    options.max_units = 3;
    options.max_calls = 2;
    return options;
  }
};

TEST_P(MergedMutantsTest, AreFoundInTheSameSchedules) {
  int num_found = 0;
  for (const Mutant& mutant : all_mutants()) {
    const LaneReport expected = report_of(options(), mutant, false);
    const LaneReport got = report_of(options(), mutant, true);
    EXPECT_EQ(got.num_schedules, expected.num_schedules) << mutant;
    if (mutant.step == Step::kFreeRecord) {
      // It remembers an event that it has not recorded: the schedule ends there, whether or not
      // somebody comes to wait for that.
      EXPECT_GE(got.num_bad, expected.num_bad) << mutant;
      EXPECT_EQ(got.num_bad > 0, expected.num_bad > 0) << mutant;
    } else {
      EXPECT_EQ(got.num_bad, expected.num_bad) << mutant;
    }
    if (expected.num_bad == 0) {
      EXPECT_EQ(got.num_ops, expected.num_ops) << mutant;
      EXPECT_EQ(got.digest, expected.digest) << mutant;
    }
    num_found += expected.num_bad > 0 ? 1 : 0;
  }
  EXPECT_GE(num_found, std::get<0>(GetParam()) == Mode::kSync ? 1 : 4);
  std::printf("%d of %zu mutants found\n", num_found, all_mutants().size());
}

INSTANTIATE_TEST_SUITE_P(All, MergedMutantsTest,
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

}  // namespace
}  // namespace torch_offload
