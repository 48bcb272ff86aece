#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "core/plan.h"
#include "planner/layouts.h"
#include "planner/packing.h"
#include "planner/planner.h"
#include "planner/resident_sets.h"
#include "planner/unit_costs.h"

namespace torch_offload {

/// Looks for the fastest plan; see choose_plan.
class Search {
 public:
  explicit Search(const PlannerRequest& request);
  Search(const Search&) = delete;  // parts of it refer to others
  Search& operator=(const Search&) = delete;

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

  struct Score {
    std::vector<std::int64_t> forward_ns;  // of each expected forward
    double sum_ns = 0;                     // weighted
  };

  void add_candidates(const ResidentFamily& family, bool packed, std::size_t budget_bytes,
                      std::vector<Candidate>& candidates);
  void make_homes(const Candidate& candidate, Homes& homes) const;
  void try_all(bool packed, std::size_t budget_bytes);
  bool may_win(double least_ns) const;
  Score score_of(const Plan& plan, const Homes& homes);
  void consider(Plan plan, const Homes& homes, const std::string& rule);
  std::vector<Homes> ways_to_pack(const ResidentSet& set) const;
  Choice take_choice();

  const PlannerRequest& request_;
  UnitCosts costs_;
  Packer packer_;
  Layouts layouts_;
  std::vector<ResidentFamily> families_;
  Choice choice_;
  bool choice_is_packed_ = false;
  std::map<std::string, Alternative> alternatives_;
  std::size_t num_calls_ = 0;  // simulated, in the running search
  double least_unseen_ns_ = std::numeric_limits<double>::infinity();
};

}  // namespace torch_offload
