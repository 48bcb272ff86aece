// When the pipeline copies a unit into its place, what such a copy waits for, and where it goes.

#include <algorithm>
#include <cstddef>

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

/// Tells the loader which units it will be asked for, those that prefetches are about to ask for
/// included.
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
