#include "planner/planner.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <tuple>
#include <utility>

#include "core/error.h"
#include "planner/resident_sets.h"
#include "sim/simulate.h"

namespace torch_offload {

namespace {

// How far ahead copies may run, in parts of the largest unit left to stream and of its layer.
constexpr double kUnitsAhead[] = {0, 0.5, 1, 1.5, 2, 2.5, 3, 4};
constexpr double kLayersAhead[] = {1, 1.5, 2};

// A cold pass, one that learns the seam, and the one that is read off.
constexpr std::size_t kPasses = 3;

// Without a budget the smallest window this close to the best is the right one.
constexpr double kCloseEnough = 1.005;

// Nearer than this, two plans take the same time.
constexpr double kSameTime = 1.0002;

// Planning ends after so many simulated unit calls: a fraction of a second.
constexpr std::size_t kMostSimulatedCalls = 80'000;

/// One way to lay out the streamed units of a set: a depth, or the largest unit's window alone.
struct Layout {
  bool is_single = false;  // one unit at a time: nothing is copied while a kernel runs
  std::size_t depth_bytes = 0;
};

class Search {
 public:
  explicit Search(const PlannerRequest& request)
      : request_(request), families_(resident_families(request.units)) {
    if (request_.sequence.empty()) {
      for (UnitIndex unit = 0; unit < request_.units.size(); ++unit) {
        sequence_.push_back(unit);
      }
    } else {
      sequence_ = request_.sequence;
    }
  }

  Choice with_budget(std::size_t budget_bytes);
  Choice without_budget();

 private:
  struct Candidate {
    const ResidentFamily* family;
    const ResidentSet* set;
    double least_ns;       // no plan with this set is faster
    std::size_t position;  // in the order of the families
  };

  std::vector<Layout> layouts_of(const ResidentSet& set) const;
  std::optional<Plan> lay_out(const ResidentSet& set, const Layout& layout,
                              std::size_t budget_bytes) const;
  double least_ns(const ResidentSet& set) const;
  std::int64_t copy_ns(UnitIndex unit) const;
  void try_plan(Plan plan, const char* rule);
  bool has_time() const { return num_calls_ < kMostSimulatedCalls || choice_.num_simulated == 0; }
  Choice take_choice();

  const PlannerRequest& request_;
  std::vector<ResidentFamily> families_;
  std::vector<UnitIndex> sequence_;
  Choice choice_;
  std::map<std::string, Alternative> alternatives_;
  std::size_t num_calls_ = 0;
};

std::int64_t Search::copy_ns(UnitIndex unit) const {
  if (request_.copy_ns) {
    return request_.copy_ns->at(unit);
  }
  return request_.copy_latency_ns +
         static_cast<std::int64_t>(static_cast<double>(request_.units[unit].size_bytes) * 1e9 /
                                   request_.link_bytes_per_second);
}

/// Neither the copies nor the kernels of a forward can take less.
double Search::least_ns(const ResidentSet& set) const {
  double copies_ns = 0;
  for (const UnitIndex unit : sequence_) {
    copies_ns += set.resident[unit] ? 0.0 : static_cast<double>(copy_ns(unit));
  }
  double sum_ns = 0;
  for (const ExpectedForward& forward : request_.forwards) {
    double compute_ns = 0;
    for (const UnitIndex unit : sequence_) {
      compute_ns += static_cast<double>(forward.compute_ns[unit]);
    }
    sum_ns += forward.weight * std::max(copies_ns, compute_ns);
  }
  return sum_ns;
}

std::vector<Layout> Search::layouts_of(const ResidentSet& set) const {
  std::size_t largest = 0;
  std::size_t total = 0;
  std::map<std::uint32_t, std::size_t> layers;
  for (UnitIndex unit = 0; unit < request_.units.size(); ++unit) {
    if (!set.resident[unit]) {
      const Unit& streamed = request_.units[unit];
      largest = std::max(largest, streamed.size_bytes);
      total += streamed.size_bytes;
      layers[streamed.layer_index] += streamed.size_bytes;
    }
  }
  std::vector<std::size_t> layer_sizes;
  layer_sizes.reserve(layers.size());
  for (const auto& [layer, size_bytes] : layers) {
    layer_sizes.push_back(size_bytes);
  }
  // The usual one: a head or a single unit that lost its layer says little about the others.
  std::sort(layer_sizes.begin(), layer_sizes.end());
  const std::size_t layer = layer_sizes.empty() ? 0 : layer_sizes[layer_sizes.size() / 2];
  const auto part_of = [](std::size_t size_bytes, double part) {
    return static_cast<std::size_t>(static_cast<double>(size_bytes) * part);
  };
  std::vector<std::size_t> depths;
  if (request_.depth_bytes) {
    depths.push_back(*request_.depth_bytes);
  }
  for (const double part : kUnitsAhead) {
    depths.push_back(part_of(largest, part));
  }
  for (const double part : kLayersAhead) {
    depths.push_back(part_of(layer, part));
  }
  std::sort(depths.begin(), depths.end());
  depths.erase(std::unique(depths.begin(), depths.end()), depths.end());
  std::vector<Layout> layouts{{true, 0}};
  for (const std::size_t depth : depths) {
    const bool is_asked_for = depth <= request_.depth_bytes.value_or(SIZE_MAX);
    if (is_asked_for && (depth < total || depth == 0)) {
      layouts.push_back({false, depth});
    }
  }
  return layouts;
}

/// The plan, or nothing where it does not fit, or keeps a unit in the window for good: that plan is
/// another set's.
std::optional<Plan> Search::lay_out(const ResidentSet& set, const Layout& layout,
                                    std::size_t budget_bytes) const {
  std::size_t largest = 0;
  std::size_t num_streamed = 0;
  for (UnitIndex unit = 0; unit < request_.units.size(); ++unit) {
    if (!set.resident[unit]) {
      largest = std::max(largest, request_.units[unit].size_bytes);
      ++num_streamed;
    }
  }
  const std::size_t room = budget_bytes - std::min(budget_bytes, set.size_bytes);
  const std::size_t least =
      largest + (layout.is_single ? 0 : std::min(layout.depth_bytes, largest));
  if (set.size_bytes > budget_bytes || largest > room ||
      (num_streamed > 1 && layout.depth_bytes > 0 && least > room)) {
    return std::nullopt;
  }
  PlanRequest planned;
  planned.units = request_.units;
  planned.resident = set.resident;
  planned.depth_bytes = layout.depth_bytes;
  if (layout.is_single) {
    planned.window_bytes = largest;
  }
  std::optional<Plan> plan = try_make_plan(planned, room);
  if (!plan) {
    return std::nullopt;
  }
  if (num_streamed > 1 && request_.budget_bytes) {
    for (UnitIndex unit = 0; unit < plan->units.size(); ++unit) {
      if (!plan->is_resident(unit) && plan->overlaps[unit].empty()) {
        return std::nullopt;
      }
    }
  }
  return plan;
}

void Search::try_plan(Plan plan, const char* rule) {
  double score_ns = 0;
  std::vector<std::int64_t> forward_ns;
  for (const ExpectedForward& forward : request_.forwards) {
    SimRequest run;
    run.plan = plan;
    run.options = request_.options;
    run.costs.compute_ns = forward.compute_ns;
    if (request_.copy_ns) {
      run.costs.copy_ns = request_.copy_ns;
    } else {
      run.costs.copy_bytes_per_second = request_.link_bytes_per_second;
      run.costs.copy_latency_ns = request_.copy_latency_ns;
    }
    run.passes.assign(kPasses, sequence_);
    run.keep_log = false;
    const SimResult result = simulate(run);
    const std::int64_t steady_ns =
        result.pass_end_ns[kPasses - 1] - result.pass_end_ns[kPasses - 2];
    forward_ns.push_back(steady_ns);
    score_ns += forward.weight * static_cast<double>(steady_ns);
    num_calls_ += kPasses * sequence_.size();
  }
  const bool is_first = choice_.num_simulated++ == 0;
  const auto found = alternatives_.find(rule);
  if (found == alternatives_.end() || score_ns < found->second.score_ns) {
    alternatives_[rule] = {rule, plan.window_bytes, plan.resident_bytes, score_ns};
  }
  const bool is_same =
      score_ns < choice_.score_ns * kSameTime && choice_.score_ns < score_ns * kSameTime;
  const bool is_better =
      is_same ? plan.resident_bytes > choice_.plan.resident_bytes : score_ns < choice_.score_ns;
  if (is_first || is_better) {
    choice_.plan = std::move(plan);
    choice_.rule = rule;
    choice_.forward_ns = std::move(forward_ns);
    choice_.score_ns = score_ns;
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
  return std::move(choice_);
}

Choice Search::with_budget(std::size_t budget_bytes) {
  std::vector<Candidate> candidates;
  for (const ResidentFamily& family : families_) {
    for (const ResidentSet& set : family.sets) {
      if (set.size_bytes <= budget_bytes) {
        candidates.push_back({&family, &set, least_ns(set), candidates.size()});
      }
    }
  }
  // The most promising first; of equals, what leaves the least to stream.
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    return std::tie(a.least_ns, b.set->size_bytes, a.position) <
           std::tie(b.least_ns, a.set->size_bytes, b.position);
  });
  const auto may_win = [&](const Candidate& candidate) {
    return has_time() &&
           (choice_.num_simulated == 0 || candidate.least_ns * kSameTime < choice_.score_ns);
  };
  // First the best set of each rule and layout: that finds a good plan soon, and a good plan rules
  // most of the others out unseen.
  std::map<std::pair<const ResidentFamily*, std::size_t>, const ResidentSet*> tried;
  for (const bool is_first_round : {true, false}) {
    for (const Candidate& candidate : candidates) {
      if (!may_win(candidate)) {
        break;
      }
      const std::vector<Layout> layouts = layouts_of(*candidate.set);
      for (std::size_t i = 0; i < layouts.size(); ++i) {
        const auto key = std::make_pair(candidate.family, i);
        const auto found = tried.find(key);
        const bool skips = is_first_round ? found != tried.end()
                                          : found != tried.end() && found->second == candidate.set;
        if (skips || !may_win(candidate)) {
          continue;
        }
        if (std::optional<Plan> plan = lay_out(*candidate.set, layouts[i], budget_bytes)) {
          try_plan(*std::move(plan), candidate.family->rule);
          tried.emplace(key, candidate.set);
        }
      }
    }
  }
  if (choice_.num_simulated == 0) {
    const std::size_t least = least_budget_bytes(request_.units);
    throw ValueError("expected a budget of at least " + std::to_string(least) +
                     " bytes, a window for the largest unit, got " + std::to_string(budget_bytes) +
                     "; raise gpu_budget, or use granularity='module', whose units are smaller");
  }
  return take_choice();
}

Choice Search::without_budget() {
  const ResidentSet& none = families_.front().sets.front();
  std::vector<std::pair<Plan, double>> tried;
  for (const Layout& layout : layouts_of(none)) {
    if (std::optional<Plan> plan = lay_out(none, layout, SIZE_MAX)) {
      Choice best_before = std::exchange(choice_, Choice{});
      Plan copy = *plan;
      try_plan(*std::move(plan), "nothing");
      tried.emplace_back(std::move(copy), choice_.score_ns);
      choice_.num_simulated += best_before.num_simulated;
    }
  }
  double best_ns = tried.front().second;
  for (const auto& [plan, score_ns] : tried) {
    best_ns = std::min(best_ns, score_ns);
  }
  const std::pair<Plan, double>* smallest = nullptr;
  for (const auto& one : tried) {
    if (one.second <= best_ns * kCloseEnough &&
        (smallest == nullptr || one.first.window_bytes < smallest->first.window_bytes)) {
      smallest = &one;
    }
  }
  const std::size_t num_simulated = choice_.num_simulated;
  choice_ = Choice{};
  try_plan(smallest->first, "nothing");
  choice_.num_simulated = num_simulated;
  return take_choice();
}

void check_request(const PlannerRequest& request) {
  check_units(request.units);
  if (request.forwards.empty()) {
    throw ValueError("expected at least one kind of forward to plan for, got none");
  }
  for (const ExpectedForward& forward : request.forwards) {
    if (forward.compute_ns.size() != request.units.size()) {
      throw ValueError("expected compute times of " + std::to_string(request.units.size()) +
                       " units, got " + std::to_string(forward.compute_ns.size()));
    }
    if (!(forward.weight > 0) || !std::isfinite(forward.weight)) {
      throw ValueError("expected the weight of a forward above 0, got " +
                       std::to_string(forward.weight));
    }
  }
  if (!request.copy_ns && !(request.link_bytes_per_second > 0)) {
    throw ValueError("expected a link rate above 0 bytes per second, got " +
                     std::to_string(request.link_bytes_per_second));
  }
  if (request.copy_ns && request.copy_ns->size() != request.units.size()) {
    throw ValueError("expected copy times of " + std::to_string(request.units.size()) +
                     " units, got " + std::to_string(request.copy_ns->size()));
  }
  for (const UnitIndex unit : request.sequence) {
    if (unit >= request.units.size()) {
      throw IndexError("expected a sequence of the " + std::to_string(request.units.size()) +
                       " units, counted from 0, got unit " + std::to_string(unit));
    }
  }
}

}  // namespace

Choice choose_plan(const PlannerRequest& request) {
  check_request(request);
  Search search(request);
  return request.budget_bytes ? search.with_budget(*request.budget_bytes) : search.without_budget();
}

std::size_t least_budget_bytes(const std::vector<Unit>& units) {
  check_units(units);
  std::size_t largest = 0;
  for (const Unit& unit : units) {
    largest = std::max(largest, unit.size_bytes);
  }
  return largest;
}

}  // namespace torch_offload
