#include "lanes/exhaustive_lane.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <utility>

#include "core/error.h"
#include "lanes/merged_passes.h"
#include "lanes/small_run.h"

namespace torch_offload {

ExhaustiveLane::ExhaustiveLane(const ExhaustiveOptions& options)
    : options_(options), judges_(std::max(1U, options.num_threads), LaneJudge(options.is_control)) {
  if (options.merges && std::any_of(options.transports.begin(), options.transports.end(),
                                    [](Transport way) { return way != Transport::kRaw; })) {
    throw ValueError(
        "expected raw units where schedules that meet in a state go on as one, got packed ones, "
        "whose loader has a state of its own; run them with merges=false");
  }
  for (unsigned num_units = 1; num_units <= options.max_units; ++num_units) {
    Level level{
        SmallSchedules(num_units, options.max_places, options.max_calls, options.transports),
        num_blocks_, 0, nullptr};
    const SmallSchedules& schedules = level.schedules;
    level.blocks_per_plan = options.merges ? 1 : schedules.num_passes();
    num_blocks_ += schedules.plans().size() * level.blocks_per_plan;
    num_schedules_ += schedules.plans().size() * schedules.num_schedules();
    levels_.push_back(std::move(level));
  }
}

bool ExhaustiveLane::advance(std::uint64_t num_schedules) {
  if (options_.merges && levels_.front().orders == nullptr) {
    for (Level& level : levels_) {
      level.orders = std::make_unique<const OrderStates>(level.schedules);
    }
  }
  const std::uint64_t enough = report().num_schedules + num_schedules;
  std::atomic<std::uint64_t> next_block{next_block_};
  std::atomic<std::uint64_t> num_done{report().num_schedules};
  work_in_parallel(judges_, [&](LaneJudge& judge, std::size_t) {
    while (num_done < enough) {
      const std::uint64_t block = next_block++;
      if (block >= num_blocks_) {
        break;
      }
      const std::uint64_t before = judge.report().num_schedules;
      run_block(block, judge);
      num_done += judge.report().num_schedules - before;
    }
  });
  next_block_ = std::min(next_block.load(), num_blocks_);
  return next_block_ < num_blocks_;
}

PipelineOptions ExhaustiveLane::pipeline_options() const {
  PipelineOptions options;
  options.mode = options_.mode;
  options.layout = options_.layout;
  return options;
}

void ExhaustiveLane::run_block(std::uint64_t block, LaneJudge& judge) const {
  const auto above = std::find_if(levels_.begin(), levels_.end(), [block](const Level& level) {
    return level.first_block > block;
  });
  const Level& level = *(above - 1);
  const SmallSchedules& schedules = level.schedules;
  const std::uint64_t index = block - level.first_block;
  const Plan& plan = schedules.plans()[index / level.blocks_per_plan];
  if (options_.merges) {
    MergedPasses(schedules, *level.orders, plan, pipeline_options(), judge).run();
    return;
  }
  const std::uint64_t first = index % level.blocks_per_plan;
  run_each(schedules, plan, {schedules.sequences()[first / 2], first % 2 == 0, {}, true}, judge);
}

/// Every second pass behind the schedule's first one.
void ExhaustiveLane::run_each(const SmallSchedules& schedules, const Plan& plan,
                              SmallSchedule schedule, LaneJudge& judge) const {
  const PipelineOptions options = pipeline_options();
  for (std::uint64_t i = 0; i < schedules.num_passes(); ++i) {
    schedule.second.clear();
    schedule.second_completed = i % 2 == 0;
    try {
      SmallRun run(plan, options, schedule);
      schedule.second = schedules.sequences()[i / 2];
      std::uint64_t digest = run.take_digest();
      for (const UnitIndex unit : schedule.second) {
        run.call(unit);
        digest += run.take_digest();
      }
      run.finish(schedule.second_completed);
      judge.judge(run.log(), [&] { return text_of(schedule, plan); });
      judge.note(0, 0, digest + run.take_digest());
    } catch (const std::exception& error) {
      judge.note(1, 0, 0);
      judge.add_bad(text_of(schedule, plan) + ": " + error.what());
    }
  }
}

}  // namespace torch_offload
