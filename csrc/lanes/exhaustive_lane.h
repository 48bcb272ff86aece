#pragma once

#include <cstdint>
#include <functional>

#include "core/mode.h"
#include "lanes/lane.h"

namespace torch_offload {

/// Every plan of up to `max_units` units in up to `max_places` places, and on each two passes of up
/// to `max_calls` calls: any sequence of its units, skips and repeats included, completed or cut
/// short by an exception at any point, inside a unit and between two.
///
/// Of the second pass only those of `max_calls` calls are run: the log of a shorter one is the
/// beginning of theirs.
struct ExhaustiveLane {
  Mode mode = Mode::kPipeline;
  StreamLayout layout = StreamLayout::kShared;
  unsigned max_units = 5;
  unsigned max_places = 3;
  unsigned max_calls = 5;
  std::uint64_t stride = 1;  ///< Runs each stride-th schedule only: a slice.
  unsigned num_threads = 1;
  bool is_control = false;  ///< Leaves the waits out of each log, from one of them on.
  std::function<void(std::uint64_t)> progress;  ///< As RandomLane::progress.
};

/// Blocking: until all schedules are checked.
LaneReport run(const ExhaustiveLane& lane);

/// How many schedules there are, those not counted that are the beginning of another.
std::uint64_t count_schedules(const ExhaustiveLane& lane);

}  // namespace torch_offload
