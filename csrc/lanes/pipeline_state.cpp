#include "lanes/pipeline_state.h"

#include <algorithm>
#include <tuple>

#include "core/error.h"

namespace torch_offload {

/// The writers that have to wait for what is pending on a unit's place, a bit for each.
std::uint32_t PipelineState::waiting_writers(const Pipeline& pipeline, UnitIndex unit) {
  const auto& [pending, behind] =
      std::tie(pipeline.states_[unit].pending, pipeline.states_[unit].behind_pending);
  std::uint32_t waiting = 0;
  for (const StreamId writer : pipeline.writers()) {
    if (pending != kNoEvent && std::find(behind.begin(), behind.end(), writer) == behind.end()) {
      check_internal(writer < 32, "more streams than a state has bits for");
      waiting |= 1U << writer;
    }
  }
  return waiting;
}

void PipelineState::append(const Pipeline& pipeline, const std::vector<std::uint64_t>& generations,
                           StateWords& words) {
  // Every field is named: one that is new does not compile until it was thought of here.
  // As they were made are device, loader, options, policy, streams and events; so are plan, queues
  // and window while no unit has been given another place. Nothing is decided by stats and
  // unit_stats. The owner is the thread that asks. The order has states of its own.
  const auto& [device, steps, loader, plan, options, policy, order, window, own_places, states,
               unit_stats, stats, copy_streams, compute_streams, handover, unit_events,
               has_copied_units, has_packed_units, current, pass, nesting, owner] = pipeline;
  check_internal(own_places.empty(), "a state with places that are not the plan's");
  words.insert(words.end(), {current, nesting});
  for (UnitIndex unit = 0; unit < states.size(); ++unit) {
    // As they were made are memory, ready and free. Nothing is decided by copied_in_pass: it is for
    // those who ask.
    const auto& [memory, whole, awaited, fresh, generation, copied_in_pass, acquired, used_on,
                 also_used_on, caller, ready, free, loaded_on, pending, behind_pending] =
        states[unit];
    check_internal(acquired == 0 && also_used_on.empty() && caller == kNoStream,
                   "a state in the midst of a unit");
    check_internal(states[unit].is_consistent(), "a unit that is in two states at once");
    const std::uint32_t waiting = waiting_writers(pipeline, unit);
    words.insert(words.end(), {(whole ? 1U : 0U) | (awaited ? 2U : 0U) | (fresh ? 4U : 0U),
                               std::uint64_t{used_on} << 32U | loaded_on,
                               waiting == 0 ? 0 : std::uint64_t{pending} << 32U | waiting,
                               generation == 0 ? 0 : 1 + generations.at(unit) - generation});
  }
}

std::vector<EventId> PipelineState::awaitable_events(const Pipeline& pipeline) {
  std::vector<EventId> events;
  for (UnitIndex unit = 0; unit < pipeline.states_.size(); ++unit) {
    const Pipeline::UnitState& state = pipeline.states_[unit];
    events.push_back(waiting_writers(pipeline, unit) == 0 ? kNoEvent : state.pending);
    const bool is_for_ready = state.whole && !pipeline.policy_.host_synchronizes;
    events.push_back(is_for_ready ? state.ready : kNoEvent);
  }
  std::sort(events.begin(), events.end());
  events.erase(std::unique(events.begin(), events.end()), events.end());
  if (!events.empty() && events.back() == kNoEvent) {
    events.pop_back();
  }
  return events;
}

}  // namespace torch_offload
