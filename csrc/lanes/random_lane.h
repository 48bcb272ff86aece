#pragma once

#include <cstdint>
#include <functional>

#include "core/op_log.h"
#include "lanes/lane.h"

namespace torch_offload {

/// Random plans, orders, modes, layouts and depths, nested calls, calls that fail, edits, callers
/// that change streams, devices that fail: each schedule drawn from its seed alone.
struct RandomLane {
  std::uint64_t first_seed = 0;
  std::uint64_t num_schedules = 0;
  unsigned num_threads = 1;
  bool is_control = false;  ///< Leaves the waits out of each log, from one of them on.
  /// Told now and then how many schedules are done; may be empty. Called on any thread, one at a
  /// time.
  std::function<void(std::uint64_t)> progress;
};

/// Blocking: until all schedules are checked.
LaneReport run(const RandomLane& lane);

/// The log of one schedule.
OpLog random_schedule(std::uint64_t seed);

}  // namespace torch_offload
