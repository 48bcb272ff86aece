#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "core/unit.h"

namespace torch_offload {

struct PlanRequest {
  std::vector<Unit> units;  ///< In the order in which a forward is expected to call them.
  /// How many bytes copies may run ahead of the unit in use. Default: the largest layer, or 2.5
  /// times the largest unit where that is less.
  std::optional<std::size_t> depth_bytes;
  /// What resident units and window may take together. Default: nothing resident, default window.
  std::optional<std::size_t> budget_bytes;
  /// A window that is there already: units are laid into it as they come, however far ahead copies
  /// can run then. Default: the smallest that the depth needs.
  std::optional<std::size_t> window_bytes;
};

/// Where every unit lives on the device. See Note [One window, fixed places].
struct Plan {
  std::vector<Unit> units;
  std::vector<std::optional<ByteRange>> places;  ///< Range of the window; nullopt: resident.
  std::vector<std::vector<UnitIndex>> overlaps;  ///< The other units whose places share bytes.
  std::size_t window_bytes = 0;
  std::size_t depth_bytes = 0;
  std::size_t resident_bytes = 0;  ///< Of the units that the budget keeps on the device.

  bool is_resident(UnitIndex unit) const { return !places[unit].has_value(); }
};

/// Chooses the resident units and gives each other unit a fixed range of one window.
///
/// A pure function: the same request gives the same plan. Streamed units lie in a ring in their
/// order, and the window is the smallest ring in which, the seam from one pass to the next
/// included, every copy can start `depth_bytes` ahead of its use. With a budget, as many whole
/// units as fit stay resident, their bytes spread evenly over the order; if not even the window
/// fits, the depth is halved until it does.
///
/// Throws: ValueError if a unit is empty or unaligned, or if the budget is below the least (which
///         the message names).
Plan make_plan(const PlanRequest& request);

/// The least `budget_bytes` that make_plan accepts for these units.
std::size_t least_budget_bytes(const std::vector<Unit>& units);

}  // namespace torch_offload
