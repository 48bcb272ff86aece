#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/mode.h"
#include "core/pipeline.h"
#include "core/plan.h"
#include "lanes/lane.h"
#include "lanes/order_states.h"
#include "lanes/small_schedules.h"

namespace torch_offload {

#ifdef TORCH_OFFLOAD_MUTANTS
inline namespace mutants {  // see core/steps.h
#endif

struct ExhaustiveOptions {
  Mode mode = Mode::kPipeline;
  StreamLayout layout = StreamLayout::kShared;
  /// How units travel: the first in the first way, the next in the next, and so on in turn.
  std::vector<Transport> transports = {Transport::kRaw};
  unsigned max_units = 5;
  unsigned max_places = 3;
  unsigned max_calls = 5;
  /// Schedules that meet in a state go on as one; else each runs by itself, with the same report.
  bool merges = true;
  unsigned num_threads = 1;
  bool is_control = false;  ///< Leaves the waits out of each log, from one of them on.
};

/// Every plan of up to `max_units` units in up to `max_places` places, and on each two passes of up
/// to `max_calls` calls: any sequence of its units, skips and repeats included, completed or cut
/// short by an exception at any point, inside a unit and between two.
class ExhaustiveLane {
 public:
  explicit ExhaustiveLane(const ExhaustiveOptions& options);

  /// How many schedules there are.
  std::uint64_t count() const { return num_schedules_; }

  /// Checks some more schedules, `num_schedules` or a few more, of those that go together.
  /// Returns whether there are others left.
  /// Blocking: until they are checked.
  bool advance(std::uint64_t num_schedules);
  LaneReport report() { return sum_of(judges_); }

 private:
  /// All schedules of so many units. A block are those of a plan, or if each runs by itself, those
  /// of a plan that have the first pass in common.
  struct Level {
    SmallSchedules schedules;
    std::uint64_t first_block = 0;
    std::uint64_t blocks_per_plan = 0;
    std::unique_ptr<const OrderStates> orders;  // once they are needed
  };

  void run_block(std::uint64_t block, LaneJudge& judge) const;
  void run_each(const SmallSchedules& schedules, const Plan& plan, SmallSchedule schedule,
                LaneJudge& judge) const;
  PipelineOptions pipeline_options() const;

  const ExhaustiveOptions options_;
  std::vector<Level> levels_;
  std::uint64_t num_blocks_ = 0;
  std::uint64_t num_schedules_ = 0;
  std::uint64_t next_block_ = 0;
  std::vector<LaneJudge> judges_;  // one for each thread
};

#ifdef TORCH_OFFLOAD_MUTANTS
}  // namespace mutants
#endif

}  // namespace torch_offload
