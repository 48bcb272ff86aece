#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "core/steps.h"

namespace torch_offload::lanes {

/// The call of the device that a step is.
enum class StepKind : std::uint8_t {
  kRecord,
  kWait,  ///< Of a step that orders two streams it is the wait that is moved.
  kSynchronize,
  kNone,  ///< A note, or the current stream put back.
};

inline StepKind kind_of(Step step) {
  switch (step) {
    case Step::kReadyRecord:
    case Step::kFreeRecord:
    case Step::kHandoverRecord:
    case Step::kStagedRecord:
    case Step::kDecodedRecord:
    case Step::kChunkRecord:
      return StepKind::kRecord;
    case Step::kReadyWait:
    case Step::kNestedReadyWait:
    case Step::kOwnPendingWait:
    case Step::kOverlapPendingWait:
    case Step::kEarlierStreamWait:
    case Step::kLaterStreamsJoin:
    case Step::kEnterOrder:
    case Step::kReturnOrder:
    case Step::kHandoverWait:
    case Step::kNewPlaceOrder:
    case Step::kOldPlaceWait:
    case Step::kStagedWait:
    case Step::kDecodedWait:
      return StepKind::kWait;
    case Step::kHostReadyWait:
    case Step::kHostFreeWait:
    case Step::kNewWindowDrain:
    case Step::kDrainOwnStreams:
    case Step::kDrainUsedStreams:
    case Step::kReplanDrain:
    case Step::kOnloadDrain:
    case Step::kNewStagingDrain:
    case Step::kUploadDrain:
    case Step::kChunkDrain:
    case Step::kLimitDrain:
    case Step::kOnceDrain:
    case Step::kFailedOnloadDrain:
    case Step::kFailedUploadDrain:
    case Step::kFailedAcquireDrain:
    case Step::kFailedReleaseDrain:
      return StepKind::kSynchronize;
    case Step::kPendingFree:
    case Step::kPendingReady:
    case Step::kOverlapForget:
    case Step::kHeldGuard:
    case Step::kPoisonForget:
    case Step::kLaterStreamsNote:
    case Step::kCallerReturn:
    case Step::kFailedAcquireReturn:
    case Step::kFailedReleaseReturn:
    case Step::kNone:
      break;
  }
  return StepKind::kNone;
}

/// Which step the pipeline leaves out, or takes at the wrong moment, from when on. Only the
/// submitting thread looks at it.
struct Mutation {
  Step step = Step::kNone;
  bool is_moved = false;  // else left out
  bool is_armed = false;
  bool is_due = false;                        // the next call of the step's kind is to be moved
  std::vector<std::size_t> moved_ops;         // by their place in the log
  std::map<Step, std::uint64_t> num_reached;  // how often each step was come to, armed or not

  /// The pipeline comes to a step. Returns whether it leaves that out.
  bool come_to(Step reached) {
    ++num_reached[reached];
    const bool is_it = is_armed && reached == step && step != Step::kNone;
    if (!is_moved) {
      return is_it;
    }
    // A drain that is several: its parts have steps of their own, as they are drains elsewhere.
    const bool goes_on = kind_of(step) != StepKind::kSynchronize || step == Step::kReplanDrain;
    is_due = is_it || (is_due && goes_on);
    return false;
  }
};
inline Mutation mutation;

}  // namespace torch_offload::lanes
