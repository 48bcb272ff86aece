#include "core/order.h"

#include <algorithm>
#include <utility>

namespace torch_offload {

Order::Order(std::vector<UnitIndex> static_order)
    : static_order_(std::move(static_order)), expected_(&static_order_) {}

void Order::begin_pass() { current_.clear(); }

void Order::end_pass(bool completed) {
  if (current_.empty()) {
    return;
  }
  const UnitIndex first = current_.front();
  if (last_first_ != kNoUnit) {
    follower_[last_first_] = first;
  }
  last_first_ = first;
  if (completed) {
    passes_[first] = current_;
  }
  // What comes next is the start of the pass that is expected to follow this one.
  const std::vector<UnitIndex>* sequence = sequence_starting_with(first);
  expected_ = sequence_after(sequence != nullptr ? *sequence : static_order_);
  position_ = 0;
}

const std::vector<UnitIndex>* Order::sequence_starting_with(UnitIndex first) const {
  const auto found = passes_.find(first);
  return found == passes_.end() ? nullptr : &found->second;
}

const std::vector<UnitIndex>* Order::sequence_after(const std::vector<UnitIndex>& sequence) const {
  if (sequence.empty()) {
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
    const auto from = sequence->begin() + static_cast<std::ptrdiff_t>(
                                              std::min(position_, sequence->size()));
    auto found = std::find(from, sequence->end(), unit);
    if (found == sequence->end()) {
      found = std::find(sequence->begin(), from, unit);
      found = found == from ? sequence->end() : found;
    }
    if (found != sequence->end()) {
      expected_ = sequence;
      position_ = static_cast<std::size_t>(found - sequence->begin()) + 1;
      return false;
    }
  }
  return false;
}

UnitIndex Order::Walk::next() {
  if (position_ >= sequence_->size()) {
    sequence_ = order_.sequence_after(*sequence_);
    position_ = 0;
  }
  return sequence_->empty() ? kNoUnit : (*sequence_)[position_++];
}

}  // namespace torch_offload
