#pragma once

#include <cstddef>
#include <vector>

#include "core/unit.h"

namespace torch_offload {

/// Which units stay on the device.
struct ResidentSet {
  std::vector<bool> resident;  ///< By UnitIndex.
  std::size_t size_bytes = 0;
};

/// Sets that follow one rule, from the fewest bytes to the most.
struct ResidentFamily {
  const char* rule;  ///< For people: what stays.
  std::vector<ResidentSet> sets;
  bool packs_finely = false;  ///< Its sets are worth trying packed in many parts.
};

/// All resident sets that a plan may have, whatever the budget: nothing and everything among them.
///
/// What is left to stream should come at an even pace, so most rules spread what stays over the
/// order: whole layers, whole layers and a few units beside them, units, or one kind before the
/// other. The first and the last units are there as well: no rule of thumb is better than the
/// choice.
std::vector<ResidentFamily> resident_families(const std::vector<Unit>& units);

}  // namespace torch_offload
