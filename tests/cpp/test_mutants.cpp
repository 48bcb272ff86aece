// The pipeline with each of its steps left out or taken at the wrong moment, one at a time. The
// checker must notice every one, from the log alone; and to show that it is no formality, each is
// also seen to yield wrong bytes on a device that runs its streams in the worst order.

#include <gtest/gtest.h>

#include <algorithm>
#include <bitset>
#include <string>
#include <vector>

#include "check/hazard_checker.h"
#include "core/steps.h"
#include "lanes/mutant_lane.h"
#include "lanes/mutant_run.h"
#include "lanes/mutant_schedules.h"
#include "lanes/mutants.h"

namespace torch_offload {

namespace {

using lanes::all_mutants;
using lanes::all_schedules;
using lanes::Choice;
using lanes::find_schedule;
using lanes::kind_of;
using lanes::moved_mutants;
using lanes::Mutant;
using lanes::mutation;
using lanes::Outcome;
using lanes::Schedule;
using lanes::StepKind;
using lanes::Unmoved;
using lanes::unmoved_steps;

/// Which streams stand still: none, one or two of them, or all, in either order of being let go.
std::vector<Choice> orders_of(const Schedule& schedule) {
  const std::vector<Transport>& transports = schedule.plan.transports;
  std::size_t num_streams = schedule.options.layout == StreamLayout::kSplit ? 6U : 3U;
  for (const Transport transport : {Transport::kPacked, Transport::kPackedResident}) {
    num_streams += std::find(transports.begin(), transports.end(), transport) != transports.end();
  }
  std::vector<Choice> choices;
  for (std::uint32_t held = 0; held < 1U << num_streams; ++held) {
    const std::size_t num_held = std::bitset<32>(held).count();
    if (num_held <= 2 || num_held == num_streams) {
      for (const bool callers_go_last : {false, true}) {
        Choice choice;
        choice.held = held;
        choice.callers_go_last = callers_go_last;
        choices.push_back(choice);
      }
    }
  }
  return choices;
}

std::string describe(const Schedule& schedule, const Choice& choice) {
  return schedule.name + "; streams held " + std::bitset<6>(choice.held).to_string() +
         (choice.callers_go_last ? ", callers last" : "") + (choice.begins_late ? ", late" : "") +
         (choice.failing_call > 0 ? ", call " + std::to_string(choice.failing_call) + " fails"
                                  : "");
}

/// Visits the run in which no call fails, then those in which the first one does, the second one,
/// and so on for as long as there is one to fail, until `visit` is content.
template <typename Visit>
bool any_run(const Schedule& schedule, Choice choice, const Visit& visit) {
  bool goes_on = true;
  for (choice.failing_call = 0; goes_on; ++choice.failing_call) {
    const Outcome outcome = run(schedule, choice);
    if (visit(choice, outcome)) {
      return true;
    }
    goes_on = schedule.may_fail && (choice.failing_call == 0 || outcome.has_failed);
  }
  return false;
}

TEST(MutantsTest, TwinWithoutMutationIsCleanAndRight) {
  mutation = {};
  int num_failures = 0;
  for (const Schedule& schedule : all_schedules()) {
    for (const Choice& choice : orders_of(schedule)) {
      any_run(schedule, choice, [&](const Choice& one, const Outcome& outcome) {
        EXPECT_EQ(outcome.num_wrong, 0) << describe(schedule, one);
        EXPECT_FALSE(outcome.was_refused) << describe(schedule, one);
        for (const Finding& finding : HazardChecker().check(outcome.log)) {
          ADD_FAILURE() << describe(schedule, one) << ": " << finding.message;
        }
        num_failures += one.failing_call > 0 ? 1 : 0;
        // What may fail, fails while at most one stream stands still: enough for one order.
        const bool is_simple = std::bitset<32>(one.held).count() <= 1 && !one.callers_go_last;
        return HasFailure() || !is_simple;
      });
      ASSERT_FALSE(HasFailure());
    }
  }
  EXPECT_GT(num_failures, 1000);
}

bool is_noticed_and_wrong(const Outcome& outcome) {
  return outcome.num_wrong > 0 && !HazardChecker().check(outcome.log).empty();
}

/// The line of the table that would do: for whoever has changed the pipeline. Takes minutes.
std::string find_line(const Mutant& mutant) {
  std::string line;
  for (const Schedule& schedule : all_schedules()) {
    for (Choice choice : orders_of(schedule)) {
      for (const bool begins_late : {true, false}) {
        choice.begins_late = begins_late;
        const auto is_shown = [&](const Choice& one, const Outcome& outcome) {
          line = std::string("{Step::") + mutant.name + ", \"" + mutant.name + "\", \"" +
                 schedule.name + "\", {0b" + std::bitset<6>(one.held).to_string() + ", " +
                 (one.callers_go_last ? "true, " : "false, ") +
                 (begins_late ? "true, " : "false, ") + std::to_string(one.failing_call) + "}" +
                 (mutant.is_moved ? ", true}," : "},");
          return is_noticed_and_wrong(outcome);
        };
        if (any_run(schedule, choice, is_shown)) {
          return line;
        }
      }
    }
  }
  return "there is no schedule that shows it";
}

class MutantTest : public ::testing::TestWithParam<Mutant> {
 protected:
  MutantTest() {
    mutation = {};
    mutation.step = GetParam().step;
    mutation.is_moved = GetParam().is_moved;
  }
  ~MutantTest() override { mutation = {}; }
};

TEST_P(MutantTest, IsNoticedAndYieldsWrongBytes) {
  const Mutant& mutant = GetParam();
  const Schedule* schedule = find_schedule(mutant.schedule);
  ASSERT_NE(schedule, nullptr) << mutant.schedule;
  const Outcome outcome = run(*schedule, mutant.choice);
  EXPECT_GT(mutation.num_reached[mutant.step], 0U) << "the schedule does not come to this step";
  ASSERT_TRUE(is_noticed_and_wrong(outcome))
      << outcome.num_wrong << " wrong, " << HazardChecker().check(outcome.log).size()
      << " findings; instead: " << find_line(mutant);
}

INSTANTIATE_TEST_SUITE_P(LeftOut, MutantTest, ::testing::ValuesIn(all_mutants()),
                         [](const auto& info) { return std::string(info.param.name); });
INSTANTIATE_TEST_SUITE_P(Moved, MutantTest, ::testing::ValuesIn(moved_mutants()),
                         [](const auto& info) { return std::string(info.param.name); });

/// Decoders are held back by the steps that hold copies back, each of which is needed there too.
TEST(MutantsTest, StepsThatOrderDecodersAreNoticedAndYieldWrongBytes) {
  for (const char* name :
       {"passes, packed, pipeline, shared", "passes, staying packed, pipeline, shared"}) {
    const Schedule& schedule = *find_schedule(name);
    for (const Step step : {Step::kReadyRecord, Step::kReadyWait, Step::kFreeRecord,
                            Step::kPendingFree, Step::kOverlapPendingWait}) {
      mutation = {};
      mutation.step = step;
      bool is_shown = false;
      for (Choice choice : orders_of(schedule)) {
        choice.begins_late = true;
        is_shown = is_shown || is_noticed_and_wrong(run(schedule, choice));
      }
      EXPECT_TRUE(is_shown) << name << ", step " << static_cast<int>(step);
    }
  }
  mutation = {};
}

/// A record that never comes is no secret: the device takes no wait for it.
TEST(MutantsTest, RecordLeftOutFromTheStartIsRefused) {
  for (const Step step : {Step::kReadyRecord, Step::kFreeRecord, Step::kHandoverRecord}) {
    mutation = {};
    mutation.step = step;
    EXPECT_TRUE(run(*find_schedule("passes, pipeline, split"), Choice{}).was_refused);
  }
  mutation = {};
}

/// That two units share bytes is said twice in a plan, and each time for a reason.
TEST(MutantsTest, PlanWithoutOneOverlapIsNoticedAndYieldsWrongBytes) {
  mutation = {};
  int num_edges = 0;
  for (const char* name : {"passes, pipeline, shared", "passes, pipeline, split",
                           "other ways, pipeline, shared", "other ways, pipeline, split"}) {
    const Schedule& whole = *find_schedule(name);
    for (UnitIndex unit = 0; unit < whole.plan.units.size(); ++unit) {
      for (std::size_t i = 0; i < whole.plan.overlaps[unit].size(); ++i) {
        Schedule schedule = whole;
        std::vector<UnitIndex>& overlaps = schedule.plan.overlaps[unit];
        overlaps.erase(overlaps.begin() + static_cast<std::ptrdiff_t>(i));
        bool is_wrong = false;
        for (const Choice& choice : orders_of(schedule)) {
          const Outcome outcome = run(schedule, choice);
          is_wrong = is_wrong || outcome.num_wrong > 0;
          ASSERT_FALSE(HazardChecker().check(outcome.log).empty())
              << name << ", unit " << unit << ", overlap " << i;
          if (is_wrong) {
            break;
          }
        }
        EXPECT_TRUE(is_wrong) << name << ", unit " << unit << ", overlap " << i;
        ++num_edges;
      }
    }
  }
  EXPECT_EQ(num_edges, 2 * 4 + 2 * 6);
}

/// The same through the door that bindings use; a twin is neither wrong nor noticed.
TEST(MutantsTest, LaneTellsMutantsFromTheirTwins) {
  for (std::size_t i = 0; i < num_mutants(); ++i) {
    const MutantOutcome mutant = run_mutant(i, /*is_mutated=*/true);
    EXPECT_TRUE(mutant.is_reached) << mutant.step;
    EXPECT_GT(mutant.num_wrong, 0) << mutant.step;
    EXPECT_FALSE(mutant.findings.empty()) << mutant.step;
    const MutantOutcome twin = run_mutant(i, /*is_mutated=*/false);
    EXPECT_TRUE(twin.is_reached) << mutant.step;
    EXPECT_EQ(twin.num_wrong, 0) << mutant.step;
    EXPECT_TRUE(twin.findings.empty()) << mutant.step;
  }
}

/// A step without a mutant would be a step without a proof.
TEST(MutantsTest, EveryStepHasAMutant) {
  ASSERT_EQ(all_mutants().size(), static_cast<std::size_t>(Step::kNone));
  for (std::size_t i = 0; i < all_mutants().size(); ++i) {
    EXPECT_EQ(all_mutants()[i].step, static_cast<Step>(i)) << all_mutants()[i].name;
  }
}

TEST(MutantsTest, EveryStepIsMovedOrHasItsReason) {
  std::vector<Step> steps;
  for (const Mutant& mutant : moved_mutants()) {
    EXPECT_TRUE(mutant.is_moved);
    EXPECT_NE(kind_of(mutant.step), StepKind::kNone) << mutant;
    steps.push_back(mutant.step);
  }
  for (const Unmoved& unmoved : unmoved_steps()) {
    EXPECT_GT(std::string(unmoved.reason).size(), 40U);
    steps.push_back(unmoved.step);
  }
  std::sort(steps.begin(), steps.end());
  ASSERT_EQ(steps.size(), static_cast<std::size_t>(Step::kNone));
  for (std::size_t i = 0; i < steps.size(); ++i) {
    EXPECT_EQ(steps[i], static_cast<Step>(i));
  }
}

/// What yields no wrong bytes is noticed all the same, if it is a call of the device.
TEST(MutantsTest, CallThatCannotMatterWhenItIsMovedIsNoticed) {
  int num_noticed = 0;
  for (const Unmoved& unmoved : unmoved_steps()) {
    if (kind_of(unmoved.step) == StepKind::kNone) {
      continue;
    }
    const Mutant& mutant = all_mutants()[static_cast<std::size_t>(unmoved.step)];
    mutation = {};
    mutation.step = mutant.step;
    mutation.is_moved = true;
    const Outcome outcome = run(*find_schedule(mutant.schedule), mutant.choice);
    EXPECT_EQ(outcome.num_wrong, 0) << mutant;
    EXPECT_FALSE(HazardChecker().check(outcome.log).empty()) << mutant;
    ++num_noticed;
  }
  mutation = {};
  EXPECT_EQ(num_noticed, 1);
}

}  // namespace
}  // namespace torch_offload
