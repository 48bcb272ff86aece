#include "core/pipeline.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <numeric>
#include <utility>

#include "core/error.h"

// Note [Ready and free]
// Every unit has two events. `ready` is recorded behind the copy into its place; whoever uses the
// unit waits for it on the stream that reads. `free` is recorded behind the last kernel of a use,
// on the stream that really ran it; whoever copies into bytes of that place waits for it. A place
// whose unit is acquired, or copied and not yet used, has no free event to wait for: no prefetch
// is issued into it. These two waits are the whole of the correctness argument; everything else
// here decides only *when* a copy is issued. How streams are ordered is in pipeline_streams.cpp;
// what each step closes is in steps.h.

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

constexpr std::uint8_t kPoison = 0xFF;  // NaN in every floating-point type

}  // namespace

Pipeline::Pipeline(Device& device, Loader& loader, Plan plan, const PipelineOptions& options)
    : device_(device),
      loader_(loader),
      plan_(std::move(plan)),
      options_(options),
      policy_(policy_of(options.mode)),
      order_(std::make_unique<Order>(streamed_units(plan_))),
      window_(device, plan_.window_bytes),
      unit_stats_(plan_.units.size()) {
  const bool split = options_.layout == StreamLayout::kSplit;
  if (split && !policy_.has_copy_stream) {
    throw ValueError(
        "expected mode 'sync' with streams='shared', got streams='split': sync knows one stream; "
        "use mode='streams' to synchronize between streams of their own");
  }
  if (split) {
    copy_streams_ = {device_.create_stream({"weight_h2d_mha", StreamRole::kCopy, -1}),
                     device_.create_stream({"weight_h2d_ffn", StreamRole::kCopy, 0})};
    compute_streams_ = {device_.create_stream({"compute_mha", StreamRole::kCompute, -1}),
                        device_.create_stream({"compute_ffn", StreamRole::kCompute, 0})};
  } else if (policy_.has_copy_stream) {
    copy_streams_.fill(device_.create_stream({"weight_h2d", StreamRole::kCopy, -1}));
  }
  handover_ = device_.create_event();
  // The allocator may have handed out memory that kernels of the current stream still use.
  synchronize(device_.current_stream(), Step::kNewWindowDrain);
  states_ = states_of(plan_);
}

std::vector<Pipeline::UnitState> Pipeline::states_of(const Plan& plan) {
  std::vector<EventId> unused;  // events of the plan before
  for (const UnitState& state : states_) {
    if (state.ready != kNoEvent) {
      unused.insert(unused.end(), {state.ready, state.free});
    }
  }
  const auto next_event = [&] {
    if (unused.empty()) {
      return device_.create_event();
    }
    const EventId event = unused.back();
    unused.pop_back();
    return event;
  };
  std::vector<UnitState> states(plan.units.size());
  for (UnitIndex unit = 0; unit < states.size(); ++unit) {
    if (const std::optional<ByteRange>& place = plan.places[unit]) {
      states[unit].memory = window_.memory() + place->begin;
      states[unit].ready = next_event();
      states[unit].free = next_event();
    }
  }
  return states;
}

void Pipeline::replan(Plan plan) {
  if (in_pass()) {
    throw StateError("expected replan between forwards, got it while one is running");
  }
  if (plan.window_bytes > window_bytes()) {
    throw ValueError("expected a plan for a window of at most " + std::to_string(window_bytes()) +
                     " bytes, which is there, got one for " + std::to_string(plan.window_bytes));
  }
  std::vector<UnitState> states = states_of(plan);
  if (!is_left_out(Step::kReplanDrain)) {
    synchronize();  // who copies next will not ask for the uses of this plan
  }
  order_ = std::make_unique<Order>(streamed_units(plan));
  plan_ = std::move(plan);
  states_ = std::move(states);
  unit_stats_.assign(plan_.units.size(), UnitStats{});
  own_places_.clear();
  current_ = kNoUnit;
}

Pipeline::~Pipeline() {
  if (device_.in_forked_child()) {
    return;
  }
  try {
    synchronize();  // masters and window go next: nothing may be in flight from or to them
  } catch (const std::exception& error) {
    std::fprintf(stderr, "torch_offload: could not drain the copies: %s\n", error.what());
  }
}

// --- passes ------------------------------------------------------------------------------------

bool Pipeline::is_mine() const {
  const std::thread::id owner = owner_.load();
  return owner == std::thread::id() || owner == std::this_thread::get_id();
}

void Pipeline::enter() {
  if (device_.in_forked_child()) {
    throw StateError(
        "expected a forward in the process that called offload(), got one in a forked child, "
        "where streams and pinned memory do not exist; use the 'spawn' start method, or call the "
        "model in the parent");
  }
  std::thread::id owner{};
  if (!owner_.compare_exchange_strong(owner, std::this_thread::get_id()) &&
      owner != std::this_thread::get_id()) {
    throw StateError(
        "expected one forward at a time per offloaded model, got a call from a second thread while "
        "one is running; guard the model with a lock, or offload one model per thread");
  }
  if (nesting_++ == 0) {
    ++pass_;
    order_->begin_pass();
  }
}

void Pipeline::leave(bool completed) {
  check_internal(owner_.load() == std::this_thread::get_id(), "leave without enter");
  if (--nesting_ == 0) {
    order_->end_pass(completed);
    forget_expectations();  // an early exit's are stale, and the next acquire has its own
    stats_.forwards += completed ? 1 : 0;
    owner_.store(std::thread::id());
  }
}

// --- one unit ----------------------------------------------------------------------------------

std::byte* Pipeline::acquire(UnitIndex unit) {
  UnitState& state = states_.at(unit);
  // The owner first: only its thread may look at anything else.
  if (owner_.load() != std::this_thread::get_id() || state.memory == nullptr) {
    throw StateError(
        "expected acquire of a streamed unit inside a pass of this thread, got unit '" +
        plan_.units[unit].name + "'");
  }
  if (!order_->advance(unit)) {
    forget_expectations();
  }
  if (state.acquired > 0) {  // called again inside its own call
    const StreamId stream = device_.current_stream();
    wait(stream, state.ready, Step::kNestedReadyWait);
    if (note_stream(state, stream)) {
      begin_read(unit, stream);
    }
    ++state.acquired;
    return state.memory;
  }

  if (!state.whole) {
    onload_on_demand(unit);
    ++stats_.misses;
    ++unit_stats_[unit].misses;
  } else if (!state.fresh) {
    ++stats_.hits;
  }
  try {
    const StreamId stream = enter_compute_stream(unit);
    if (stream != state.used_on && state.pending[0] == state.free) {
      // Used before on another stream and not copied since: `free` will be recorded anew behind
      // this use, so it must cover the earlier one as well.
      wait(stream, state.free, Step::kEarlierStreamWait);
    }
    state.acquired = 1;
    state.used_on = stream;
    state.awaited = false;
    state.fresh = false;
    current_ = unit;
    ask_for_readiness(unit);
    if (policy_.host_synchronizes) {
      synchronize(state.loaded_on, Step::kHostReadyWait);
    } else {
      wait(stream, state.ready, Step::kReadyWait);  // the copy may still be under way
    }
    prefetch_ahead();
    begin_read(unit, stream);  // last: a unit that could not be acquired was not read
  } catch (...) {
    // No kernel was submitted, so there is no use to wait for: only the hold is given back.
    state.acquired = 0;
    if (policy_.host_synchronizes) {
      // In these modes no event tells the next copy of this one.
      quiesce(state.loaded_on, Step::kFailedAcquireDrain);
    }
    return_to_caller(state, Step::kFailedAcquireReturn);
    throw;
  }
  ++unit_stats_[unit].acquired;
  return state.memory;
}

void Pipeline::release(UnitIndex unit) {
  UnitState& state = held_state(unit);
  const StreamId stream = device_.current_stream();
  const bool is_last = --state.acquired == 0;  // at once: whatever fails below, it is let go
  try {
    // The module may have left another stream current than it found: the use ends there as well.
    note_stream(state, stream);
    if (!is_last) {
      return;
    }
    for (const StreamId other : state.also_used_on) {
      end_read(unit, other);
    }
    end_read(unit, state.used_on);
    for (const StreamId other : state.also_used_on) {
      order_after(state.used_on, other, Step::kLaterStreamsJoin);
    }
    if (options_.poison_on_release) {
      if (!is_left_out(Step::kPoisonForget)) {
        forget(state);
      }
      device_.fill(state.used_on, state.memory, plan_.units[unit].size_bytes, kPoison, unit);
    }
    if (policy_.host_synchronizes) {
      synchronize(state.used_on, Step::kHostFreeWait);
      state.pending.fill(kNoEvent);
    } else {
      record(state.free, state.used_on, Step::kFreeRecord);
      // `ready` was waited for by this use: `free` covers it.
      state.pending.fill(is_left_out(Step::kPendingFree) ? kNoEvent : state.free);
      if (options_.wait_for_each) {
        device_.synchronize(state.used_on);
      }
    }
    leave_compute_stream(state);
  } catch (...) {
    if (is_last && state.left != kNoStream) {
      device_.leave_stream(state.used_on);
    }
    // Nobody can wait for this use any more, so it must have ended.
    quiesce(state.used_on, Step::kFailedReleaseDrain);
    for (const StreamId other : state.also_used_on) {
      quiesce(other, Step::kFailedReleaseDrain);
    }
    if (is_last) {
      state.also_used_on.clear();
      state.whole = state.awaited = false;
      return_to_caller(state, Step::kFailedReleaseReturn);
    }
    throw;
  }
  state.also_used_on.clear();
  prefetch_ahead();
}

bool Pipeline::owns(const void* address) const {
  const auto lies_in = [address](const DeviceMemory& memory) {
    const AddressRange range = AddressRange::of(memory.memory(), memory.size_bytes());
    const auto point = reinterpret_cast<std::uintptr_t>(address);
    return range.begin <= point && point < range.end;
  };
  return lies_in(window_) || std::any_of(own_places_.begin(), own_places_.end(), lies_in);
}

/// Remembers that the unit is used on `stream`. Returns whether that is news.
bool Pipeline::note_stream(UnitState& state, StreamId stream) {
  std::vector<StreamId>& also = state.also_used_on;
  if (is_left_out(Step::kLaterStreamsNote) || stream == state.used_on ||
      std::find(also.begin(), also.end(), stream) != also.end()) {
    return false;
  }
  also.push_back(stream);
  return true;
}

void Pipeline::begin_read(UnitIndex unit, StreamId stream) {
  const UnitState& state = states_[unit];
  device_.begin_read(stream, state.memory, plan_.units[unit].size_bytes, unit, state.generation);
}

void Pipeline::end_read(UnitIndex unit, StreamId stream) {
  const UnitState& state = states_[unit];
  device_.end_read(stream, state.memory, plan_.units[unit].size_bytes, unit, state.generation);
}

Pipeline::UnitState& Pipeline::held_state(UnitIndex unit) {
  UnitState& state = states_.at(unit);
  check_internal(state.acquired > 0, "release without acquire");
  return state;
}

/// While every onload is waited for, none can be under way: one that is was waited for in vain.
void Pipeline::ask_for_readiness(UnitIndex unit) {
  if (options_.wait_for_each && !device_.is_done(states_[unit].ready) && options_.warn != nullptr) {
    options_.warn("possible race: the copy of unit '" + plan_.units[unit].name +
                  "' was waited for, and its event says that it is not done; read now, the weights "
                  "would be others");
  }
}

void Pipeline::invalidate(UnitIndex unit) {
  UnitState& state = states_.at(unit);
  if (state.acquired > 0) {
    throw StateError("expected the weights of unit '" + plan_.units[unit].name +
                     "' to be edited between forwards, got an edit while it is in use");
  }
  forget(state);
}

void Pipeline::forget(UnitState& state) { state.whole = state.awaited = state.fresh = false; }

// --- copies ------------------------------------------------------------------------------------

std::size_t Pipeline::copy_stream_index(UnitIndex unit) const {
  return options_.layout == StreamLayout::kSplit ? static_cast<std::size_t>(plan_.units[unit].kind)
                                                 : 0;
}

StreamId Pipeline::copy_stream(UnitIndex unit) {
  return policy_.has_copy_stream ? copy_streams_[copy_stream_index(unit)]
                                 : device_.current_stream();
}

bool Pipeline::may_overwrite(UnitIndex unit, bool awaited_too) const {
  const auto blocks = [&](UnitIndex other) {
    return (states_[other].acquired > 0 && !is_left_out(Step::kHeldGuard)) ||
           (states_[other].awaited && !awaited_too);
  };
  return !blocks(unit) &&
         std::none_of(plan_.overlaps[unit].begin(), plan_.overlaps[unit].end(), blocks);
}

/// Submits the copy of `unit` into its place. The caller has made sure that it may_overwrite.
void Pipeline::onload(UnitIndex unit) {
  UnitState& state = states_[unit];
  const StreamId stream = copy_stream(unit);
  const std::size_t index = copy_stream_index(unit);

  const auto await_users = [&](UnitState& other, Step step) {
    if (other.pending[index] != kNoEvent) {
      // Write-after-read: its last kernels may still read these bytes. Or write-after-write: a
      // copy on another stream may still fill them.
      wait(stream, other.pending[index], step);
      other.pending[index] = kNoEvent;
    }
  };
  await_users(state, Step::kOwnPendingWait);
  forget(state);
  for (const UnitIndex other : plan_.overlaps[unit]) {
    await_users(states_[other], Step::kOverlapPendingWait);
    if (!is_left_out(Step::kOverlapForget)) {
      forget(states_[other]);
    }
  }

  ++state.generation;
  StreamId loaded_on = stream;
  try {
    loaded_on = loader_.load(unit, state.memory, stream, state.generation);
    record(state.ready, loaded_on, Step::kReadyRecord);
    if (options_.wait_for_each) {
      device_.synchronize(loaded_on);
    }
  } catch (...) {
    // Part of the copy may be under way, and no event tells when it ends.
    quiesce(stream, Step::kFailedOnloadDrain);
    if (loaded_on != stream) {
      quiesce(loaded_on, Step::kFailedOnloadDrain);
    }
    throw;
  }
  state.loaded_on = loaded_on;
  for (std::size_t i = 0; i < kNumKinds; ++i) {
    const bool is_ordered_already = policy_.host_synchronizes ||
                                    copy_streams_[i] == state.loaded_on ||
                                    is_left_out(Step::kPendingReady);
    state.pending[i] = is_ordered_already ? kNoEvent : state.ready;
  }
  state.whole = state.fresh = true;
  state.copied_in_pass = pass_;
  ++stats_.onloads;
  ++unit_stats_[unit].onloads;
  stats_.bytes_onloaded += plan_.units[unit].size_bytes;
}

/// A miss: overwrites what was expected in vain. An overlapping unit in use cannot be overwritten.
void Pipeline::onload_on_demand(UnitIndex unit) {
  if (policy_.lookahead == Lookahead::kLayer) {
    // A layer's first unit is missed, and the copies of a layer start with that layer: when the
    // caller's stream has come to it, not when the host has, which runs ahead.
    const StreamId current = device_.current_stream();
    order_after(copy_streams_[0], current, Step::kNone);
    if (copy_streams_[1] != copy_streams_[0]) {
      order_after(copy_streams_[1], current, Step::kNone);
    }
  }
  if (!may_overwrite(unit, /*awaited_too=*/true)) {
    give_own_place(unit);
  }
  onload(unit);
}

/// Issues copies along the expected order, as far as policy, depth and places allow.
void Pipeline::prefetch_ahead() {
  if (policy_.lookahead == Lookahead::kNone) {
    return;
  }
  Order::Walk walk = order_->walk();
  std::size_t ahead_bytes = 0;
  for (std::size_t step = 0; step < states_.size(); ++step) {
    const UnitIndex unit = walk.next();
    if (unit == kNoUnit) {
      return;
    }
    const Unit& next = plan_.units[unit];
    if (policy_.lookahead == Lookahead::kLayer &&
        next.layer_index != plan_.units[current_].layer_index) {
      return;
    }
    ahead_bytes += next.size_bytes;
    if (step > 0 && ahead_bytes > plan_.depth_bytes) {
      return;
    }
    UnitState& state = states_[unit];
    if (!state.whole) {
      if (!may_overwrite(unit, /*awaited_too=*/false)) {
        return;  // tried again at the next release
      }
      onload(unit);
      ++stats_.prefetched;
    }
    state.awaited = true;
  }
}

/// The pass went another way than expected: what was copied ahead may be overwritten again.
void Pipeline::forget_expectations() {
  for (UnitState& state : states_) {
    state.awaited = false;
  }
}

/// A unit called inside another one that its place overlaps: from now on it has a place of its own.
void Pipeline::give_own_place(UnitIndex unit) {
  UnitState& state = states_[unit];
  // Whoever copies into the old place next will no longer ask this unit for its last use.
  for (std::size_t i = 0; i < kNumKinds; ++i) {
    if (state.pending[i] != kNoEvent) {
      wait(copy_streams_[i], state.pending[i], Step::kOldPlaceWait);
      state.pending[i] = kNoEvent;  // only now: a wait that failed is still to be taken
    }
  }
  own_places_.emplace_back(device_, plan_.units[unit].size_bytes);
  // The allocator may hand out memory that kernels of the current stream still use.
  const StreamId current = device_.current_stream();
  if (copy_stream(unit) != current) {
    order_after(copy_stream(unit), current, Step::kNewPlaceOrder);
  }
  for (const UnitIndex other : plan_.overlaps[unit]) {
    auto& back = plan_.overlaps[other];
    back.erase(std::remove(back.begin(), back.end(), unit), back.end());
  }
  plan_.overlaps[unit].clear();
  state.memory = own_places_.back().memory();
  ++stats_.extra_places;
}

}  // namespace torch_offload
