#include "planner/search.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "core/error.h"
#include "sim/simulate.h"

namespace torch_offload {

namespace {

// How far ahead copies may run, in parts of the largest unit that is copied and of its layer.
constexpr double kUnitsAhead[] = {0, 0.5, 1, 1.5, 2, 2.5, 3, 4};
constexpr double kLayersAhead[] = {1, 1.5, 2};

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

/// The roomiest first.
std::vector<Passage> Search::passages_of(const Homes& homes) const {
  const HeldBytes held = packer_.held_by(homes);
  std::vector<Passage> passages{{}};
  if (held.slot != 0) {
    passages.push_back({false, 1});
  }
  if (held.largest_copied != 0 && held.largest_decoded != 0) {
    for (std::size_t i = 0, count = passages.size(); i < count; ++i) {
      passages.push_back({true, passages[i].staging_slots});
    }
  }
  return passages;
}

std::vector<Layout> Search::layouts_of(const Homes& homes) const {
  std::size_t largest = 0;
  std::size_t total = 0;
  std::map<std::uint32_t, std::size_t> layers;
  for (UnitIndex unit = 0; unit < request_.units.size(); ++unit) {
    if (homes.is_copied(unit)) {
      const Unit& copied = request_.units[unit];
      largest = std::max(largest, copied.size_bytes);
      total += copied.size_bytes;
      layers[copied.layer_index] += copied.size_bytes;
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
  std::vector<Layout> layouts;
  for (const Passage& passage : passages_of(homes)) {
    layouts.push_back({passage, true, 0});
    for (const std::size_t depth : depths) {
      const bool is_asked_for = depth <= request_.depth_bytes.value_or(SIZE_MAX);
      if (is_asked_for && (depth < total || depth == 0)) {
        layouts.push_back({passage, false, depth});
      }
    }
  }
  return layouts;
}

/// The plan, or nothing where it does not fit, or keeps a unit in the window for good: that plan is
/// another set's.
std::optional<Plan> Search::lay_out(const Homes& homes, const Layout& layout,
                                    std::size_t budget_bytes) const {
  const HeldBytes held = packer_.held_by(homes);
  const auto [one_ring, staging_slots] = layout.passage;
  const std::size_t held_bytes = held.total(staging_slots);
  const std::size_t room = budget_bytes - std::min(budget_bytes, held_bytes);
  std::size_t num_placed = 0;
  std::size_t num_copied = 0;
  for (UnitIndex unit = 0; unit < request_.units.size(); ++unit) {
    num_placed += homes.resident[unit] ? 0U : 1U;
    num_copied += homes.is_copied(unit) ? 1U : 0U;
  }
  const std::size_t ahead =
      layout.is_single || num_copied < 2 ? 0 : std::min(layout.depth_bytes, held.largest_copied);
  const std::size_t least = one_ring ? std::max(held.largest_copied + ahead, held.largest_decoded)
                                     : held.largest_copied + ahead + held.largest_decoded;
  if (held_bytes > budget_bytes || least > room) {
    return std::nullopt;
  }
  PlanRequest planned;
  planned.units = request_.units;
  planned.resident = homes.resident;
  planned.transports = homes.transports;
  planned.depth_bytes = layout.depth_bytes;
  planned.one_ring = one_ring;
  planned.staging_slots = staging_slots;
  if (layout.is_single) {
    planned.window_bytes = single_window_bytes(homes, held, one_ring);
    if (*planned.window_bytes > room) {
      return std::nullopt;
    }
  }
  std::optional<Plan> plan = try_make_plan(planned, room);
  if (!plan) {
    return std::nullopt;
  }
  for (UnitIndex unit = 0; unit < plan->units.size(); ++unit) {
    const std::size_t num_decoded = num_placed - num_copied;
    const std::size_t num_in_ring =
        one_ring ? num_placed : (homes.is_copied(unit) ? num_copied : num_decoded);
    if (!plan->is_resident(unit) && plan->overlaps[unit].empty() && num_in_ring > 1) {
      return std::nullopt;
    }
  }
  return plan;
}

/// The window for one unit at a time; beside it, in a ring of their own, those that stay packed are
/// decoded while a kernel runs.
std::size_t Search::single_window_bytes(const Homes& homes, const HeldBytes& held,
                                        bool one_ring) const {
  if (one_ring || held.largest_copied == 0 || held.largest_decoded == 0) {
    return std::max(held.largest_copied, held.largest_decoded);
  }
  PlanRequest decoded;
  decoded.units = request_.units;
  decoded.transports = homes.transports;
  decoded.resident.resize(homes.resident.size());
  for (UnitIndex unit = 0; unit < homes.resident.size(); ++unit) {
    const bool is_decoded = homes.transport(unit) == Transport::kPackedResident;
    decoded.resident[unit] = !is_decoded;
    decoded.transports[unit] = is_decoded ? Transport::kPackedResident : Transport::kRaw;
  }
  return held.largest_copied + make_plan(decoded).window_bytes;
}

// --- the search --------------------------------------------------------------------------------

void Search::try_plan(Plan plan, const Homes& homes, const std::string& rule) {
  double score_ns = 0;
  std::vector<std::int64_t> forward_ns;
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
    forward_ns.push_back(steady_ns);
    score_ns += forward.weight * static_cast<double>(steady_ns);
    num_calls_ += kPasses * costs_.sequence().size();
  }
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
    choice_.forward_ns = std::move(forward_ns);
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
      const std::vector<Layout> layouts = layouts_of(homes);
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
        if (std::optional<Plan> plan = lay_out(homes, layouts[i], budget_bytes)) {
          try_plan(*std::move(plan), homes, candidate.family->rule);
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
    try_plan(std::move(packed), homes, kNothingStays);
    if (!uses_packing(homes)) {
      choice_.raw_score_ns = choice_.score_ns;
    }
  }
  return take_choice();
}

}  // namespace torch_offload
