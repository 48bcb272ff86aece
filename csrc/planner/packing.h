#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/plan.h"
#include "core/unit.h"
#include "planner/planner.h"
#include "planner/resident_sets.h"

namespace torch_offload {

/// How a resident set is packed: some of the layers that stay do so as they are, the others packed,
/// and some of the layers that stream travel packed. Both are spread evenly.
struct Packing {
  std::uint32_t kept_layers = 0;           ///< Layers with units that stay.
  std::uint32_t plain_layers = 0;          ///< So many of them are not packed.
  std::uint32_t streamed_layers = 0;       ///< Layers with units that do not stay.
  std::uint32_t packed_layers = 0;         ///< So many of them travel packed,
  std::size_t most_slot_bytes = SIZE_MAX;  ///< but for units that take more: the ring is smaller.
};

/// Where the bytes of each unit are before anything has an address.
struct Homes {
  std::vector<bool> resident;         ///< By UnitIndex: on the device, as it is.
  std::vector<Transport> transports;  ///< Likewise; of a resident unit kRaw. Empty: all are kRaw.

  Transport transport(UnitIndex unit) const {
    return transports.empty() ? Transport::kRaw : transports[unit];
  }
  bool is_copied(UnitIndex unit) const {
    return !resident[unit] && transport(unit) != Transport::kPackedResident;
  }
};

/// Device memory that homes take, beside the window.
struct HeldBytes {
  std::size_t resident = 0;         ///< Units that stay as they are.
  std::size_t packed_resident = 0;  ///< Units that stay packed.
  std::size_t slot = 0;             ///< The largest unit that travels packed, in the staging ring.
  // What the window must have room for.
  std::size_t largest_copied = 0;
  std::size_t largest_decoded = 0;  ///< Of the units that stay packed.

  std::size_t total(std::size_t staging_slots) const {
    return resident + packed_resident + staging_slots * slot;
  }
  /// No plan with these homes takes less.
  std::size_t least() const { return total(1) + std::max(largest_copied, largest_decoded); }
};

/// Lists and makes the ways to pack resident sets of some units.
class Packer {
 public:
  /// `packed_bytes`: of each unit; 0 for one that stays as it is, as packing would not shrink it.
  Packer(const std::vector<Unit>& units, std::vector<std::size_t> packed_bytes,
         PackingPolicy policy);

  /// All that are to be tried for a set. The list does not depend on the budget.
  std::vector<Packing> packings_of(const ResidentFamily& family, const ResidentSet& set) const;
  /// Makes one, in memory that is there.
  void pack(const ResidentSet& set, const Packing& packing, Homes& homes) const;

  HeldBytes held_by(const Homes& homes) const;

 private:
  std::pair<std::uint32_t, std::uint32_t> count_layers(const ResidentSet& set) const;
  std::vector<std::size_t> smaller_slots(const ResidentSet& set) const;

  const std::vector<Unit>& units_;
  std::vector<std::size_t> packed_bytes_;
  std::vector<std::uint32_t> layer_of_;  // by UnitIndex: in the order of the layers' first units
  std::uint32_t num_layers_ = 0;
  PackingPolicy policy_;
};

/// For people: what is packed of these homes, as the end of a rule; "" if nothing is.
std::string packing_rule(const Homes& homes);

}  // namespace torch_offload
