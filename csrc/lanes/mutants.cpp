#include "lanes/mutants.h"

#include <string>

#include "check/hazard_checker.h"
#include "core/error.h"
#include "lanes/mutant_lane.h"

namespace torch_offload {

inline namespace mutants {

bool is_left_out(Step step) { return lanes::mutation.come_to(step); }

}  // namespace mutants

namespace lanes {

// Bits of the streams held: callers 0 and 1, then the pipeline's, as it lists them.
const std::vector<Mutant>& all_mutants() {
  static const std::vector<Mutant> mutants{
      {Step::kReadyRecord, "kReadyRecord", "passes, pipeline, shared", {0b000001, false, true, 0}},
      {Step::kReadyWait, "kReadyWait", "passes, pipeline, shared", {0b000001, false, true, 0}},
      {Step::kNestedReadyWait,
       "kNestedReadyWait",
       "nested on another stream, events, shared",
       {0b000100, false, true, 0}},
      {Step::kHostReadyWait,
       "kHostReadyWait",
       "passes, streams, shared",
       {0b000100, false, true, 0}},
      {Step::kFreeRecord, "kFreeRecord", "passes, pipeline, shared", {0b000001, false, true, 0}},
      {Step::kPendingFree, "kPendingFree", "passes, pipeline, shared", {0b000001, false, true, 0}},
      {Step::kPendingReady,
       "kPendingReady",
       "other ways, pipeline, split",
       {0b000001, false, false, 0}},
      {Step::kOwnPendingWait,
       "kOwnPendingWait",
       "poison, pipeline, shared",
       {0b000001, false, true, 0}},
      {Step::kOverlapPendingWait,
       "kOverlapPendingWait",
       "passes, pipeline, shared",
       {0b000001, false, true, 0}},
      {Step::kOverlapForget,
       "kOverlapForget",
       "passes, pipeline, shared",
       {0b000000, false, true, 0}},
      {Step::kHeldGuard, "kHeldGuard", "other ways, pipeline, shared", {0b000000, false, true, 0}},
      {Step::kHostFreeWait, "kHostFreeWait", "passes, streams, shared", {0b000001, false, true, 0}},
      {Step::kPoisonForget,
       "kPoisonForget",
       "poison, pipeline, shared",
       {0b000000, false, true, 0}},
      {Step::kEarlierStreamWait,
       "kEarlierStreamWait",
       "streams between uses, events, shared",
       {0b000001, false, true, 0}},
      {Step::kLaterStreamsNote,
       "kLaterStreamsNote",
       "streams in a use, events, shared",
       {0b000010, false, true, 0}},
      {Step::kLaterStreamsJoin,
       "kLaterStreamsJoin",
       "streams in a use, events, shared",
       {0b000010, false, true, 0}},
      {Step::kEnterOrder, "kEnterOrder", "passes, pipeline, split", {0b000001, false, true, 0}},
      {Step::kReturnOrder, "kReturnOrder", "passes, pipeline, split", {0b000001, false, true, 0}},
      {Step::kCallerReturn,
       "kCallerReturn",
       "failures, pipeline, split",
       {0b000100, false, true, 0}},
      {Step::kHandoverRecord,
       "kHandoverRecord",
       "passes, pipeline, split",
       {0b000001, false, true, 0}},
      {Step::kHandoverWait,
       "kHandoverWait",
       "nested overlapping units, pipeline, shared",
       {0b000000, true, true, 0}},
      {Step::kNewWindowDrain,
       "kNewWindowDrain",
       "passes, pipeline, shared",
       {0b000000, true, false, 0}},
      {Step::kNewPlaceOrder,
       "kNewPlaceOrder",
       "nested overlapping units, pipeline, shared",
       {0b000000, true, true, 0}},
      {Step::kOldPlaceWait,
       "kOldPlaceWait",
       "old place, pipeline, split",
       {0b000001, false, false, 0}},
      {Step::kDrainOwnStreams,
       "kDrainOwnStreams",
       "passes, pipeline, split",
       {0b000001, false, true, 0}},
      {Step::kDrainUsedStreams,
       "kDrainUsedStreams",
       "passes without copies, pipeline, shared",
       {0b000001, false, true, 0}},
      {Step::kReplanDrain,
       "kReplanDrain",
       "replanned, pipeline, shared",
       {0b000001, false, true, 0}},
      {Step::kOnloadDrain, "kOnloadDrain", "edits, pipeline, shared", {0b000100, false, false, 0}},
      {Step::kNewStagingDrain,
       "kNewStagingDrain",
       "passes, packed, pipeline, shared",
       {0b001001, false, false, 0}},
      {Step::kStagedRecord,
       "kStagedRecord",
       "passes, packed, pipeline, shared",
       {0b000000, true, true, 0}},
      {Step::kStagedWait,
       "kStagedWait",
       "passes, packed, pipeline, shared",
       {0b000000, true, true, 0}},
      {Step::kDecodedRecord,
       "kDecodedRecord",
       "other ways, packed, pipeline, shared",
       {0b000000, false, true, 0}},
      {Step::kDecodedWait,
       "kDecodedWait",
       "other ways, packed, pipeline, shared",
       {0b000000, false, true, 0}},
      {Step::kUploadDrain,
       "kUploadDrain",
       "passes, staying packed, pipeline, shared",
       {0b001000, false, false, 0}},
      {Step::kChunkRecord,
       "kChunkRecord",
       "passes, files in turn, pipeline, shared",
       {0b000100, false, true, 0}},
      {Step::kChunkDrain,
       "kChunkDrain",
       "passes, files in turn, pipeline, shared",
       {0b000100, false, true, 0}},
      {Step::kLimitDrain,
       "kLimitDrain",
       "passes, files beyond a limit, pipeline, shared",
       {0b000100, false, false, 0}},
      {Step::kOnceDrain,
       "kOnceDrain",
       "residents, files, pipeline, shared",
       {0b000100, false, true, 0}},
      {Step::kFailedOnloadDrain,
       "kFailedOnloadDrain",
       "failures, pipeline, split",
       {0b000001, false, true, 38}},
      {Step::kFailedUploadDrain,
       "kFailedUploadDrain",
       "failures in packing, pipeline, shared",
       {0b001001, true, true, 2}},
      {Step::kFailedAcquireDrain,
       "kFailedAcquireDrain",
       "failures, streams, split",
       {0b000100, false, true, 4}},
      {Step::kFailedReleaseDrain,
       "kFailedReleaseDrain",
       "failures, pipeline, shared",
       {0b000001, false, true, 6}},
      {Step::kFailedAcquireReturn,
       "kFailedAcquireReturn",
       "failures, pipeline, split",
       {0b000001, false, true, 22}},
      {Step::kFailedReleaseReturn,
       "kFailedReleaseReturn",
       "failures, pipeline, split",
       {0b010000, false, true, 10}},
  };
  return mutants;
}

const Schedule* find_schedule(const std::string& name) {
  static const std::vector<Schedule> schedules = all_schedules();
  for (const Schedule& schedule : schedules) {
    if (schedule.name == name) {
      return &schedule;
    }
  }
  return nullptr;
}

}  // namespace lanes

std::size_t num_mutants() { return lanes::all_mutants().size() + lanes::moved_mutants().size(); }

MutantOutcome run_mutant(std::size_t index, bool is_mutated) {
  const std::size_t num_left_out = lanes::all_mutants().size();
  const lanes::Mutant& mutant = index < num_left_out
                                    ? lanes::all_mutants().at(index)
                                    : lanes::moved_mutants().at(index - num_left_out);
  const lanes::Schedule* schedule = lanes::find_schedule(mutant.schedule);
  check_internal(schedule != nullptr, "a mutant without a schedule");
  lanes::mutation = {};
  lanes::mutation.step = is_mutated ? mutant.step : Step::kNone;
  lanes::mutation.is_moved = mutant.is_moved;
  const lanes::Outcome outcome = lanes::run(*schedule, mutant.choice);
  const bool is_reached = lanes::mutation.num_reached[mutant.step] > 0;
  lanes::mutation = {};
  return {std::string(mutant.name) + (mutant.is_moved ? ", moved" : ""), is_reached,
          outcome.num_wrong, HazardChecker().check(outcome.log)};
}

}  // namespace torch_offload
