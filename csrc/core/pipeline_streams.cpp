// How the pipeline orders one stream after another, and the host after both.

#include <algorithm>
#include <cstdio>
#include <exception>
#include <utility>
#include <vector>

#include "core/pipeline.h"

namespace torch_offload {

void Pipeline::order_after(StreamId later, StreamId earlier, Step step) {
  if (!is_left_out(step)) {
    steps_.record(handover_, earlier, Step::kHandoverRecord);
    steps_.wait(later, handover_, Step::kHandoverWait);
  }
}

StreamId Pipeline::enter_compute_stream(UnitIndex unit) {
  const StreamId caller = device_.current_stream();
  if (options_.layout == StreamLayout::kShared) {
    return caller;
  }
  const StreamId compute = compute_streams_[static_cast<std::size_t>(plan_.units[unit].kind)];
  device_.leave_stream(caller);
  // The unit reads activations that the caller's kernels write.
  order_after(compute, caller, Step::kEnterOrder);
  device_.enter_stream(compute);
  states_[unit].caller = caller;
  return compute;
}

void Pipeline::leave_compute_stream(UnitState& state) {
  if (state.caller != kNoStream) {
    device_.leave_stream(state.used_on);
    // The caller's kernels read what the unit wrote.
    order_after(state.caller, state.used_on, Step::kReturnOrder);
    return_to_caller(state, Step::kCallerReturn);
  }
}

void Pipeline::return_to_caller(UnitState& state, Step step) {
  if (state.caller != kNoStream) {
    if (!is_left_out(step)) {
      device_.return_to_stream(state.caller);
    }
    state.caller = kNoStream;
  }
}

void Pipeline::synchronize_onload(UnitIndex unit) {
  if (states_.at(unit).loaded_on != kNoStream) {
    check_while_debugging(unit);
    steps_.synchronize(states_[unit].loaded_on, Step::kOnloadDrain);
  }
}

void Pipeline::synchronize() {
  for (const auto& [stream, step] : streams_to_drain()) {
    steps_.synchronize(stream, step);
  }
}

bool Pipeline::drain() noexcept {
  if (device_.in_forked_child()) {
    return true;  // what is in flight is the parent's
  }
  bool is_drained = true;
  try {
    for (const auto& [stream, step] : streams_to_drain()) {
      is_drained = drain(stream, step) && is_drained;
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "torch_offload: could not drain the copies: %s\n", error.what());
    is_drained = false;
  }
  return is_drained;
}

bool Pipeline::drain(StreamId stream, Step step) noexcept {
  // An error may be that of an earlier call, told by this one, which then has not waited.
  constexpr int kAttempts = 2;
  for (int attempt = 1; attempt <= kAttempts; ++attempt) {
    try {
      steps_.synchronize(stream, step);
      return true;
    } catch (const std::exception& error) {
      std::fprintf(stderr, "torch_offload: could not drain stream %u: %s\n",
                   static_cast<unsigned>(stream), error.what());
    }
  }
  return false;
}

std::vector<std::pair<StreamId, Step>> Pipeline::streams_to_drain() const {
  const std::vector<StreamId> ours = streams();
  std::vector<std::pair<StreamId, Step>> found;
  found.reserve(ours.size());
  for (const StreamId stream : ours) {
    found.emplace_back(stream, Step::kDrainOwnStreams);
  }
  std::vector<StreamId> others;  // callers', and those that a loader has chosen
  for (const UnitState& state : states_) {
    for (const StreamId stream : {state.used_on, state.loaded_on}) {
      if (stream != kNoStream) {
        others.push_back(stream);
      }
    }
  }
  std::sort(others.begin(), others.end());
  others.erase(std::unique(others.begin(), others.end()), others.end());
  for (const StreamId stream : others) {
    if (std::find(ours.begin(), ours.end(), stream) == ours.end()) {
      found.emplace_back(stream, Step::kDrainUsedStreams);
    }
  }
  return found;
}

std::vector<StreamId> Pipeline::streams() const {
  std::vector<StreamId> streams;
  const std::vector<StreamId> of_loader = loader_.own_streams();
  for (const auto& group : {copy_streams_, compute_streams_}) {
    for (const StreamId stream : group) {
      if (stream != kNoStream &&
          std::find(streams.begin(), streams.end(), stream) == streams.end()) {
        streams.push_back(stream);
      }
    }
  }
  streams.insert(streams.end(), of_loader.begin(), of_loader.end());
  return streams;
}

}  // namespace torch_offload
