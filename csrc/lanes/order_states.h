#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "check/state_words.h"
#include "core/order.h"
#include "lanes/small_schedules.h"

namespace torch_offload {

/// What the later calls of an order depend on, within the last pass that anybody asks about.
class OrderState {
 public:
  static void append(const Order& order, StateWords& words);
};

/// All states of the real order in the second pass of small schedules, and what it answers there.
class OrderStates {
 public:
  using State = std::uint32_t;
  using Answers = std::uint32_t;

  struct Step {
    State next = 0;
    Answers answers = 0;  ///< Equal numbers: it gives the pipeline equal answers in this call.
  };

  explicit OrderStates(const SmallSchedules& schedules);

  /// Behind the first pass, by its number.
  State start(std::size_t first, bool completed) const {
    return starts_[2 * first + (completed ? 1 : 0)];
  }
  const Step& step(State state, UnitIndex unit) const { return steps_[state * num_units_ + unit]; }

 private:
  State find(const Order& order, const SmallSchedule& schedule);

  const std::size_t num_units_;
  std::vector<State> starts_;
  std::vector<Step> steps_;
  std::vector<SmallSchedule> ways_;  // by State: the first one that has come there
  std::map<StateWords, State> states_;
  std::map<StateWords, Answers> answers_;
};

}  // namespace torch_offload
