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
// here decides only *when* a copy is issued.

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

Pipeline::DeviceMemory::DeviceMemory(Device& device, std::size_t size_bytes)
    : device_(device),
      memory_(size_bytes == 0 ? nullptr : static_cast<std::byte*>(device.allocate(size_bytes))),
      size_bytes_(size_bytes) {}

Pipeline::DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept
    : device_(other.device_),
      memory_(std::exchange(other.memory_, nullptr)),
      size_bytes_(std::exchange(other.size_bytes_, 0)) {}

Pipeline::DeviceMemory::~DeviceMemory() {
  if (memory_ == nullptr || device_.in_forked_child()) {
    return;
  }
  try {
    device_.free(memory_);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "torch_offload: device memory was not given back: %s\n", error.what());
  }
}

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
  device_.synchronize(device_.current_stream());
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
  synchronize();
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
    device_.wait(stream, state.ready);
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
      device_.wait(stream, state.free);
    }
    state.acquired = 1;
    state.used_on = stream;
    state.awaited = false;
    state.fresh = false;
    current_ = unit;
    ask_for_readiness(unit);
    if (policy_.host_synchronizes) {
      device_.synchronize(state.loaded_on);
    } else {
      device_.wait(stream, state.ready);  // read-after-write: the copy may still be under way
    }
    device_.begin_read(stream, state.memory, plan_.units[unit].size_bytes, unit, state.generation);
    prefetch_ahead();
  } catch (...) {
    // No kernel was submitted, so there is no use to wait for: only the hold is given back.
    state.acquired = 0;
    if (policy_.host_synchronizes) {
      quiesce(state.loaded_on);  // in these modes no event tells the next copy of this one
    }
    restore_current_stream(state);
    throw;
  }
  ++unit_stats_[unit].acquired;
  return state.memory;
}

void Pipeline::release(UnitIndex unit) {
  UnitState& state = held_state(unit);
  const StreamId stream = device_.current_stream();
  const std::size_t size_bytes = plan_.units[unit].size_bytes;
  const bool is_last = --state.acquired == 0;  // at once: whatever fails below, it is let go
  try {
    if (stream != state.used_on) {
      // The module left another stream current than it found: the use ends where both have ended.
      order_after(state.used_on, stream);
    }
    if (!is_last) {
      return;
    }
    if (options_.poison_on_release) {
      state.whole = state.awaited = false;
      device_.fill(state.used_on, state.memory, size_bytes, kPoison, unit);
    }
    device_.end_read(state.used_on, state.memory, size_bytes, unit, state.generation);
    if (policy_.host_synchronizes) {
      device_.synchronize(state.used_on);
      state.pending.fill(kNoEvent);
    } else {
      device_.record(state.free, state.used_on);
      state.pending.fill(state.free);  // `ready` was waited for by this use: `free` covers it
      if (options_.wait_for_each) {
        device_.synchronize(state.used_on);
      }
    }
    leave_compute_stream(state);
  } catch (...) {
    // Nobody can wait for this use any more, so it must have ended.
    quiesce(state.used_on);
    if (stream != state.used_on) {
      quiesce(stream);
    }
    if (is_last) {
      state.whole = state.awaited = false;
      restore_current_stream(state);
    }
    throw;
  }
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
  state.whole = state.awaited = state.fresh = false;
}

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
    return states_[other].acquired > 0 || (states_[other].awaited && !awaited_too);
  };
  return !blocks(unit) &&
         std::none_of(plan_.overlaps[unit].begin(), plan_.overlaps[unit].end(), blocks);
}

/// Submits the copy of `unit` into its place. The caller has made sure that it may_overwrite.
void Pipeline::onload(UnitIndex unit) {
  UnitState& state = states_[unit];
  const StreamId stream = copy_stream(unit);
  const std::size_t index = copy_stream_index(unit);

  const auto take_over = [&](UnitState& other) {
    if (other.pending[index] != kNoEvent) {
      // Write-after-read: its last kernels may still read these bytes. Or write-after-write: a
      // copy on another stream may still fill them.
      device_.wait(stream, other.pending[index]);
      other.pending[index] = kNoEvent;
    }
    other.whole = other.awaited = other.fresh = false;
  };
  take_over(state);
  for (const UnitIndex other : plan_.overlaps[unit]) {
    take_over(states_[other]);
  }

  ++state.generation;
  try {
    state.loaded_on = loader_.load(unit, state.memory, stream, state.generation);
    device_.record(state.ready, state.loaded_on);
    if (options_.wait_for_each) {
      device_.synchronize(state.loaded_on);
    }
  } catch (...) {
    quiesce(stream);  // part of the copy may be under way, and no event tells when it ends
    throw;
  }
  for (std::size_t i = 0; i < kNumKinds; ++i) {
    const bool is_ordered_already =
        policy_.host_synchronizes || copy_streams_[i] == state.loaded_on;
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
      device_.wait(copy_streams_[i], std::exchange(state.pending[i], kNoEvent));
    }
  }
  own_places_.emplace_back(device_, plan_.units[unit].size_bytes);
  // The allocator may hand out memory that kernels of the current stream still use.
  const StreamId current = device_.current_stream();
  if (copy_stream(unit) != current) {
    order_after(copy_stream(unit), current);
  }
  for (const UnitIndex other : plan_.overlaps[unit]) {
    auto& back = plan_.overlaps[other];
    back.erase(std::remove(back.begin(), back.end(), unit), back.end());
  }
  plan_.overlaps[unit].clear();
  state.memory = own_places_.back().memory();
  ++stats_.extra_places;
}

// --- streams -----------------------------------------------------------------------------------

/// Lets later work on `later` start only when all submitted to `earlier` so far is done.
void Pipeline::order_after(StreamId later, StreamId earlier) {
  device_.record(handover_, earlier);
  device_.wait(later, handover_);
}

StreamId Pipeline::enter_compute_stream(UnitIndex unit) {
  const StreamId caller = device_.current_stream();
  if (options_.layout == StreamLayout::kShared) {
    return caller;
  }
  const StreamId compute = compute_streams_[static_cast<std::size_t>(plan_.units[unit].kind)];
  order_after(compute, caller);  // the unit reads activations that the caller's kernels write
  device_.set_current_stream(compute);
  states_[unit].left = caller;
  return compute;
}

void Pipeline::leave_compute_stream(UnitState& state) {
  const StreamId caller = state.left;
  restore_current_stream(state);
  if (caller != kNoStream) {
    order_after(caller, state.used_on);  // the caller's kernels read what the unit wrote
  }
}

void Pipeline::restore_current_stream(UnitState& state) {
  if (state.left != kNoStream) {
    device_.set_current_stream(state.left);
    state.left = kNoStream;
  }
}

void Pipeline::quiesce(StreamId stream) noexcept {
  try {
    device_.synchronize(stream);
  } catch (...) {
    // The device itself is failing, and the error that brought us here is about to say so.
    std::fprintf(stderr, "torch_offload: a stream could not be synchronized after a failure\n");
  }
}

void Pipeline::synchronize_onload(UnitIndex unit) {
  if (states_.at(unit).loaded_on != kNoStream) {
    ask_for_readiness(unit);
    device_.synchronize(states_[unit].loaded_on);
  }
}

void Pipeline::synchronize() {
  std::vector<StreamId> busy = streams();
  for (const UnitState& state : states_) {
    if (state.used_on != kNoStream) {
      busy.push_back(state.used_on);
    }
  }
  std::sort(busy.begin(), busy.end());
  busy.erase(std::unique(busy.begin(), busy.end()), busy.end());
  for (const StreamId stream : busy) {
    device_.synchronize(stream);
  }
}

std::vector<StreamId> Pipeline::streams() const {
  std::vector<StreamId> streams;
  for (const auto& group : {copy_streams_, compute_streams_}) {
    for (const StreamId stream : group) {
      if (stream != kNoStream &&
          std::find(streams.begin(), streams.end(), stream) == streams.end()) {
        streams.push_back(stream);
      }
    }
  }
  return streams;
}

}  // namespace torch_offload
