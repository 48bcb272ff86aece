#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "core/plan.h"
#include "planner/packing.h"
#include "planner/planner.h"

namespace torch_offload {

/// Where units and packed copies pass through, however much of it there is.
struct Passage {
  bool one_ring = false;  // see PlanRequest
  std::size_t staging_slots = kStagingSlots;
};

/// One way to lay out the units that pass through the window: a depth, or room for one at a time.
struct Layout {
  Passage passage;
  bool is_single = false;  // nothing is brought into the window while a kernel runs
  std::size_t depth_bytes = 0;
};

/// Lists and makes the ways to lay out what does not stay.
///
/// Lifetime: request and packer are referred to, not copied.
class Layouts {
 public:
  Layouts(const PlannerRequest& request, const Packer& packer);

  /// All that are to be tried for these homes, the roomiest passage first. The list does not depend
  /// on the budget.
  std::vector<Layout> of(const Homes& homes) const;
  /// The plan, or nothing where it does not fit, or keeps a unit in the window for good: that plan
  /// is another set's.
  std::optional<Plan> lay_out(const Homes& homes, const Layout& layout,
                              std::size_t budget_bytes) const;

 private:
  std::vector<Passage> passages_of(const Homes& homes) const;
  std::size_t single_window_bytes(const Homes& homes, const HeldBytes& held, bool one_ring) const;

  const PlannerRequest& request_;
  const Packer& packer_;
};

}  // namespace torch_offload
