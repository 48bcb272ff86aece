#include "lanes/small_schedules.h"

#include <algorithm>
#include <cstddef>
#include <utility>

#include "lanes/placed_plan.h"

namespace torch_offload {

namespace {

constexpr std::size_t kSlice = kAlignmentBytes;

/// Which place each unit lies in: the first in the first, the next in one that is in use already or
/// in the next one. So no two are the same but for the places' names.
void collect_placements(unsigned num_units, unsigned max_places, std::vector<unsigned>& placement,
                        std::vector<std::vector<unsigned>>& placements) {
  if (placement.size() == num_units) {
    placements.push_back(placement);
    return;
  }
  const unsigned num_used =
      placement.empty() ? 0 : 1 + *std::max_element(placement.begin(), placement.end());
  for (unsigned place = 0; place < std::min(num_used + 1, max_places); ++place) {
    placement.push_back(place);
    collect_placements(num_units, max_places, placement, placements);
    placement.pop_back();
  }
}

Plan plan_of(const std::vector<unsigned>& placement, const std::vector<Transport>& transports) {
  std::vector<Unit> units;
  std::vector<ByteRange> places;
  for (UnitIndex unit = 0; unit < placement.size(); ++unit) {
    units.push_back(
        {std::to_string(unit), kSlice, unit / 2, unit % 2 == 0 ? UnitKind::kMha : UnitKind::kFfn});
    const std::size_t begin = placement[unit] * kSlice;
    places.push_back({begin, begin + kSlice});
  }
  Plan plan = lanes::plan_with_places(std::move(units), places, 0);
  plan.depth_bytes = plan.decode_depth_bytes = plan.window_bytes;
  for (UnitIndex unit = 0; unit < placement.size(); ++unit) {
    plan.transports.push_back(transports[unit % transports.size()]);
  }
  return plan;
}

std::string text_of(const SmallSchedule::Sequence& sequence) {
  std::string text;
  for (const UnitIndex unit : sequence) {
    text += text.empty() ? "" : " ";
    text += std::to_string(unit);
  }
  return "[" + text + "]";
}

}  // namespace

SmallSchedules::SmallSchedules(unsigned num_units, unsigned max_places, unsigned num_calls,
                               const std::vector<Transport>& transports)
    : num_units_(num_units), num_calls_(num_calls) {
  std::vector<std::vector<unsigned>> placements;
  std::vector<unsigned> placement;
  collect_placements(num_units, max_places, placement, placements);
  for (const std::vector<unsigned>& one : placements) {
    plans_.push_back(plan_of(one, transports));
  }
  std::uint64_t num_sequences = 1;
  for (unsigned length = 0; length <= num_calls; ++length, num_sequences *= num_units) {
    for (std::uint64_t i = 0; i < num_sequences; ++i) {
      sequences_.push_back(sequence_at(i, length));
    }
  }
}

SmallSchedule::Sequence SmallSchedules::sequence_at(std::uint64_t number, unsigned length) const {
  SmallSchedule::Sequence sequence(length);
  for (UnitIndex& unit : sequence) {
    unit = static_cast<UnitIndex>(number % num_units_);
    number /= num_units_;
  }
  return sequence;
}

std::string text_of(const SmallSchedule& schedule, const Plan& plan) {
  std::string places;
  for (const auto& place : plan.places) {
    places += place ? std::to_string(place->begin / kSlice) : "-";
  }
  return "places " + places + ", passes " + text_of(schedule.first) +
         (schedule.first_completed ? "" : " cut short") + " and " + text_of(schedule.second) +
         (schedule.second_completed ? "" : " cut short");
}

}  // namespace torch_offload
