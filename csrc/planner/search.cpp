#include "planner/search.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "core/error.h"
#include "sim/simulate.h"

namespace torch_offload {

namespace {

// A cold pass, one that learns the seam, and the one that is read off.
constexpr std::size_t kPasses = 3;

// Nearer than this, two plans take the same time.
constexpr double kSameTime = 1.0002;

// A search ends where no candidate left can be faster by more than this part.
constexpr double kGap = 1.001;

// It ends in any case after so many simulated unit calls: a fraction of a second.
constexpr std::size_t kMostSimulatedCalls = 80'000;

// The rule of plans that were not chosen by what stays.
constexpr const char* kNothingStays = "nothing";

bool uses_packing(const Homes& homes) {
  return std::any_of(homes.transports.begin(), homes.transports.end(),
                     [](Transport transport) { return transport != Transport::kRaw; });
}

}  // namespace

// --- candidates --------------------------------------------------------------------------------

Search::Search(const PlannerRequest& request)
    : request_(request),
      costs_(request),
      packer_(request.units, request.packed_bytes, request.packing),
      layouts_(request_, packer_),
      families_(resident_families(request.units)) {}

void Search::make_homes(const Candidate& candidate, Homes& homes) const {
  if (candidate.is_packed) {
    packer_.pack(*candidate.set, candidate.packing, homes);
  } else {
    homes.resident = candidate.set->resident;
    homes.transports.clear();
  }
}

/// Those of one family that may fit.
void Search::add_candidates(const ResidentFamily& family, bool packed, std::size_t budget_bytes,
                            std::vector<Candidate>& candidates) {
  Homes homes;
  for (const ResidentSet& set : family.sets) {
    if (!packed) {
      if (set.size_bytes <= budget_bytes) {
        homes.resident = set.resident;
        candidates.push_back({&family, &set, {}, false, costs_.least_ns(homes), candidates.size()});
      }
      continue;
    }
    for (const Packing& packing : packer_.packings_of(family, set)) {
      packer_.pack(set, packing, homes);
      const bool is_another = uses_packing(homes) || request_.packing == PackingPolicy::kAlways;
      if (is_another && packer_.held_by(homes).least() <= budget_bytes) {
        candidates.push_back(
            {&family, &set, packing, true, costs_.least_ns(homes), candidates.size()});
      }
    }
  }
}

// --- the search --------------------------------------------------------------------------------

/// Runs the forwards that are expected, in virtual time.
Search::Score Search::score_of(const Plan& plan, const Homes& homes) {
  Score score;
  for (const ExpectedForward& forward : request_.forwards) {
    SimRequest run;
    run.plan = plan;
    run.packed_bytes = request_.packed_bytes;
    run.options = request_.options;
    run.costs.compute_ns = forward.compute_ns;
    run.costs.launch_ns = request_.launch_ns;
    run.costs.copy_ns = costs_.copy_ns(homes);
    if (!run.costs.copy_ns) {
      run.costs.copy_bytes_per_second = request_.link_bytes_per_second;
      run.costs.copy_latency_ns = request_.copy_latency_ns;
    }
    if (request_.packing != PackingPolicy::kNever) {
      run.costs.decode_bytes_per_second = request_.decode_bytes_per_second;
    }
    run.passes.assign(kPasses, costs_.sequence());
    run.keep_log = false;
    const SimResult result = simulate(run);
    const std::int64_t steady_ns =
        result.pass_end_ns[kPasses - 1] - result.pass_end_ns[kPasses - 2];
    score.forward_ns.push_back(steady_ns);
    score.sum_ns += forward.weight * static_cast<double>(steady_ns);
    num_calls_ += kPasses * costs_.sequence().size();
  }
  return score;
}

/// Takes the plan for the choice if it is better than what has been, and for what its rule can do.
void Search::consider(Plan plan, const Homes& homes, const std::string& rule) {
  Score score = score_of(plan, homes);
  const double score_ns = score.sum_ns;
  const bool is_first = choice_.num_simulated++ == 0;
  const bool is_packed = uses_packing(homes);
  const std::string full_rule = rule + packing_rule(homes);
  const auto found = alternatives_.find(full_rule);
  if (found == alternatives_.end() || score_ns < found->second.score_ns) {
    alternatives_[full_rule] = {full_rule, plan.window_bytes, plan.resident_bytes, score_ns};
  }
  const bool is_same =
      score_ns < choice_.score_ns * kSameTime && choice_.score_ns < score_ns * kSameTime;
  bool is_better =
      is_same ? plan.resident_bytes > choice_.plan.resident_bytes : score_ns < choice_.score_ns;
  if (is_packed && !choice_is_packed_) {
    is_better = score_ns * kGap < choice_.score_ns;  // packed copies cost host memory
  }
  if (is_first || is_better) {
    const HeldBytes held = packer_.held_by(homes);
    choice_.staging_bytes = plan.staging_slots * held.slot;
    choice_.plan = std::move(plan);
    choice_.rule = full_rule;
    choice_.forward_ns = std::move(score.forward_ns);
    choice_.score_ns = score_ns;
    choice_.packed_resident_bytes = held.packed_resident;
    choice_is_packed_ = is_packed;
  }
}

bool Search::may_win(double least_ns) const {
  return choice_.num_simulated == 0 ||
         (least_ns * kGap < choice_.score_ns && num_calls_ < kMostSimulatedCalls);
}

void Search::try_all(bool packed, std::size_t budget_bytes) {
  std::vector<Candidate> candidates;
  for (const ResidentFamily& family : families_) {
    add_candidates(family, packed, budget_bytes, candidates);
  }
  // The most promising first; of equals, what leaves the least to stream.
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    return std::tie(a.least_ns, b.set->size_bytes, a.position) <
           std::tie(b.least_ns, a.set->size_bytes, b.position);
  });
  // First the best set of each rule and layout: that finds a good plan soon, and a good plan rules
  // most of the others out unseen.
  num_calls_ = 0;
  Homes homes;
  std::map<std::pair<const ResidentFamily*, std::size_t>, std::size_t> tried;
  for (const bool is_first_round : {true, false}) {
    for (const Candidate& candidate : candidates) {
      if (!may_win(candidate.least_ns)) {
        // Those behind it promise no more.
        if (num_calls_ >= kMostSimulatedCalls) {
          least_unseen_ns_ = std::min(least_unseen_ns_, candidate.least_ns);
        }
        break;
      }
      make_homes(candidate, homes);
      const std::vector<Layout> layouts = layouts_.of(homes);
      const double least_of_one_slot_ns = costs_.least_ns(homes, /*staging_slots=*/1);
      for (std::size_t i = 0; i < layouts.size(); ++i) {
        const auto key = std::make_pair(candidate.family, i);
        const auto found = tried.find(key);
        const bool skips = is_first_round
                               ? found != tried.end()
                               : found != tried.end() && found->second == candidate.position;
        const double least_ns =
            layouts[i].passage.staging_slots == 1 ? least_of_one_slot_ns : candidate.least_ns;
        if (skips || !may_win(least_ns)) {
          continue;
        }
        if (std::optional<Plan> plan = layouts_.lay_out(homes, layouts[i], budget_bytes)) {
          consider(*std::move(plan), homes, candidate.family->rule);
          tried.emplace(key, candidate.position);
        }
      }
    }
  }
}

Choice Search::take_choice() {
  for (auto& [rule, alternative] : alternatives_) {
    choice_.alternatives.push_back(std::move(alternative));
  }
  std::sort(choice_.alternatives.begin(), choice_.alternatives.end(),
            [](const Alternative& a, const Alternative& b) {
              return std::tie(a.score_ns, a.rule) < std::tie(b.score_ns, b.rule);
            });
  choice_.gap = std::max(kGap, choice_.score_ns / least_unseen_ns_) - 1;
  return std::move(choice_);
}

Choice Search::with_budget(std::size_t budget_bytes) {
  if (request_.packing != PackingPolicy::kAlways) {
    try_all(/*packed=*/false, budget_bytes);
    choice_.raw_score_ns = choice_.score_ns;
  }
  if (request_.packing != PackingPolicy::kNever) {
    try_all(/*packed=*/true, budget_bytes);
  }
  if (choice_.num_simulated == 0) {
    throw ValueError("expected a budget of at least " +
                     std::to_string(least_budget_bytes(request_)) +
                     " bytes, a window for the largest unit" +
                     (request_.packing == PackingPolicy::kAlways
                          ? " and a staging slot for the largest packed one"
                          : "") +
                     ", got " + std::to_string(budget_bytes) + "; raise gpu_budget");
  }
  return take_choice();
}

/// All of a set that may be made of it while what stays does so as it is; unpacked first.
std::vector<Homes> Search::ways_to_pack(const ResidentSet& set) const {
  std::vector<Homes> ways;
  if (request_.packing != PackingPolicy::kAlways) {
    ways.push_back({set.resident, {}});
  }
  if (request_.packing != PackingPolicy::kNever) {
    for (const Packing& packing : packer_.packings_of(families_.front(), set)) {
      if (packing.plain_layers == packing.kept_layers) {
        packer_.pack(set, packing, ways.emplace_back());
      }
    }
  }
  return ways;
}

Choice Search::in_places(const Plan& plan) {
  ResidentSet set;
  for (UnitIndex unit = 0; unit < plan.units.size(); ++unit) {
    set.resident.push_back(plan.is_resident(unit));
  }
  for (const Homes& homes : ways_to_pack(set)) {
    Plan packed = plan;
    packed.transports = homes.transports;
    consider(std::move(packed), homes, kNothingStays);
    if (!uses_packing(homes)) {
      choice_.raw_score_ns = choice_.score_ns;
    }
  }
  return take_choice();
}

}  // namespace torch_offload
