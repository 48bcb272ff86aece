#pragma once

#include <cstdint>
#include <vector>

#include "core/mode.h"
#include "core/plan.h"
#include "core/unit.h"
#include "lanes/lane.h"

namespace torch_offload {

struct ExhaustiveOptions {
  Mode mode = Mode::kPipeline;
  StreamLayout layout = StreamLayout::kShared;
  /// How units travel: the first in the first way, the next in the next, and so on in turn.
  std::vector<Transport> transports = {Transport::kRaw};
  unsigned max_units = 5;
  unsigned max_places = 3;
  unsigned max_calls = 5;
  std::uint64_t stride = 1;  ///< Runs each stride-th schedule only: a slice.
  unsigned num_threads = 1;
  bool is_control = false;  ///< Leaves the waits out of each log, from one of them on.
};

/// Every plan of up to `max_units` units in up to `max_places` places, and on each two passes of up
/// to `max_calls` calls: any sequence of its units, skips and repeats included, completed or cut
/// short by an exception at any point, inside a unit and between two.
///
/// Of the second pass only those of `max_calls` calls are run: the log of a shorter one is the
/// beginning of theirs.
class ExhaustiveLane {
 public:
  explicit ExhaustiveLane(const ExhaustiveOptions& options);

  /// How many schedules there are, those not counted that are the beginning of another.
  std::uint64_t count() const { return (num_schedules_ + options_.stride - 1) / options_.stride; }

  /// Checks some more schedules, `num_schedules` or those of a few first passes above that.
  /// Returns whether there are others left.
  /// Blocking: until they are checked.
  bool advance(std::uint64_t num_schedules);
  LaneReport report() { return sum_of(judges_); }

 private:
  using Sequence = std::vector<UnitIndex>;

  struct FirstPass {
    Sequence sequence;
    bool completed = true;
  };

  /// All schedules of so many units: each plan after each first pass is a block of them.
  struct Level {
    unsigned num_units = 0;
    std::vector<Plan> plans;
    std::vector<FirstPass> firsts;
    std::uint64_t num_seconds = 0;
    std::uint64_t first_block = 0;
    std::uint64_t first_schedule = 0;

    std::uint64_t num_blocks() const { return plans.size() * firsts.size(); }
  };

  void add_level(unsigned num_units);
  std::uint64_t run_block(std::uint64_t block, LaneJudge& judge) const;

  const ExhaustiveOptions options_;
  std::vector<Level> levels_;
  std::uint64_t num_blocks_ = 0;
  std::uint64_t num_schedules_ = 0;
  std::uint64_t next_block_ = 0;
  std::vector<LaneJudge> judges_;  // one for each thread
};

}  // namespace torch_offload
