#include "lanes/order_states.h"

#include <numeric>

#include "core/error.h"

namespace torch_offload {

namespace {

/// Goes where the schedule goes.
void go(Order& order, const SmallSchedule& schedule) {
  order.begin_pass();
  for (const UnitIndex unit : schedule.first) {
    order.advance(unit);
  }
  order.end_pass(schedule.first_completed);
  order.begin_pass();
  for (const UnitIndex unit : schedule.second) {
    order.advance(unit);
  }
}

std::vector<UnitIndex> static_order(std::size_t num_units) {
  std::vector<UnitIndex> units(num_units);
  std::iota(units.begin(), units.end(), 0U);
  return units;
}

}  // namespace

void OrderState::append(const Order& order, StateWords& words) {
  // Every field is named: one that is new does not compile until it was thought of here.
  const auto& [static_order, passes, follower, last_first, last_is_repeat, current, expected,
               position] = order;
  UnitIndex expected_first = kNoUnit;  // stands for the static order, which never changes
  words.push_back(passes.size());
  for (const auto& [first, sequence] : std::map(passes.begin(), passes.end())) {
    words.insert(words.end(), {first, sequence.size()});
    words.insert(words.end(), sequence.begin(), sequence.end());
  }
  for (const auto& [first, sequence] : passes) {
    expected_first = &sequence == expected ? first : expected_first;
  }
  check_internal(expected == &static_order || expected_first != kNoUnit,
                 "an order that expects a pass it does not know");
  words.push_back(follower.size());
  for (const auto& [first, next] : std::map(follower.begin(), follower.end())) {
    words.insert(words.end(), {first, next});
  }
  // Of this pass only whether it has begun: nobody will ask for what is learned from it.
  words.insert(words.end(), {last_first, last_is_repeat ? 1U : 0U, expected_first, position,
                             current.empty() ? 0U : 1U});
}

OrderStates::OrderStates(const SmallSchedules& schedules) : num_units_(schedules.num_units()) {
  for (const SmallSchedule::Sequence& first : schedules.sequences()) {
    for (const bool completed : {false, true}) {
      const SmallSchedule schedule{first, completed, {}, true};
      Order order(static_order(num_units_));
      go(order, schedule);
      starts_.push_back(find(order, schedule));
    }
  }
  // Those that come on the way are appended behind; the last calls lead nowhere.
  // NOLINTNEXTLINE(modernize-loop-convert): it grows on the way
  for (State state = 0; state < ways_.size(); ++state) {
    for (UnitIndex unit = 0; unit < num_units_; ++unit) {
      SmallSchedule way = ways_[state];
      Order order(static_order(num_units_));
      go(order, way);
      StateWords answers{order.advance(unit) ? 1U : 0U};
      // The pipeline looks no further ahead than a plan has units.
      Order::Walk walk = order.walk();
      for (std::size_t i = 0; i < num_units_; ++i) {
        answers.push_back(walk.next());
      }
      way.second.push_back(unit);
      const Answers number =
          answers_.try_emplace(answers, static_cast<Answers>(answers_.size())).first->second;
      steps_.push_back({find(order, way), number});
    }
  }
}

OrderStates::State OrderStates::find(const Order& order, const SmallSchedule& schedule) {
  StateWords words;
  OrderState::append(order, words);
  const auto [found, is_new] = states_.try_emplace(words, static_cast<State>(ways_.size()));
  if (is_new) {
    ways_.push_back(schedule);
  }
  return found->second;
}

}  // namespace torch_offload
