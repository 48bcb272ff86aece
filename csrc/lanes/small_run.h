#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "check/state_words.h"
#include "core/pipeline.h"
#include "core/plan.h"
#include "lanes/lane.h"
#include "lanes/pipeline_state.h"
#include "lanes/schedule_rig.h"
#include "lanes/small_schedules.h"

namespace torch_offload {

#ifdef TORCH_OFFLOAD_MUTANTS
inline namespace mutants {  // see core/steps.h
#endif

/// A small schedule on its way through the real pipeline, call by call.
class SmallRun {
 public:
  /// Runs the schedule, but for the end of its second pass, which goes on.
  SmallRun(const Plan& plan, const PipelineOptions& options, const SmallSchedule& schedule)
      : rig_(plan, options) {
    rig_.pipeline().enter();
    for (const UnitIndex unit : schedule.first) {
      rig_.call(unit);
    }
    // An exception in a unit and one behind it are the same calls: release, leave(false).
    rig_.pipeline().leave(schedule.first_completed);
    rig_.pipeline().enter();
    for (const UnitIndex unit : schedule.second) {
      rig_.call(unit);
    }
  }

  void call(UnitIndex unit) { rig_.call(unit); }
  void finish(bool completed) {
    rig_.pipeline().leave(completed);
    rig_.finish();
  }

  /// A hash of the ops since it was asked for last.
  std::uint64_t take_digest() {
    return digest_of(rig_.log(), std::exchange(digested_, rig_.log().ops().size()));
  }
  /// What later ops may name.
  StateScope scope() {
    StateScope scope{rig_.pipeline().streams(), PipelineState::awaitable_events(rig_.pipeline()),
                     rig_.generations()};
    scope.streams.push_back(rig_.device().current_stream());
    return scope;
  }
  const OpLog& log() const { return rig_.log(); }
  ScheduleRig& rig() { return rig_; }

 private:
  ScheduleRig rig_;
  std::size_t digested_ = 0;
};

#ifdef TORCH_OFFLOAD_MUTANTS
}  // namespace mutants
#endif

}  // namespace torch_offload
