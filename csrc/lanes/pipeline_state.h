#pragma once

#include <cstdint>
#include <vector>

#include "check/state_words.h"
#include "core/pipeline.h"

namespace torch_offload {

#ifdef TORCH_OFFLOAD_MUTANTS
inline namespace mutants {  // see core/steps.h
#endif

/// What the later calls of a pipeline depend on, between two units, but for its order.
class PipelineState {
 public:
  /// `generations`: by unit, what generations count from.
  /// Throws: InternalError while a unit is acquired, or once one has a place of its own.
  static void append(const Pipeline& pipeline, const std::vector<std::uint64_t>& generations,
                     StateWords& words);
  /// The events that it may wait for before it records them again, in their order.
  static std::vector<EventId> awaitable_events(const Pipeline& pipeline);

 private:
  static std::uint32_t waiting_writers(const Pipeline& pipeline, UnitIndex unit);
};

#ifdef TORCH_OFFLOAD_MUTANTS
}  // namespace mutants
#endif

}  // namespace torch_offload
