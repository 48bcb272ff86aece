#include "core/pipeline.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

// Note [Ready and free]
// Every unit has two events. `ready` is recorded behind the copy into its place; whoever uses the
// unit waits for it on the stream that reads. `free` is recorded behind the last kernel of a use,
// on the stream that really ran it; whoever copies into bytes of that place waits for it. A place
// whose unit is acquired, or copied and still expected to be used, has no free event to wait for:
// no prefetch is issued into it.
//
// Note [Pending]
// What a stream must wait for before it writes into a place is remembered as one event, `pending`,
// and as the streams that are behind it already. After an onload that is `ready`, for all streams
// but the one that the unit is whole on: write after write. After a release it is `free`, for all:
// write after read, which covers `ready` as the use has waited for that. Nothing is pending where
// the host has waited itself. An onload waits for what is pending on its own place and on every
// place that shares bytes with it.
//
// Note [All that is order]
// Copies and readers are ordered by the two notes above. There is more: the unit behind its
// caller's kernels and these behind the unit, in `split`; all streams of a use, and of the last one
// elsewhere, before its `free`; memory that is new, or goes; what a failed call leaves under way.
// steps.h lists every such step and what it closes, and each is named where it is taken; nothing
// else here keeps order. The rest decides only *when* a copy is issued (pipeline_copies.cpp) and
// *where to* (pipeline_places.cpp). How one stream is ordered behind another: pipeline_streams.cpp.

namespace torch_offload {

namespace {

constexpr std::uint8_t kPoison = 0xFF;  // NaN in every floating-point type

}  // namespace

Pipeline::Pipeline(Device& device, Loader& loader, Plan plan, const PipelineOptions& options)
    : device_(device),
      steps_(device),
      loader_(loader),
      plan_(std::move(plan)),
      options_(options),
      policy_(policy_of(options.mode)),
      window_(std::in_place, device, plan_.window_bytes) {
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
  steps_.synchronize(device_.current_stream(), Step::kNewWindowDrain);
  make_events(plan_);
  adopt(std::move(plan_));
}

Pipeline::~Pipeline() {
  // Masters and window go next: nothing may be in flight from or to them.
  if (!drain()) {
    if (window_) {
      window_->leak();
    }
    for (DeviceMemory& place : own_places_) {
      place.leak();
    }
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
  check_may_acquire(unit);
  UnitState& state = states_[unit];
  if (!order_->advance(unit)) {
    forget_expectations();
  }
  if (state.acquired > 0) {  // called again inside its own call
    acquire_again(unit);
    return state.memory;
  }
  announce_ahead();  // before this unit's own copy, which may have to wait for its bytes
  make_whole(unit);
  try {
    const StreamId stream = enter_compute_stream(unit);
    begin_use(unit, stream);
    prefetch_ahead();
    begin_read(unit, stream);  // last: a unit that could not be acquired was not read
  } catch (...) {
    give_up_acquire(state);
    throw;
  }
  ++unit_stats_[unit].acquired;
  return state.memory;
}

void Pipeline::check_may_acquire(UnitIndex unit) const {
  const UnitState& state = states_.at(unit);
  // The owner first: only its thread may look at anything else.
  if (owner_.load() == std::this_thread::get_id() && !window_) {
    throw StateError(
        "expected a window on the device, got none: when it was to be given another size, there "
        "was room for neither; free device memory and call handle.replan(), or handle.remove()");
  }
  if (owner_.load() != std::this_thread::get_id() || state.memory == nullptr) {
    throw StateError(
        "expected acquire of a streamed unit inside a pass of this thread, got unit '" +
        plan_.units[unit].name + "'");
  }
}

void Pipeline::acquire_again(UnitIndex unit) {
  UnitState& state = states_[unit];
  const StreamId stream = device_.current_stream();
  steps_.wait(stream, state.ready, Step::kNestedReadyWait);
  if (note_stream(state, stream)) {
    begin_read(unit, stream);
  }
  ++state.acquired;
}

void Pipeline::make_whole(UnitIndex unit) {
  const UnitState& state = states_[unit];
  if (!state.whole) {
    onload_on_demand(unit);
    ++stats_.misses;
    ++unit_stats_[unit].misses;
  } else if (!state.fresh) {
    ++stats_.hits;
  }
}

void Pipeline::begin_use(UnitIndex unit, StreamId stream) {
  UnitState& state = states_[unit];
  if (stream != state.used_on && state.pending == state.free) {
    // Used before on another stream and not copied since: `free` will be recorded anew behind
    // this use, so it must cover the earlier one as well.
    steps_.wait(stream, state.free, Step::kEarlierStreamWait);
  }
  state.acquired = 1;
  state.used_on = stream;
  state.awaited = false;
  state.fresh = false;
  current_ = unit;
  check_while_debugging(unit);
  if (policy_.host_synchronizes) {
    steps_.synchronize(state.loaded_on, Step::kHostReadyWait);
  } else {
    steps_.wait(stream, state.ready, Step::kReadyWait);  // the copy may still be under way
  }
}

void Pipeline::give_up_acquire(UnitState& state) {
  // No kernel was submitted, so there is no use to wait for: only the hold is given back.
  state.acquired = 0;
  if (policy_.host_synchronizes) {
    // In these modes no event tells the next copy of this one.
    steps_.quiesce(state.loaded_on, Step::kFailedAcquireDrain);
  }
  return_to_caller(state, Step::kFailedAcquireReturn);
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
    end_reads(unit);
    if (options_.poison_on_release) {
      poison(unit);
    }
    mark_free(state);
    leave_compute_stream(state);
  } catch (...) {
    give_up_release(state, is_last);
    throw;
  }
  state.also_used_on.clear();
  prefetch_ahead();
}

void Pipeline::end_reads(UnitIndex unit) {
  const UnitState& state = states_[unit];
  for (const StreamId other : state.also_used_on) {
    end_read(unit, other);
  }
  end_read(unit, state.used_on);
  for (const StreamId other : state.also_used_on) {
    order_after(state.used_on, other, Step::kLaterStreamsJoin);
  }
}

void Pipeline::poison(UnitIndex unit) {
  UnitState& state = states_[unit];
  if (!is_left_out(Step::kPoisonForget)) {
    forget(state);
  }
  device_.fill(state.used_on, state.memory, plan_.units[unit].size_bytes, kPoison, unit);
}

void Pipeline::mark_free(UnitState& state) {
  if (policy_.host_synchronizes) {
    steps_.synchronize(state.used_on, Step::kHostFreeWait);
    state.set_pending(kNoEvent);
    return;
  }
  steps_.record(state.free, state.used_on, Step::kFreeRecord);
  // `ready` was waited for by this use: `free` covers it.
  state.set_pending(is_left_out(Step::kPendingFree) ? kNoEvent : state.free);
  if (options_.wait_for_each) {
    device_.synchronize(state.used_on);
  }
}

void Pipeline::give_up_release(UnitState& state, bool is_last) {
  if (is_last && state.caller != kNoStream) {
    device_.leave_stream(state.used_on);
  }
  // Nobody can wait for this use any more, so it must have ended.
  steps_.quiesce(state.used_on, Step::kFailedReleaseDrain);
  for (const StreamId other : state.also_used_on) {
    steps_.quiesce(other, Step::kFailedReleaseDrain);
  }
  if (is_last) {
    state.also_used_on.clear();
    forget(state);
    return_to_caller(state, Step::kFailedReleaseReturn);
  }
}

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

void Pipeline::check_while_debugging(UnitIndex unit) const {
  if (!options_.wait_for_each) {
    return;
  }
  for (const UnitState& state : states_) {
    check_internal(state.is_consistent(), "a unit that is in two states at once");
  }
  // While every onload is waited for, none can be under way: one that is was waited for in vain.
  if (!device_.is_done(states_[unit].ready) && options_.warn != nullptr) {
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

}  // namespace torch_offload
