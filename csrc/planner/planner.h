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

struct PlannerRequest {
  std::vector<Unit> units;  ///< In the order in which a forward is expected to call them.
  std::vector<ExpectedForward> forwards;
  /// Units of one forward, as they are used. Default: each once, in order.
  std::vector<UnitIndex> sequence;
  double link_bytes_per_second = 0;
  std::int64_t copy_latency_ns = 0;
  /// Measured copies of each unit, instead of the rate.
  std::optional<std::vector<std::int64_t>> copy_ns;
  /// What resident units and window may take together. Default: nothing stays resident.
  std::optional<std::size_t> budget_bytes;
  /// How far copies are to run ahead. Default: as far as pays; less where the budget demands it.
  std::optional<std::size_t> depth_bytes;
  PipelineOptions options;
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
};

/// Chooses which units stay, how far copies run ahead and where every other unit lies.
///
/// A pure function. Each candidate is run by the real pipeline in virtual time, so that what is
/// predicted and what will be run cannot drift apart. With a budget the fastest wins, and of equals
/// the one that leaves the least to stream; without one nothing stays, and the smallest window
/// within half a per cent of the best wins. See Note [Choosing a plan] in docs/design.md.
///
/// Throws: ValueError if the budget is below the least (which the message names), or for units or
///         times that cannot be.
Choice choose_plan(const PlannerRequest& request);

/// The least `budget_bytes` that choose_plan accepts for these units: a window for the largest.
std::size_t least_budget_bytes(const std::vector<Unit>& units);

}  // namespace torch_offload
