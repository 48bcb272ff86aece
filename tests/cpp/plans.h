#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "core/plan.h"
#include "core/unit.h"
#include "lanes/placed_plan.h"

namespace torch_offload::testing {

using lanes::layers_of;
using lanes::plan_with_places;

inline std::vector<UnitIndex> sequence_of(std::size_t num_units) {
  std::vector<UnitIndex> sequence(num_units);
  for (std::size_t i = 0; i < num_units; ++i) {
    sequence[i] = static_cast<UnitIndex>(i);
  }
  return sequence;
}

inline Plan plan_of(std::vector<Unit> units, std::optional<std::size_t> depth_bytes = {}) {
  PlanRequest request;
  request.units = std::move(units);
  request.depth_bytes = depth_bytes;
  return make_plan(request);
}

/// How many copies a sequence of uses costs if each unit is copied when it is asked for and not
/// whole: computed from the bytes of the window alone, not from the plan's overlap sets.
inline std::uint64_t demand_onloads(const Plan& plan, const std::vector<UnitIndex>& uses) {
  std::vector<UnitIndex> owner(plan.window_bytes / kAlignmentBytes, kNoUnit);
  std::uint64_t onloads = 0;
  for (const UnitIndex unit : uses) {
    const std::size_t begin = plan.places[unit]->begin / kAlignmentBytes;
    const std::size_t end = plan.places[unit]->end / kAlignmentBytes;
    bool whole = true;
    for (std::size_t slice = begin; slice < end; ++slice) {
      whole = whole && owner[slice] == unit;
    }
    if (!whole) {
      ++onloads;
      // A unit that has lost one slice is lost: nobody may find the others.
      std::set<UnitIndex> lost(owner.begin() + static_cast<std::ptrdiff_t>(begin),
                               owner.begin() + static_cast<std::ptrdiff_t>(end));
      for (UnitIndex& slice_owner : owner) {
        slice_owner = lost.count(slice_owner) > 0 ? kNoUnit : slice_owner;
      }
      for (std::size_t slice = begin; slice < end; ++slice) {
        owner[slice] = unit;
      }
    }
  }
  return onloads;
}

/// How many units of `next_pass` may be copied ahead of it: as far as the depth, at least one, and
/// no further than the first that would overwrite one copied ahead before it.
inline std::size_t num_units_ahead(const Plan& plan, const std::vector<UnitIndex>& next_pass) {
  std::size_t ahead_bytes = 0;
  std::size_t count = 0;
  for (; count < next_pass.size(); ++count) {
    const UnitIndex unit = next_pass[count];
    ahead_bytes += plan.units[unit].size_bytes;
    if (count > 0 && ahead_bytes > plan.depth_bytes) {
      break;
    }
    for (std::size_t before = 0; before < count; ++before) {
      if (next_pass[before] != unit &&
          plan.places[unit]->overlaps(*plan.places[next_pass[before]])) {
        return count;
      }
    }
  }
  return count;
}

}  // namespace torch_offload::testing
