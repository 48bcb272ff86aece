// Where units have their places: in the window, as the plan says, until there is another plan; and
// a few in places of their own.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/pipeline.h"

namespace torch_offload {

namespace {

std::vector<UnitIndex> streamed_units(const Plan& plan) {
  std::vector<UnitIndex> order;
  for (UnitIndex unit = 0; unit < plan.units.size(); ++unit) {
    if (!plan.is_resident(unit)) {
      order.push_back(unit);
    }
  }
  return order;
}

}  // namespace

void Pipeline::replan(Plan plan) {
  if (in_pass()) {
    throw StateError("expected replan between forwards, got it while one is running");
  }
  check_internal(plan.places.size() == plan.units.size(), "a plan without places");
  make_events(plan);  // first, while a failure changes nothing
  if (!is_left_out(Step::kReplanDrain)) {
    synchronize();  // who copies next will not ask for the uses of this plan
  }
  own_places_.clear();
  if (window_ && plan.window_bytes == window_bytes()) {
    adopt(std::move(plan));
    return;
  }
  const std::size_t former_bytes = window_bytes();
  window_.reset();  // first: there need not be room for both
  try {
    window_.emplace(device_, plan.window_bytes);
    // As in the constructor.
    steps_.synchronize(device_.current_stream(), Step::kNewWindowDrain);
  } catch (...) {
    window_.reset();
    try {
      window_.emplace(device_, former_bytes);
      steps_.quiesce(device_.current_stream(), Step::kNewWindowDrain);
    } catch (const std::exception&) {
      window_.reset();
    }
    // Units that had places of their own are back in those that overlap others.
    plan_.overlaps = overlaps_of(plan_.places);
    adopt(std::move(plan_));
    throw;
  }
  adopt(std::move(plan));
}

void Pipeline::return_to(Plan plan) {
  try {
    replan(plan);
  } catch (const std::exception&) {
    own_places_.clear();
    window_.reset();
    adopt(std::move(plan));
  }
}

void Pipeline::adopt(Plan plan) {
  std::vector<UnitState> states = states_of(plan);
  order_ = std::make_unique<Order>(streamed_units(plan));
  plan_ = std::move(plan);
  states_ = std::move(states);
  unit_stats_.assign(plan_.units.size(), UnitStats{});
  current_ = kNoUnit;
  note_queues();
}

void Pipeline::make_events(const Plan& plan) {
  const std::size_t num_needed = 2 * streamed_units(plan).size();
  while (unit_events_.size() < num_needed) {
    unit_events_.push_back(device_.create_event());
  }
}

std::vector<Pipeline::UnitState> Pipeline::states_of(const Plan& plan) const {
  // Events may have been recorded for units of an earlier plan. Nobody waits for that, as nothing
  // is whole or pending here.
  std::vector<UnitState> states(plan.units.size());
  auto next_event = unit_events_.begin();
  for (UnitIndex unit = 0; unit < states.size(); ++unit) {
    if (const std::optional<ByteRange>& place = plan.places[unit]; place && window_) {
      states[unit].memory = window_->memory() + place->begin;
      states[unit].ready = *next_event++;
      states[unit].free = *next_event++;
    }
  }
  return states;
}

void Pipeline::set_transport(UnitIndex unit, Transport transport) {
  if (plan_.transports.empty()) {
    plan_.transports.assign(plan_.units.size(), Transport::kRaw);
  }
  plan_.transports.at(unit) = transport;
  note_queues();
}

void Pipeline::note_queues() {
  has_copied_units_ = has_packed_units_ = false;
  for (const UnitIndex unit : streamed_units(plan_)) {
    (is_in_decode_queue(unit) ? has_packed_units_ : has_copied_units_) = true;
  }
}

void Pipeline::give_own_place(UnitIndex unit) {
  UnitState& state = states_[unit];
  // Whoever writes into the old place next will no longer ask this unit for its last use.
  for (const StreamId writer : writers()) {
    await_users(state, writer, Step::kOldPlaceWait);
  }
  state.set_pending(kNoEvent);
  own_places_.emplace_back(device_, plan_.units[unit].size_bytes);
  // The allocator may hand out memory that kernels of the current stream still use.
  const StreamId current = device_.current_stream();
  const StreamId writer = loader_.first_writer(unit, copy_stream(unit));
  if (writer != current) {
    order_after(writer, current, Step::kNewPlaceOrder);
  }
  for (const UnitIndex other : plan_.overlaps[unit]) {
    auto& back = plan_.overlaps[other];
    back.erase(std::remove(back.begin(), back.end(), unit), back.end());
  }
  plan_.overlaps[unit].clear();
  state.memory = own_places_.back().memory();
  ++stats_.extra_places;
}

bool Pipeline::owns(const void* address) const {
  const auto lies_in = [address](const DeviceMemory& memory) {
    const AddressRange range = AddressRange::of(memory.memory(), memory.size_bytes());
    const auto point = reinterpret_cast<std::uintptr_t>(address);
    return range.begin <= point && point < range.end;
  };
  return (window_ && lies_in(*window_)) ||
         std::any_of(own_places_.begin(), own_places_.end(), lies_in);
}

}  // namespace torch_offload
