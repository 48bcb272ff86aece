#pragma once

#include <cstdint>
#include <vector>

#include "core/op_log.h"
#include "lanes/lane.h"

namespace torch_offload {

/// Random plans, orders, modes, layouts and depths, nested calls, calls that fail, edits, callers
/// that change streams, loaders that are told what comes, devices that fail, at the very end too:
/// each schedule drawn from its seed alone, 0, 1, 2, ...
class RandomLane {
 public:
  /// `is_control`: leaves the waits out of each log, from one of them on.
  explicit RandomLane(unsigned num_threads = 1, bool is_control = false);

  /// Blocking: until the next `num_schedules` are checked.
  void advance(std::uint64_t num_schedules);
  LaneReport report() { return sum_of(judges_); }

 private:
  std::vector<LaneJudge> judges_;  // one for each thread
  std::uint64_t next_seed_ = 0;
};

/// The log of one schedule.
OpLog random_schedule(std::uint64_t seed);

}  // namespace torch_offload
