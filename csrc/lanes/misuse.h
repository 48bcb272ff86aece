#pragma once

#include <cstddef>

#include "core/unit.h"
#include "lanes/schedule_rig.h"

namespace torch_offload {

/// Calls that the pipeline must refuse, leaving no trace of them. Each function throws
/// std::logic_error if one was not refused.
class Misuse {
 public:
  explicit Misuse(ScheduleRig& rig) : rig_(rig) {}

  void between_passes(UnitIndex unit);
  /// Behind a replan for which there was no room, nor for the former window.
  void without_memory(UnitIndex unit);
  /// While `held` is in use, in its place; `other` is any unit.
  void in_a_use(UnitIndex held, const std::byte* place, UnitIndex other);

 private:
  void from_another_thread(UnitIndex unit);

  ScheduleRig& rig_;
};

}  // namespace torch_offload
