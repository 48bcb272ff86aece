#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/pipeline.h"
#include "core/plan.h"
#include "core/unit.h"

namespace torch_offload {

/// A kind of forward that is to be expected: a prompt, a token, a batch of some size.
struct ExpectedForward {
  std::vector<std::int64_t> compute_ns;  ///< Of one use of each unit, by UnitIndex.
  double weight = 1.0;                   ///< How much its time counts beside that of the others.
};

/// Whether units may be packed without loss, and whether they must where they can.
enum class PackingPolicy : std::uint8_t {
  kNever,      ///< "raw"
  kWherePays,  ///< "auto": by as much as planning can tell.
  kAlways,     ///< "packed": all that streams; what stays is packed where that pays.
};

/// Of "raw", "auto" or "packed". Throws: ValueError that lists the names there are.
PackingPolicy parse_packing_policy(const std::string& name);

struct PlannerRequest {
  std::vector<Unit> units;  ///< In the order in which a forward is expected to call them.
  std::vector<ExpectedForward> forwards;
  /// What the host spends launching each unit's kernels, by UnitIndex. Empty: nothing.
  std::vector<std::int64_t> launch_ns;
  /// Units of one forward, as they are used. Default: each once, in order.
  std::vector<UnitIndex> sequence;
  double link_bytes_per_second = 0;
  std::int64_t copy_latency_ns = 0;
  /// Measured copies of each unit, instead of the rate.
  std::optional<std::vector<std::int64_t>> copy_ns;
  /// How far copies are to run ahead. Default: as far as pays; less where the budget demands it.
  std::optional<std::size_t> depth_bytes;
  PackingPolicy packing = PackingPolicy::kNever;
  /// What each unit takes packed, at the most; 0 for one that packing would not shrink. The plan
  /// counts with it, and whoever packs has to keep to it. Empty: nothing is packed.
  std::vector<std::size_t> packed_bytes;
  /// Of decoded bytes.
  double decode_bytes_per_second = 0;
  PipelineOptions options;

  std::size_t packed_bytes_of(UnitIndex unit) const {
    return packed_bytes.empty() ? 0 : packed_bytes[unit];
  }
};

/// A rule, and how well it does within the same budget.
struct Alternative {
  std::string rule;
  std::size_t window_bytes = 0;
  std::size_t resident_bytes = 0;
  double score_ns = 0;
};

struct Choice {
  Plan plan;
  std::string rule;                       ///< Why just these units stay.
  std::vector<std::int64_t> forward_ns;   ///< Predicted for each expected forward, once it is warm.
  double score_ns = 0;                    ///< Their weighted sum, which the choice makes small.
  std::vector<Alternative> alternatives;  ///< The best plan by each rule that was simulated.
  std::size_t num_simulated = 0;
  /// No candidate is faster by more than this part. Little, unless the search came to its end
  /// early.
  double gap = 0;
  double raw_score_ns = 0;  ///< Of the best plan that packs nothing; 0 if none was looked for.
  std::size_t packed_resident_bytes = 0;  ///< Of units that stay packed on the device.
  std::size_t staging_bytes = 0;          ///< The ring that packed copies pass through.
};

/// Chooses which units stay, which of all are packed, how far copies run ahead and where every unit
/// lies.
///
/// A pure function. Each candidate is run by the real pipeline in virtual time, so that what is
/// predicted and what will be run cannot drift apart. The fastest wins, and of equals the one that
/// leaves the least to stream. Where packing is a choice, its score is never above that of the best
/// plan that packs nothing. See Note [Choosing a plan] in docs/design.md.
///
/// `budget_bytes` is what resident units, packed or not, window and staging ring may take together.
///
/// Throws: ValueError if the budget is below the least (which the message names), or for units or
///         times that cannot be.
Choice choose_plan(const PlannerRequest& request, std::size_t budget_bytes);

/// Chooses only how the units of a plan travel that are not resident.
/// Throws: ValueError for units or times that cannot be, or if the plan is of others.
Choice choose_transports(const PlannerRequest& request, const Plan& plan);

/// The least budget that choose_plan accepts for these units: a window for the largest, and
/// a staging slot for the largest packed one where all that streams is to travel packed.
std::size_t least_budget_bytes(const PlannerRequest& request);

}  // namespace torch_offload
