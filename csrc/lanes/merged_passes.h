#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "check/state_words.h"
#include "core/pipeline.h"
#include "core/plan.h"
#include "lanes/lane.h"
#include "lanes/order_states.h"
#include "lanes/small_run.h"
#include "lanes/small_schedules.h"

namespace torch_offload {

#ifdef TORCH_OFFLOAD_MUTANTS
inline namespace mutants {  // see core/steps.h
#endif

/// All small schedules of a plan, where those that meet in a state go on as one.
/// See Note [Merged states].
class MergedPasses {
 public:
  MergedPasses(const SmallSchedules& schedules, const OrderStates& orders, const Plan& plan,
               const PipelineOptions& options, LaneJudge& judge)
      : schedules_(schedules), orders_(orders), plan_(plan), options_(options), judge_(judge) {}

  void run();

 private:
  /// The pipeline, what the checker keeps of its log, and its device.
  using State = std::uint32_t;

  /// What comes of one call, or of the end.
  struct Step {
    State next = 0;
    std::uint64_t num_ops = 0;
    std::uint64_t digest = 0;
    std::string fault;  // empty: none
  };

  /// A schedule up to some call of its second pass, or to its end.
  struct Way {
    std::uint32_t first = 0;
    std::uint32_t second = 0;  // by its number
    std::uint8_t num_calls = 0;
    bool first_completed = true;
    bool second_completed = true;
  };

  /// Schedules that have come to one state, and one of them.
  struct Arrivals {
    OrderStates::State order = 0;
    State state = 0;
    Way way;
    std::uint64_t num_schedules = 0;
    std::uint64_t num_ops = 0;  // of all of them, so far
    std::uint64_t digest = 0;   // likewise
  };

  struct WordsHash {
    std::size_t operator()(const StateWords& words) const;
  };

  /// Those that have made as many calls.
  struct Layer {
    std::unordered_map<std::uint64_t, std::size_t> indices;  // by order and state
    std::vector<Arrivals> arrivals;

    void add(const Arrivals& arrivals);
  };

  SmallSchedule schedule_of(const Way& way) const;
  Way further(Way way, UnitIndex unit) const;
  void begin(std::uint32_t first, bool completed, Layer& layer);
  void go_on(const Arrivals& from, UnitIndex unit, Layer& next);
  void end(Arrivals arrivals, bool completed);
  void give_up(const Arrivals& arrivals, const std::string& why);
  void note_bad(const Arrivals& arrivals, std::uint64_t num_schedules, const std::string& why);

  template <typename Run>
  Step attempt(const Run& run);
  Step run_call(const Way& way, UnitIndex unit);
  Step run_end(const Way& way);
  State state_of(SmallRun& run, const StateScope& scope);

  const SmallSchedules& schedules_;
  const OrderStates& orders_;
  const Plan& plan_;
  const PipelineOptions options_;
  LaneJudge& judge_;

  std::unordered_map<StateWords, State, WordsHash> states_;
  std::unordered_map<std::uint64_t, Step> calls_;  // by state, unit and the order's answers
  std::unordered_map<std::uint64_t, Step> ends_;   // by state, and whether it is completed
};

#ifdef TORCH_OFFLOAD_MUTANTS
}  // namespace mutants
#endif

}  // namespace torch_offload
