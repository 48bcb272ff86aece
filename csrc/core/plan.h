#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/unit.h"

namespace torch_offload {

/// How a unit's bytes reach its place. A unit that stays on the device as it is has no place:
/// nothing reaches it, and its transport is kRaw.
enum class Transport : std::uint8_t {
  kRaw,     ///< A copy of the master as it is.
  kPacked,  ///< A copy of the packed master into the staging ring, and a decoder from there.
  kPackedResident,  ///< No copy: a decoder from device memory, where the packed master stays.
};

/// "raw", "packed" or "packed_resident".
const char* name_of(Transport transport);
/// Throws: ValueError that lists the names there are.
Transport parse_transport(const std::string& name);

/// Of the staging ring, unless a plan does with less: one is filled while another is decoded.
constexpr std::size_t kStagingSlots = 2;

struct PlanRequest {
  std::vector<Unit> units;  ///< In the order in which a forward is expected to call them.
  /// Which units stay on the device as they are, one answer for each. Default: none does.
  std::vector<bool> resident;
  /// How many bytes copies may run ahead of the unit in use. Default: the largest layer, or 2.5
  /// times the largest unit where that is less.
  std::optional<std::size_t> depth_bytes;
  /// A window that is there already: units are laid into it as they come, however far ahead copies
  /// can run then. Default: the smallest that the depth needs.
  std::optional<std::size_t> window_bytes;
  /// How each unit travels. Default: raw, all of them.
  std::vector<Transport> transports = {};
  /// How many bytes may be decoded ahead of the unit in use from packed ones that stay on the
  /// device. The next such unit may be in any case.
  std::size_t decode_depth_bytes = 0;
  /// Whether units that stay packed share the ring of those that are copied, and with it the depth.
  bool one_ring = false;
  /// Packed copies that the staging ring has room for.
  std::size_t staging_slots = kStagingSlots;
};

/// Where every unit lives on the device. See Note [One window, fixed places].
struct Plan {
  std::vector<Unit> units;
  std::vector<std::optional<ByteRange>> places;  ///< Range of the window; nullopt: resident.
  std::vector<std::vector<UnitIndex>> overlaps;  ///< The other units whose places share bytes.
  std::size_t window_bytes = 0;
  std::size_t depth_bytes = 0;
  std::size_t resident_bytes = 0;      ///< Of the units that stay on the device as they are.
  std::vector<Transport> transports;   ///< By unit; empty: all are raw.
  std::size_t decode_depth_bytes = 0;  ///< As depth_bytes, for units that stay packed.
  bool one_ring = false;               ///< Whether these share the ring of those that are copied.
  std::size_t staging_slots = kStagingSlots;  ///< Of the ring that packed copies pass through.

  /// Whether the unit stays on the device as it is.
  bool is_resident(UnitIndex unit) const { return !places[unit].has_value(); }
  Transport transport(UnitIndex unit) const {
    return transports.empty() ? Transport::kRaw : transports[unit];
  }
  bool stays_packed(UnitIndex unit) const { return transport(unit) == Transport::kPackedResident; }
};

/// For each unit the others whose places share bytes with its own, in their order.
std::vector<std::vector<UnitIndex>> overlaps_of(
    const std::vector<std::optional<ByteRange>>& places);

/// Gives each streamed unit a fixed range of one window.
///
/// A pure function: the same request gives the same plan. Streamed units lie in a ring in their
/// order, and the window is the smallest ring in which, the seam from one pass to the next
/// included, every copy can start `depth_bytes` ahead of its use, and that of the next unit in any
/// case. Behind it lies a second ring for units that stay packed, so that places which the decoder
/// fills in no time do not keep copies from running ahead; with `one_ring` they lie in the first,
/// and all come in the order of their use: less memory, for packed copies that run ahead in the
/// staging ring in any case. Which units are to stay, and how, is the caller's business, or
/// choose_plan's.
///
/// Throws: ValueError if a unit is empty or unaligned, if `resident` or `transports` are of another
///         length or do not fit together, if there is no staging slot, or if a unit does not fit
///         the window that is there.
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
