#pragma once

#include <cstdint>
#include <vector>

#include "core/op_log.h"

namespace torch_offload {

/// A state, written down so that equal words mean equal futures. See Note [Merged states] in
/// lanes/merged_passes.cpp.
using StateWords = std::vector<std::uint64_t>;

/// What later ops may name.
struct StateScope {
  std::vector<StreamId> streams;  ///< All that were or will be.
  std::vector<EventId> events;    ///< Those that may be waited for before they are recorded again.
  std::vector<std::uint64_t> generations;  ///< By unit: what generations count from.
};

}  // namespace torch_offload
