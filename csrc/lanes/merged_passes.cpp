#include "lanes/merged_passes.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "core/error.h"
#include "lanes/pipeline_state.h"

// Note [Merged states]
// Schedules that have come to the same state have the same future, so one of them goes on for all.
// Nothing is a model here: a step is a run of the real pipeline from its beginning, the whole log
// of which goes through the checker. Only what follows from equal states is not run again. A state
// is all that later calls and their verdict depend on, word for word:
//   the order      each of its fields, but for what it learns from the last pass (OrderState). The
//                  pipeline knows it by its answers alone: advance(), and no more of walk() than
//                  the plan has units. So the order goes its own way (OrderStates), and a step of
//                  the pipeline is run once for each state, unit and answers.
//   the pipeline   each of its fields but those that never change, and statistics (PipelineState).
//   the checker    which clock covers which access that a later op may still be compared with
//                  (HazardChecker::append_state). It only ever joins and compares clocks.
//   the device     is at rest: it has carried out all that it was given before a state is taken,
//                  which shows that it can. The pipeline never asks it for a time, nor whether
//                  something is done.
// Generations count from those of the state, as they are only ever compared for equality. Events
// that will be recorded before anybody waits for them again are no part of a state; that they are
// is not taken on trust, each step checks it.
//
// Arrivals at a state keep how many schedules they are, how many ops that is and the sum of their
// digests. So the report is that of running each schedule, number by number: the tests compare.

namespace torch_offload {

namespace {

/// Whoever waits for an event has it from the state that he began in, or has recorded it since.
/// Throws: InternalError otherwise: then that state has left out what mattered.
void expect_in_scope(const OpLog& log, std::size_t begin, const std::vector<EventId>& before,
                     const std::vector<EventId>& after) {
  std::vector<EventId> known = before;
  const auto is_known = [&](EventId event) {
    return std::find(known.begin(), known.end(), event) != known.end();
  };
  for (std::size_t i = begin; i < log.ops().size(); ++i) {
    const Op& op = log.ops()[i];
    check_internal(op.kind != OpKind::kQuery && (op.kind != OpKind::kWait || is_known(op.event)),
                   "a wait or a query that its state did not foresee");
    if (op.kind == OpKind::kRecord) {
      known.push_back(op.event);
    }
  }
  check_internal(std::all_of(after.begin(), after.end(), is_known),
                 "an event that may be waited for again, and was not recorded");
}

}  // namespace

// --- ways and states ---------------------------------------------------------------------------

std::size_t MergedPasses::WordsHash::operator()(const StateWords& words) const {
  std::uint64_t hash = words.size();
  for (const std::uint64_t word : words) {
    hash = (hash ^ word) * 0x9E3779B97F4A7C15U;
    hash ^= hash >> 32U;
  }
  return hash;
}

void MergedPasses::Layer::add(const Arrivals& more) {
  const std::uint64_t key = std::uint64_t{more.order} << 32U | more.state;
  const auto [at, is_new] = indices.try_emplace(key, arrivals.size());
  if (is_new) {
    arrivals.push_back(more);
    return;
  }
  Arrivals& met = arrivals[at->second];
  met.num_schedules += more.num_schedules;
  met.num_ops += more.num_ops;
  met.digest += more.digest;
}

SmallSchedule MergedPasses::schedule_of(const Way& way) const {
  return {schedules_.sequences()[way.first], way.first_completed,
          schedules_.sequence_at(way.second, way.num_calls), way.second_completed};
}

MergedPasses::Way MergedPasses::further(Way way, UnitIndex unit) const {
  std::uint32_t digit = 1;
  for (unsigned i = 0; i < way.num_calls; ++i) {
    digit *= schedules_.num_units();
  }
  way.second += unit * digit;
  ++way.num_calls;
  return way;
}

MergedPasses::State MergedPasses::state_of(SmallRun& run, const StateScope& scope) {
  ScheduleRig& rig = run.rig();
  rig.settle();
  StateWords words;
  PipelineState::append(rig.pipeline(), rig.generations(), words);
  judge_.append_state(rig.log(), scope, words);
  return states_.try_emplace(std::move(words), static_cast<State>(states_.size())).first->second;
}

// --- real runs ---------------------------------------------------------------------------------

template <typename Run>
MergedPasses::Step MergedPasses::attempt(const Run& run) {
  Step step;
  judge_.note_run();
  try {
    run(step);
  } catch (const std::exception& error) {
    step.fault = error.what();
  }
  return step;
}

MergedPasses::Step MergedPasses::run_call(const Way& way, UnitIndex unit) {
  return attempt([&](Step& step) {
    SmallRun run(plan_, options_, schedule_of(way));
    const std::vector<EventId> before = PipelineState::awaitable_events(run.rig().pipeline());
    const std::size_t begin = run.log().ops().size();
    run.take_digest();
    run.call(unit);
    step.digest = run.take_digest();
    step.num_ops = run.log().ops().size() - begin;
    if (const Finding* finding = judge_.first_finding(run.log())) {
      step.fault = finding->message;
      return;
    }
    const StateScope scope = run.scope();
    expect_in_scope(run.log(), begin, before, scope.events);
    step.next = state_of(run, scope);
  });
}

MergedPasses::Step MergedPasses::run_end(const Way& way) {
  return attempt([&](Step& step) {
    SmallRun run(plan_, options_, schedule_of(way));
    const std::vector<EventId> before = PipelineState::awaitable_events(run.rig().pipeline());
    const std::size_t begin = run.log().ops().size();
    run.take_digest();
    run.finish(way.second_completed);
    step.digest = run.take_digest();
    step.num_ops = run.log().ops().size() - begin;
    expect_in_scope(run.log(), begin, before, {});
    if (const Finding* finding = judge_.first_finding(run.log())) {
      step.fault = finding->message;
    }
  });
}

// --- schedules ---------------------------------------------------------------------------------

void MergedPasses::run() {
  Layer layer;
  for (std::uint32_t first = 0; first < schedules_.sequences().size(); ++first) {
    begin(first, true, layer);
    begin(first, false, layer);
  }
  // A second pass may end behind each of its calls, and before the first one.
  for (unsigned num_calls = 0; num_calls <= schedules_.num_calls(); ++num_calls) {
    Layer next;
    for (const Arrivals& from : layer.arrivals) {
      end(from, true);
      end(from, false);
      for (UnitIndex unit = 0; num_calls < schedules_.num_calls() && unit < schedules_.num_units();
           ++unit) {
        go_on(from, unit, next);
      }
    }
    judge_.note_states(layer.arrivals.size());
    layer = std::move(next);
  }
}

/// Behind the first pass.
void MergedPasses::begin(std::uint32_t first, bool completed, Layer& layer) {
  Arrivals arrivals;
  arrivals.way.first = first;
  arrivals.way.first_completed = completed;
  arrivals.num_schedules = 1;
  const Step step = attempt([&](Step& begun) {
    SmallRun run(plan_, options_, schedule_of(arrivals.way));
    begun.digest = run.take_digest();
    begun.num_ops = run.log().ops().size();
    if (const Finding* finding = judge_.first_finding(run.log())) {
      begun.fault = finding->message;
    } else {
      begun.next = state_of(run, run.scope());
    }
  });
  if (!step.fault.empty()) {
    give_up(arrivals, step.fault);
    return;
  }
  arrivals.order = orders_.start(first, completed);
  arrivals.state = step.next;
  arrivals.num_ops = step.num_ops;
  arrivals.digest = step.digest;
  layer.add(arrivals);
}

void MergedPasses::go_on(const Arrivals& from, UnitIndex unit, Layer& next) {
  const OrderStates::Step& order = orders_.step(from.order, unit);
  const std::uint64_t key =
      (std::uint64_t{from.state} << 32U | order.answers) * schedules_.num_units() + unit;
  const auto [call, is_new] = calls_.try_emplace(key);
  if (is_new) {
    call->second = run_call(from.way, unit);
  }
  const Step& step = call->second;
  Arrivals to = from;
  to.way = further(from.way, unit);
  if (!step.fault.empty()) {
    give_up(to, step.fault);
    return;
  }
  to.order = order.next;
  to.state = step.next;
  to.num_ops += step.num_ops * from.num_schedules;
  to.digest += step.digest * from.num_schedules;
  next.add(to);
}

void MergedPasses::end(Arrivals arrivals, bool completed) {
  arrivals.way.second_completed = completed;
  const auto [at, is_new] =
      ends_.try_emplace(2 * std::uint64_t{arrivals.state} + (completed ? 1U : 0U));
  if (is_new) {
    at->second = run_end(arrivals.way);
  }
  const Step& step = at->second;
  const std::uint64_t num_schedules = arrivals.num_schedules;
  if (!step.fault.empty()) {
    note_bad(arrivals, num_schedules, step.fault);
    return;
  }
  judge_.note(num_schedules, arrivals.num_ops + step.num_ops * num_schedules,
              arrivals.digest + step.digest * num_schedules);
}

/// All that would have ended there, completed or not, or gone on from there, are bad.
void MergedPasses::give_up(const Arrivals& arrivals, const std::string& why) {
  std::uint64_t num_ends = 0;
  std::uint64_t num_sequences = 1;
  for (unsigned i = arrivals.way.num_calls; i <= schedules_.num_calls(); ++i) {
    num_ends += 2 * num_sequences;
    num_sequences *= schedules_.num_units();
  }
  note_bad(arrivals, arrivals.num_schedules * num_ends, why);
}

void MergedPasses::note_bad(const Arrivals& arrivals, std::uint64_t num_schedules,
                            const std::string& why) {
  judge_.note(num_schedules, 0, 0);
  judge_.add_bad(text_of(schedule_of(arrivals.way), plan_) + ": " + why, num_schedules);
}

}  // namespace torch_offload
