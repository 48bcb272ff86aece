#include "core/order.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace torch_offload {

Order::Order(std::vector<UnitIndex> static_order)
    : static_order_(std::move(static_order)), expected_(&static_order_) {}

void Order::begin_pass() { current_.clear(); }

void Order::end_pass(bool completed) {
  if (current_.empty()) {
    return;
  }
  if (completed) {
    const UnitIndex first = current_.front();
    // Where a run of like passes ends says nothing about where the next run will end: a decoder is
    // expected to go on, for only the end of the run is a surprise then.
    if (last_first_ != kNoUnit && !last_is_repeat_) {
      follower_[last_first_] = first;
    }
    last_is_repeat_ = first == last_first_;
    last_first_ = first;
    passes_[first] = current_;
  }
  // What comes next is the start of the pass that is expected to follow the last completed one.
  const std::vector<UnitIndex>* last = sequence_starting_with(last_first_);
  expected_ = last != nullptr ? sequence_after(*last, last_is_repeat_) : &static_order_;
  position_ = 0;
}

const std::vector<UnitIndex>* Order::sequence_starting_with(UnitIndex first) const {
  const auto found = passes_.find(first);
  return found == passes_.end() ? nullptr : &found->second;
}

const std::vector<UnitIndex>* Order::sequence_after(const std::vector<UnitIndex>& sequence,
                                                    bool is_repeat) const {
  if (sequence.empty() || is_repeat) {
    return &sequence;
  }
  const auto follower = follower_.find(sequence.front());
  const UnitIndex first = follower == follower_.end() ? sequence.front() : follower->second;
  const std::vector<UnitIndex>* next = sequence_starting_with(first);
  return next != nullptr ? next : &sequence;
}

bool Order::advance(UnitIndex unit) {
  current_.push_back(unit);
  if (current_.size() == 1) {
    // The first unit tells which pass this is.
    const std::vector<UnitIndex>* known = sequence_starting_with(unit);
    const bool was_expected =
        position_ < expected_->size() ? (*expected_)[position_] == unit : false;
    if (known != nullptr && (expected_ != known || !was_expected)) {
      expected_ = known;
      position_ = 1;
      return was_expected;
    }
  }
  if (position_ < expected_->size() && (*expected_)[position_] == unit) {
    ++position_;
    return true;
  }
  // Resynchronize: the nearest later place of this unit, else the nearest earlier one, else the
  // static order, which holds every unit.
  for (const std::vector<UnitIndex>* sequence : {expected_, &std::as_const(static_order_)}) {
    const auto from =
        sequence->begin() + static_cast<std::ptrdiff_t>(std::min(position_, sequence->size()));
    auto found = std::find(from, sequence->end(), unit);
    if (found == sequence->end()) {
      const auto before = std::find(std::make_reverse_iterator(from), sequence->rend(), unit);
      found = before == sequence->rend() ? sequence->end() : std::prev(before.base());
    }
    if (found != sequence->end()) {
      expected_ = sequence;
      position_ = static_cast<std::size_t>(found - sequence->begin()) + 1;
      return false;
    }
  }
  return false;
}

Order::Walk::Walk(const Order& order)
    : order_(order),
      sequence_(order.expected_),
      position_(order.position_),
      is_repeat_(!sequence_->empty() && sequence_->front() == order.last_first_) {}

UnitIndex Order::Walk::next() {
  if (position_ >= sequence_->size()) {
    const std::vector<UnitIndex>* following = order_.sequence_after(*sequence_, is_repeat_);
    is_repeat_ = following == sequence_;
    sequence_ = following;
    position_ = 0;
  }
  return sequence_->empty() ? kNoUnit : (*sequence_)[position_++];
}

}  // namespace torch_offload
