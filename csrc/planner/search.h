#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/plan.h"
#include "planner/packing.h"
#include "planner/planner.h"
#include "planner/resident_sets.h"
#include "planner/unit_costs.h"

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

/// Looks for the fastest plan; see choose_plan.
class Search {
 public:
  explicit Search(const PlannerRequest& request);

  Choice with_budget(std::size_t budget_bytes);
  /// Chooses only how units travel: they have their places.
  Choice in_places(const Plan& plan);

 private:
  struct Candidate {
    const ResidentFamily* family;
    const ResidentSet* set;
    Packing packing;
    bool is_packed;        // whether anything is; else `packing` says nothing
    double least_ns;       // no plan with these homes is faster
    std::size_t position;  // in the order of the families
  };

  void add_candidates(const ResidentFamily& family, bool packed, std::size_t budget_bytes,
                      std::vector<Candidate>& candidates);
  void make_homes(const Candidate& candidate, Homes& homes) const;
  void try_all(bool packed, std::size_t budget_bytes);
  bool may_win(double least_ns) const;
  std::vector<Passage> passages_of(const Homes& homes) const;
  std::vector<Layout> layouts_of(const Homes& homes) const;
  std::optional<Plan> lay_out(const Homes& homes, const Layout& layout,
                              std::size_t budget_bytes) const;
  void try_plan(Plan plan, const Homes& homes, const std::string& rule);
  std::size_t single_window_bytes(const Homes& homes, const HeldBytes& held, bool one_ring) const;
  std::vector<Homes> ways_to_pack(const ResidentSet& set) const;
  Choice take_choice();

  const PlannerRequest& request_;
  UnitCosts costs_;
  Packer packer_;
  std::vector<ResidentFamily> families_;
  Choice choice_;
  bool choice_is_packed_ = false;
  std::map<std::string, Alternative> alternatives_;
  std::size_t num_calls_ = 0;  // simulated, in the running search
  double least_unseen_ns_ = std::numeric_limits<double>::infinity();
};

}  // namespace torch_offload
