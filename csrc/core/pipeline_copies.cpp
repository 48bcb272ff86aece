// When the pipeline copies a unit into its place, what such a copy waits for, and where it goes.

#include <algorithm>
#include <cstddef>
#include <set>
#include <utility>

#include "core/pipeline.h"

namespace torch_offload {

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

std::vector<StreamId> Pipeline::writers() const {
  std::vector<StreamId> writers = loader_.own_streams();
  for (const StreamId stream : copy_streams_) {
    if (stream != kNoStream && std::find(writers.begin(), writers.end(), stream) == writers.end()) {
      writers.push_back(stream);
    }
  }
  return writers;
}

void Pipeline::await_users(UnitState& state, StreamId writer, Step step) {
  std::vector<StreamId>& behind = state.behind_pending;
  if (state.pending != kNoEvent &&
      std::find(behind.begin(), behind.end(), writer) == behind.end()) {
    // Write-after-read: its last kernels may still read these bytes. Or write-after-write: another
    // stream may still fill them.
    steps_.wait(writer, state.pending, step);
    behind.push_back(writer);  // only now: a wait that failed is still to be taken
  }
}

void Pipeline::onload(UnitIndex unit) {
  UnitState& state = states_[unit];
  const StreamId stream = copy_stream(unit);
  const StreamId writer = loader_.first_writer(unit, stream);
  await_users(state, writer, Step::kOwnPendingWait);
  forget(state);
  for (const UnitIndex other : plan_.overlaps[unit]) {
    await_users(states_[other], writer, Step::kOverlapPendingWait);
    if (!is_left_out(Step::kOverlapForget)) {
      forget(states_[other]);
    }
  }

  ++state.generation;
  StreamId loaded_on = writer;
  try {
    loaded_on = loader_.load(unit, state.memory, stream, state.generation);
    steps_.record(state.ready, loaded_on, Step::kReadyRecord);
    if (options_.wait_for_each) {
      device_.synchronize(loaded_on);
    }
  } catch (...) {
    // Part of the copy may be under way, and no event tells when it ends.
    for (const StreamId used : std::set<StreamId>{stream, writer, loaded_on}) {
      steps_.quiesce(used, Step::kFailedOnloadDrain);
    }
    throw;
  }
  state.loaded_on = loaded_on;
  const bool is_ordered_already = policy_.host_synchronizes || is_left_out(Step::kPendingReady);
  state.set_pending(is_ordered_already ? kNoEvent : state.ready);
  state.behind_pending.push_back(loaded_on);
  state.whole = state.fresh = true;
  state.copied_in_pass = pass_;
  ++stats_.onloads;
  ++unit_stats_[unit].onloads;
  stats_.bytes_onloaded += plan_.units[unit].size_bytes;
}

void Pipeline::onload_on_demand(UnitIndex unit) {
  if (policy_.lookahead == Lookahead::kLayer) {
    // A layer's first unit is missed, and the copies of a layer start with that layer: when the
    // caller's stream has come to it, not when the host has, which runs ahead.
    const StreamId current = device_.current_stream();
    for (const StreamId writer : writers()) {
      order_after(writer, current, Step::kNone);
    }
  }
  if (!may_overwrite(unit, /*awaited_too=*/true)) {
    give_own_place(unit);
  }
  onload(unit);
}

// Units that are copied and units that stay packed run ahead each for itself where each kind has
// its own ring; in one ring all come in the order of their use, as a unit brought ahead of others
// would hold bytes that these need first. See Note [Two rings, or one] in docs/design.md.

void Pipeline::prefetch_ahead() {
  if (policy_.lookahead == Lookahead::kNone) {
    return;
  }
  PrefetchQueue copied;
  copied.depth_bytes = plan_.depth_bytes;
  copied.is_over = !has_copied_units_;
  PrefetchQueue decoded;
  decoded.depth_bytes = plan_.decode_depth_bytes;
  decoded.is_over = !has_packed_units_;
  Order::Walk walk = order_->walk();
  for (std::size_t step = 0; step < states_.size() && !(copied.is_over && decoded.is_over);
       ++step) {
    const UnitIndex unit = walk.next();
    if (unit == kNoUnit || (policy_.lookahead == Lookahead::kLayer &&
                            plan_.units[unit].layer_index != plan_.units[current_].layer_index)) {
      return;
    }
    PrefetchQueue& queue = is_in_decode_queue(unit) ? decoded : copied;
    queue.is_over = queue.is_over || !prefetch(unit, queue);
  }
}

bool Pipeline::prefetch(UnitIndex unit, PrefetchQueue& queue) {
  UnitState& state = states_[unit];
  queue.ahead_bytes += plan_.units[unit].size_bytes;
  if (!std::exchange(queue.is_first, false) && queue.ahead_bytes > queue.depth_bytes) {
    return false;
  }
  if (!state.whole) {
    if (!may_overwrite(unit, /*awaited_too=*/false)) {
      return false;  // tried again at the next release
    }
    onload(unit);
    ++stats_.prefetched;
  }
  state.awaited = true;
  return true;
}

void Pipeline::announce_ahead() {
  const std::size_t limit_bytes = loader_.announced_bytes();
  if (limit_bytes == 0) {
    return;
  }
  Order::Walk walk = order_->walk();
  std::size_t announced_bytes = 0;
  for (std::size_t step = 0; step < states_.size() && announced_bytes < limit_bytes; ++step) {
    const UnitIndex unit = walk.next();
    if (unit == kNoUnit) {
      return;
    }
    if (!states_[unit].whole) {
      loader_.announce(unit);
      announced_bytes += plan_.units[unit].size_bytes;
    }
  }
}

void Pipeline::forget_expectations() {
  for (UnitState& state : states_) {
    state.awaited = false;
  }
}

}  // namespace torch_offload
