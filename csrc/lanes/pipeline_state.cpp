#include "lanes/pipeline_state.h"

#include <algorithm>

#include "core/error.h"

namespace torch_offload {

void PipelineState::append(const Pipeline& pipeline, const std::vector<std::uint64_t>& generations,
                           StateWords& words) {
  // Every field is named: one that is new does not compile until it was thought of here.
  // As they were made are device, loader, options, policy, streams and handover; so are plan and
  // window while no unit has been given another place. Nothing is decided by stats and unit_stats.
  // The owner is the thread that asks. The order has states of its own.
  const auto& [device, loader, plan, options, policy, order, window, own_places, states, unit_stats,
               stats, copy_streams, compute_streams, handover, current, pass, nesting, owner] =
      pipeline;
  check_internal(own_places.empty(), "a state with places that are not the plan's");
  words.insert(words.end(), {current, nesting});
  for (UnitIndex unit = 0; unit < states.size(); ++unit) {
    // As they were made are memory, ready and free. Nothing is decided by copied_in_pass: it is for
    // those who ask.
    const auto& [memory, ready, free, whole, awaited, fresh, acquired, used_on, also_used_on, left,
                 loaded_on, generation, copied_in_pass, pending] = states[unit];
    check_internal(acquired == 0 && also_used_on.empty() && left == kNoStream,
                   "a state in the midst of a unit");
    words.insert(words.end(), {(whole ? 1U : 0U) | (awaited ? 2U : 0U) | (fresh ? 4U : 0U),
                               std::uint64_t{used_on} << 32U | loaded_on,
                               std::uint64_t{pending[0]} << 32U | pending[1],
                               generation == 0 ? 0 : 1 + generations.at(unit) - generation});
  }
}

std::vector<EventId> PipelineState::awaitable_events(const Pipeline& pipeline) {
  std::vector<EventId> events;
  for (const Pipeline::UnitState& state : pipeline.states_) {
    events.insert(events.end(), state.pending.begin(), state.pending.end());
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
