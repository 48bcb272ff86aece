#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "core/unit.h"
#include "planner/packing.h"
#include "planner/planner.h"

namespace torch_offload {

/// What a plan's units cost, reckoned without running it.
class UnitCosts {
 public:
  explicit UnitCosts(const PlannerRequest& request);

  /// No plan with these homes is faster: neither the copies, nor what the SMs do, nor launching
  /// takes less. With one staging slot a packed copy waits for the decoder of the one before it.
  double least_ns(const Homes& homes, std::size_t staging_slots = kStagingSlots) const;
  /// Copies of each unit, as it travels; nothing where the rate of the link says it.
  std::optional<std::vector<std::int64_t>> copy_ns(const Homes& homes) const;
  /// Units of one forward, as they are used.
  const std::vector<UnitIndex>& sequence() const { return sequence_; }

 private:
  std::int64_t raw_copy_ns(UnitIndex unit) const;
  std::int64_t packed_copy_ns(UnitIndex unit) const;

  const PlannerRequest& request_;
  std::vector<UnitIndex> sequence_;
  // By UnitIndex, all uses in a forward together.
  std::vector<double> raw_ns_;
  std::vector<double> packed_ns_;
  std::vector<double> decode_ns_;
  std::vector<double> compute_ns_;  // by forward, of all units
  double launch_ns_ = 0;            // of all units
};

}  // namespace torch_offload
