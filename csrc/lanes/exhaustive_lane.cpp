#include "lanes/exhaustive_lane.h"

#include <algorithm>
#include <cstddef>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "lanes/schedule_rig.h"

namespace torch_offload {

namespace {

constexpr std::size_t kSlice = kAlignmentBytes;
constexpr std::uint64_t kBatch = 10000;  // schedules between two words of progress

using Sequence = std::vector<UnitIndex>;

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

Plan plan_of(const std::vector<unsigned>& placement) {
  Plan plan;
  plan.overlaps.resize(placement.size());
  for (UnitIndex unit = 0; unit < placement.size(); ++unit) {
    plan.units.push_back(
        {std::to_string(unit), kSlice, unit / 2, unit % 2 == 0 ? UnitKind::kMha : UnitKind::kFfn});
    const std::size_t begin = placement[unit] * kSlice;
    plan.places.emplace_back(ByteRange{begin, begin + kSlice});
    plan.window_bytes = std::max(plan.window_bytes, begin + kSlice);
    for (UnitIndex other = 0; other < placement.size(); ++other) {
      if (other != unit && placement[other] == placement[unit]) {
        plan.overlaps[unit].push_back(other);
      }
    }
  }
  plan.depth_bytes = plan.window_bytes;
  return plan;
}

/// All sequences of `length` calls, numbered.
class Sequences {
 public:
  Sequences(unsigned num_units, unsigned length) : num_units_(num_units), length_(length) {}

  std::uint64_t count() const {
    std::uint64_t count = 1;
    for (unsigned i = 0; i < length_; ++i) {
      count *= num_units_;
    }
    return count;
  }

  Sequence at(std::uint64_t number) const {
    Sequence sequence(length_);
    for (UnitIndex& unit : sequence) {
      unit = static_cast<UnitIndex>(number % num_units_);
      number /= num_units_;
    }
    return sequence;
  }

 private:
  unsigned num_units_;
  unsigned length_;
};

/// A first pass and whether it is completed.
struct FirstPass {
  Sequence sequence;
  bool completed = true;
};

std::vector<FirstPass> first_passes(unsigned num_units, unsigned max_calls) {
  std::vector<FirstPass> passes;
  for (unsigned length = 0; length <= max_calls; ++length) {
    const Sequences sequences(num_units, length);
    for (std::uint64_t i = 0; i < sequences.count(); ++i) {
      passes.push_back({sequences.at(i), true});
      // An exception in a unit and one behind it are the same calls: release, leave(false).
      passes.push_back({sequences.at(i), false});
    }
  }
  return passes;
}

void pass(ScheduleRig& rig, const Sequence& sequence, bool completed) {
  rig.pipeline().enter();
  for (const UnitIndex unit : sequence) {
    rig.call(unit);
  }
  rig.pipeline().leave(completed);
}

std::string text_of(const Sequence& sequence) {
  std::string text;
  for (const UnitIndex unit : sequence) {
    text += text.empty() ? "" : " ";
    text += std::to_string(unit);
  }
  return "[" + text + "]";
}

/// What threads share.
struct Shared {
  const ExhaustiveLane& lane;
  std::mutex mutex;
  std::uint64_t num_done = 0;  // guarded by mutex
};

/// All schedules of one plan that begin with one first pass; the first of them has this number.
void run_first_pass(const Shared& shared, const Plan& plan, const FirstPass& first,
                    const Sequences& second, std::uint64_t number, LaneJudge& judge) {
  const ExhaustiveLane& lane = shared.lane;
  PipelineOptions options;
  options.mode = lane.mode;
  options.layout = lane.layout;
  const std::uint64_t skipped = (lane.stride - number % lane.stride) % lane.stride;
  for (std::uint64_t i = skipped; i < second.count(); i += lane.stride) {
    const Sequence sequence = second.at(i);
    const auto what = [&] {
      std::string places;
      for (const auto& place : plan.places) {
        places += std::to_string(place->begin / kSlice);
      }
      return "places " + places + ", passes " + text_of(first.sequence) +
             (first.completed ? "" : " cut short") + " and " + text_of(sequence);
    };
    try {
      ScheduleRig rig(plan, options);
      pass(rig, first.sequence, first.completed);
      pass(rig, sequence, true);
      judge.judge(rig.finish(), what);
    } catch (const std::exception& error) {
      judge.add_bad(what() + ": " + error.what());
    }
  }
}

void run_share(Shared& shared, unsigned thread, unsigned num_threads, LaneJudge& judge) {
  const ExhaustiveLane& lane = shared.lane;
  std::uint64_t num_told = 0;
  std::uint64_t number = 0;
  for (unsigned num_units = 1; num_units <= lane.max_units; ++num_units) {
    std::vector<std::vector<unsigned>> placements;
    std::vector<unsigned> placement;
    collect_placements(num_units, lane.max_places, placement, placements);
    const std::vector<FirstPass> firsts = first_passes(num_units, lane.max_calls);
    const Sequences second(num_units, lane.max_calls);
    std::size_t share = 0;
    for (const std::vector<unsigned>& one : placements) {
      const Plan plan = plan_of(one);
      for (const FirstPass& first : firsts) {
        const std::uint64_t first_number = std::exchange(number, number + second.count());
        if (share++ % num_threads != thread) {
          continue;
        }
        run_first_pass(shared, plan, first, second, first_number, judge);
        const std::uint64_t num_new = judge.report().num_schedules - num_told;
        if (num_new >= kBatch) {
          num_told += num_new;
          const std::lock_guard<std::mutex> lock(shared.mutex);
          shared.num_done += num_new;
          if (lane.progress) {
            lane.progress(shared.num_done);
          }
        }
      }
    }
  }
}

}  // namespace

std::uint64_t count_schedules(const ExhaustiveLane& lane) {
  std::uint64_t count = 0;
  for (unsigned num_units = 1; num_units <= lane.max_units; ++num_units) {
    std::vector<std::vector<unsigned>> placements;
    std::vector<unsigned> placement;
    collect_placements(num_units, lane.max_places, placement, placements);
    count += placements.size() * first_passes(num_units, lane.max_calls).size() *
             Sequences(num_units, lane.max_calls).count();
  }
  return (count + lane.stride - 1) / lane.stride;
}

LaneReport run(const ExhaustiveLane& lane) {
  const unsigned num_threads = std::max(1U, lane.num_threads);
  std::vector<LaneJudge> judges(num_threads, LaneJudge(lane.is_control));
  std::vector<std::thread> threads;
  threads.reserve(num_threads);
  Shared shared{lane, {}, 0};
  for (unsigned i = 0; i < num_threads; ++i) {
    threads.emplace_back([&, i] { run_share(shared, i, num_threads, judges[i]); });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  return sum_of(judges);
}

}  // namespace torch_offload
