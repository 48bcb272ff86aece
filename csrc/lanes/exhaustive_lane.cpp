#include "lanes/exhaustive_lane.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "lanes/placed_plan.h"
#include "lanes/schedule_rig.h"

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

std::uint64_t count_sequences(unsigned num_units, unsigned length) {
  std::uint64_t count = 1;
  for (unsigned i = 0; i < length; ++i) {
    count *= num_units;
  }
  return count;
}

/// One of all sequences of `length` calls, by its number.
std::vector<UnitIndex> sequence_at(std::uint64_t number, unsigned num_units, unsigned length) {
  std::vector<UnitIndex> sequence(length);
  for (UnitIndex& unit : sequence) {
    unit = static_cast<UnitIndex>(number % num_units);
    number /= num_units;
  }
  return sequence;
}

void pass(ScheduleRig& rig, const std::vector<UnitIndex>& sequence, bool completed) {
  rig.pipeline().enter();
  for (const UnitIndex unit : sequence) {
    rig.call(unit);
  }
  rig.pipeline().leave(completed);
}

std::string text_of(const std::vector<UnitIndex>& sequence) {
  std::string text;
  for (const UnitIndex unit : sequence) {
    text += text.empty() ? "" : " ";
    text += std::to_string(unit);
  }
  return "[" + text + "]";
}

}  // namespace

ExhaustiveLane::ExhaustiveLane(const ExhaustiveOptions& options)
    : options_(options), judges_(std::max(1U, options.num_threads), LaneJudge(options.is_control)) {
  for (unsigned num_units = 1; num_units <= options.max_units; ++num_units) {
    add_level(num_units);
  }
}

void ExhaustiveLane::add_level(unsigned num_units) {
  Level level;
  level.num_units = num_units;
  std::vector<std::vector<unsigned>> placements;
  std::vector<unsigned> placement;
  collect_placements(num_units, options_.max_places, placement, placements);
  for (const std::vector<unsigned>& one : placements) {
    level.plans.push_back(plan_of(one, options_.transports));
  }
  for (unsigned length = 0; length <= options_.max_calls; ++length) {
    for (std::uint64_t i = 0; i < count_sequences(num_units, length); ++i) {
      const Sequence sequence = sequence_at(i, num_units, length);
      level.firsts.push_back({sequence, true});
      // An exception in a unit and one behind it are the same calls: release, leave(false).
      level.firsts.push_back({sequence, false});
    }
  }
  level.num_seconds = count_sequences(num_units, options_.max_calls);
  level.first_block = num_blocks_;
  level.first_schedule = num_schedules_;
  num_blocks_ += level.num_blocks();
  num_schedules_ += level.num_blocks() * level.num_seconds;
  levels_.push_back(std::move(level));
}

bool ExhaustiveLane::advance(std::uint64_t num_schedules) {
  std::atomic<std::uint64_t> next_block{next_block_};
  std::atomic<std::uint64_t> num_done{0};
  work_in_parallel(judges_, [&](LaneJudge& judge, std::size_t) {
    while (num_done < num_schedules) {
      const std::uint64_t block = next_block++;
      if (block >= num_blocks_) {
        break;
      }
      num_done += run_block(block, judge);
    }
  });
  next_block_ = std::min(next_block.load(), num_blocks_);
  return next_block_ < num_blocks_;
}

/// Returns how many schedules it has run.
std::uint64_t ExhaustiveLane::run_block(std::uint64_t block, LaneJudge& judge) const {
  const auto above = std::find_if(levels_.begin(), levels_.end(), [block](const Level& level) {
    return level.first_block > block;
  });
  const Level& level = *(above - 1);
  const std::uint64_t index = block - level.first_block;
  const Plan& plan = level.plans[index / level.firsts.size()];
  const FirstPass& first = level.firsts[index % level.firsts.size()];
  const std::uint64_t number = level.first_schedule + index * level.num_seconds;
  PipelineOptions options;
  options.mode = options_.mode;
  options.layout = options_.layout;
  std::uint64_t num_run = 0;
  const std::uint64_t skipped = (options_.stride - number % options_.stride) % options_.stride;
  for (std::uint64_t i = skipped; i < level.num_seconds; i += options_.stride) {
    const Sequence second = sequence_at(i, level.num_units, options_.max_calls);
    const auto what = [&] {
      std::string places;
      for (const auto& place : plan.places) {
        places += std::to_string(place->begin / kSlice);
      }
      return "places " + places + ", passes " + text_of(first.sequence) +
             (first.completed ? "" : " cut short") + " and " + text_of(second);
    };
    try {
      ScheduleRig rig(plan, options);
      pass(rig, first.sequence, first.completed);
      pass(rig, second, true);
      judge.judge(rig.finish(), what);
    } catch (const std::exception& error) {
      judge.add_bad(what() + ": " + error.what());
    }
    ++num_run;
  }
  return num_run;
}

}  // namespace torch_offload
