#pragma once

#include <vector>

#include "lanes/schedule_rig.h"

namespace torch_offload {

// Ends of a schedule on a device that fails. Each throws std::logic_error where the pipeline does
// not keep its word.

/// Without a failure: all that was taken is given back.
void end_well(ScheduleRig& rig);
/// The `call`-th call of the last drain fails: that one is made again, and all is given back.
void end_with_a_failing_drain(ScheduleRig& rig, int call);
/// Some streams never come to an end: all that they may read or write stays where it is, and there
/// is a word for each on standard error.
void end_with_lost_streams(ScheduleRig& rig, const std::vector<StreamId>& lost);

}  // namespace torch_offload
