#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "core/unit.h"

namespace torch_offload {

struct PlanRequest {
  std::vector<Unit> units;  ///< In the order in which a forward is expected to call them.
  /// Which units stay on the device, one answer for each. Default: none does.
  std::vector<bool> resident;
  /// How many bytes copies may run ahead of the unit in use. Default: the largest layer, or 2.5
  /// times the largest unit where that is less.
  std::optional<std::size_t> depth_bytes;
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
  std::size_t resident_bytes = 0;  ///< Of the units that stay on the device.

  bool is_resident(UnitIndex unit) const { return !places[unit].has_value(); }
};

/// Gives each streamed unit a fixed range of one window.
///
/// A pure function: the same request gives the same plan. Streamed units lie in a ring in their
/// order, and the window is the smallest ring in which, the seam from one pass to the next
/// included, every copy can start `depth_bytes` ahead of its use, and that of the next unit in any
/// case. Which units are to stay is the caller's business, or choose_plan's.
///
/// Throws: ValueError if a unit is empty or unaligned, if `resident` is of another length, or if a
///         unit does not fit the window that is there.
Plan make_plan(const PlanRequest& request);

/// The same, or nothing if it needs a window of more than `most_window_bytes`: soon said, where
/// many are tried.
std::optional<Plan> try_make_plan(const PlanRequest& request, std::size_t most_window_bytes);

/// Throws: ValueError, naming the unit, unless every size is a positive multiple of
/// kAlignmentBytes.
void check_units(const std::vector<Unit>& units);

/// What default depth means for these units.
std::size_t default_depth_bytes(const std::vector<Unit>& units);

}  // namespace torch_offload
