#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "lanes/moved_steps.h"
#include "lanes/mutant_run.h"
#include "lanes/placed_plan.h"

namespace torch_offload::lanes {

/// Calls that a model makes of the pipeline, for every step of the latter to have its hour.
struct Schedule {
  std::string name;
  PipelineOptions options;
  Plan plan;
  FileLimits files;
  std::function<void(MutantRun&)> go;
  bool runs_in_turn = true;
  bool may_fail = false;  ///< Whether calls of the device are made to fail in its midst, in turn.
};

inline Outcome run(const Schedule& schedule, const Choice& choice) {
  Outcome outcome;
  try {
    MutantRun run(schedule.plan, schedule.options, schedule.files, choice, outcome);
    run.runs_in_turn = schedule.runs_in_turn;
    schedule.go(run);
  } catch (const InternalError&) {
    outcome.was_refused = true;
  }
  outcome.log = with_moved(outcome.log, mutation.moved_ops);
  return outcome;
}

/// Two units of each kind; the second of a kind lies where the first does.
inline Plan two_places() {
  return plan_with_places(layers_of(2, 2, 2), {{0, 512}, {512, 1024}, {0, 512}, {512, 1024}}, 512);
}

/// Every unit has bytes of its own.
inline Plan own_places() {
  return plan_with_places(layers_of(2, 2, 2), {{0, 512}, {512, 1024}, {1024, 1536}, {1536, 2048}},
                          512);
}

/// Units of one kind share bytes with units of the other.
inline Plan crossing_places() {
  return plan_with_places(layers_of(2, 2, 2), {{0, 512}, {256, 768}, {512, 1024}, {768, 1280}},
                          512);
}

/// Unit 2 shares bytes with 0 and with 1, which share none.
inline Plan places_in_between() {
  return plan_with_places(layers_of(2, 2, 2), {{0, 512}, {512, 1024}, {256, 768}, {1024, 1536}},
                          512);
}

/// The last unit is on the device for good.
inline Plan one_resident() {
  Plan plan = two_places();
  plan.places[3].reset();
  plan.overlaps[1].clear();
  plan.overlaps[3].clear();
  return plan;
}

/// The first part of each: every event is recorded once, as in a model that has run before.
inline void first_part(MutantRun& run) {
  run.pass({0, 1, 2, 3});
  run.begin_second_part();
}

inline void go_through_passes(MutantRun& run) {
  first_part(run);
  run.pass({0, 1, 2, 3});
  run.pass({0, 1, 2, 3});
}

/// What was copied ahead comes late or never.
inline void go_another_way(MutantRun& run) {
  first_part(run);
  run.pass({1, 3, 2, 0});
  run.pass({3, 0, 1, 2});
  run.pass({1, 0});
}

inline void edit_masters(MutantRun& run) {
  first_part(run);
  for (UnitIndex unit = 0; unit < 4; ++unit) {
    run.pipeline->synchronize_onload(unit);
    run.masters.edit(unit);
    run.loader.upload(unit);
    run.pipeline->invalidate(unit);
    run.pass({0, 1, 2, 3});
  }
}

/// A unit is used on one stream, then on another without a copy in between.
inline void change_streams_between_uses(MutantRun& run) {
  run.pass({0, 1, 2, 3});
  run.pipeline->enter();
  const std::byte* place = run.acquire(0);
  run.begin_second_part();  // the copy has run: only kernels can stand still now
  run.read(0, place);
  run.release(0);
  run.device.set_current_stream(run.callers[1]);
  run.use(0);
  run.acquire(2);
  run.release(2);
  run.pipeline->leave(true);
}

/// A module leaves another stream current than it found.
inline void change_streams_in_a_use(MutantRun& run) {
  first_part(run);
  run.pipeline->enter();
  const std::byte* place = run.acquire(0);
  const EventId switched = run.device.create_event();
  run.device.record(switched, run.device.current_stream());
  run.device.set_current_stream(run.callers[1]);
  run.device.wait(run.callers[1], switched);  // as the module itself has to
  run.read(0, place);
  run.release(0);
  run.device.set_current_stream(run.callers[0]);
  run.acquire(2);
  run.release(2);
  run.pipeline->leave(true);
}

/// A unit calls itself on another stream.
inline void nest_on_another_stream(MutantRun& run) {
  first_part(run);
  run.pipeline->enter();
  run.acquire(0);
  run.device.set_current_stream(run.callers[1]);
  run.read(0, run.acquire(0));
  run.device.set_current_stream(run.callers[0]);
  run.release(0);
  run.release(0);
  run.acquire(2);
  run.release(2);
  run.pipeline->leave(true);
}

/// A unit calls another one that shares bytes with it.
inline void nest_overlapping(MutantRun& run) {
  first_part(run);
  run.pipeline->enter();
  const std::byte* outer = run.acquire(0);
  run.read(0, outer);
  run.use(2);
  run.read(0, outer);
  run.release(0);
  run.use(1);
  run.use(2);
  run.pipeline->leave(true);
}

/// Who gets the old place of a unit that was given one of its own.
inline void take_an_old_place(MutantRun& run) {
  constexpr UnitIndex kOuter = 0;   // MHA, as is kInner
  constexpr UnitIndex kBehind = 1;  // FFN: its copy goes to the other stream
  constexpr UnitIndex kInner = 2;
  run.pass({kInner, kOuter, 3, kBehind});  // so that kBehind is not copied ahead
  run.begin_second_part();
  run.pipeline->enter();
  run.use(kInner);
  const std::byte* outer = run.acquire(kOuter);
  run.read(kOuter, outer);
  run.use(kInner);
  run.release(kOuter);
  run.use(kBehind);
  run.pipeline->leave(true);
}

/// The units lie elsewhere from now on.
inline void replan(MutantRun& run) {
  first_part(run);
  run.pass({0, 1, 2, 3});
  run.pipeline->replan(crossing_places());
  run.pass({1, 0, 3, 2});
}

/// One call as the wrapper makes it: whatever was acquired is released.
inline void call(MutantRun& run, UnitIndex unit,
                 const std::function<void(const std::byte*)>& inside) {
  const std::byte* place = run.acquire(unit);
  const StreamId found = run.device.current_stream();
  try {
    run.read(unit, place);
    inside(place);
  } catch (...) {
    run.device.set_current_stream(found);
    run.release(unit);
    throw;
  }
  run.release(unit);
}

/// Some call of the device fails in the midst of this; what comes afterwards must go right.
inline void fail_somewhere(MutantRun& run, const std::function<void()>& calls) {
  run.pass({0, 1, 2, 3});
  run.begin_failing();
  run.pipeline->enter();
  bool completed = true;
  try {
    calls();
  } catch (const PlantedFailure&) {
    completed = false;
  }
  run.end_failing();
  run.pipeline->leave(completed);
  run.compute();
  // The caller had chosen its stream and goes on there, as the guard does that chose it.
  run.device.set_current_stream(run.callers[0]);
  run.compute();
  run.pass({3, 0, 3});
  run.pass({2, 3, 0, 1});
}

inline void fail_in_plain_calls(MutantRun& run) {
  fail_somewhere(run, [&] {
    for (const UnitIndex unit : {2U, 3U, 0U, 1U, 3U}) {
      call(run, unit, [](const std::byte*) {});
      run.compute();
    }
  });
}

inline void fail_in_a_use_of_two_streams(MutantRun& run) {
  fail_somewhere(run, [&] {
    call(run, 0, [&](const std::byte* place) {
      const EventId switched = run.device.create_event();
      run.device.record(switched, run.device.current_stream());
      run.device.wait(run.callers[1], switched);
      run.device.set_current_stream(run.callers[1]);
      run.read(0, place);
    });
    run.device.set_current_stream(run.callers[0]);
    call(run, 2, [](const std::byte*) {});
  });
}

/// Packing fails in its midst, or not. If so, all units are raw then. They lie elsewhere from then
/// on: in a window that is as large as what was to stay packed, each where another one was to stay.
inline void fail_in_packing(MutantRun& run) {
  run.pass({0, 1, 2, 3});
  run.loader.pack(std::vector<Transport>(4, Transport::kPackedResident));
  run.begin_failing();
  try {
    run.loader.upload_all();
  } catch (const PlantedFailure&) {
    run.loader.drop_packed();
  }
  run.end_failing();
  run.device.set_current_stream(run.callers[1]);  // so that what the other one does may wait
  run.pipeline->replan(plan_with_places(layers_of(2, 2, 2),
                                        {{1536, 2048}, {1024, 1536}, {512, 1024}, {0, 512}}, 512));
  run.device.set_current_stream(run.callers[0]);
  run.pass({0, 1, 2, 3});
  run.pass({0, 1, 2, 3});
}

/// What is on the device for good comes out of the same files as what streams.
inline void bring_residents(MutantRun& run) {
  run.pass({0});
  run.begin_second_part();
  const std::byte* const resident = run.loader.bring_resident(3, run.pipeline->streams().front());
  run.loader.unlock_residents();
  run.read_resident(3, resident);
  run.pass({1, 2, 0});
  run.read_resident(3, resident);
  run.device.synchronize(run.device.current_stream());
  run.loader.drop_residents();
}

/// Everything above in the modes in which it says something.
inline std::vector<Schedule> all_schedules() {
  std::vector<Schedule> schedules;
  const auto add = [&](const std::string& name, Mode mode, StreamLayout layout, const Plan& plan,
                       void (*go)(MutantRun&), bool runs_in_turn = true, bool may_fail = false,
                       bool poisons = false) {
    schedules.push_back({name + ", " + name_of(mode) + ", " + name_of(layout),
                         {mode, layout, poisons},
                         plan,
                         {},
                         go,
                         runs_in_turn,
                         may_fail});
  };
  const auto add_packed = [&](const std::string& name, Mode mode, const Plan& plan,
                              void (*go)(MutantRun&), bool may_fail = false) {
    constexpr Transport kRaw = Transport::kRaw;
    constexpr Transport kPacked = Transport::kPacked;
    constexpr Transport kStays = Transport::kPackedResident;
    const std::vector<std::pair<std::string, std::vector<Transport>>> ways{
        {", packed", {kPacked, kPacked, kPacked, kPacked}},
        {", half packed", {kPacked, kRaw, kPacked, kRaw}},
        {", staying packed", {kStays, kStays, kStays, kStays}},
        {", some staying packed", {kStays, kPacked, kRaw, kStays}},
    };
    for (const auto& [way, transports] : ways) {
      add(name + way, mode, StreamLayout::kShared, plan, go, true, may_fail);
      Plan& packed = schedules.back().plan;
      packed.transports = transports;
      packed.decode_depth_bytes = packed.depth_bytes;
    }
  };
  const auto add_in_files = [&](const std::string& name, const FileLimits& files, const Plan& plan,
                                void (*go)(MutantRun&), bool may_fail = false) {
    add(name, Mode::kPipeline, StreamLayout::kShared, plan, go, true, may_fail);
    schedules.back().files = files;
  };
  constexpr StreamLayout kShared = StreamLayout::kShared;
  constexpr StreamLayout kSplit = StreamLayout::kSplit;
  for (const auto& [mode, layout] : {std::pair{Mode::kPipeline, kShared},
                                     {Mode::kPipeline, kSplit},
                                     {Mode::kEvents, kSplit},
                                     {Mode::kStreams, kShared},
                                     {Mode::kStreams, kSplit},
                                     {Mode::kSync, kShared}}) {
    add("passes", mode, layout, two_places(), go_through_passes);
    add("other ways", mode, layout, crossing_places(), go_another_way);
    add("nested overlapping units", mode, layout, two_places(), nest_overlapping);
    add("failures", mode, layout, crossing_places(), fail_in_plain_calls, true, true);
    add("poison", mode, layout, own_places(), go_through_passes, true, false, true);
  }
  for (const Mode mode : {Mode::kPipeline, Mode::kEvents, Mode::kStreams}) {
    add_packed("passes", mode, two_places(), go_through_passes);
    add_packed("other ways", mode, crossing_places(), go_another_way);
    add_packed("nested overlapping units", mode, two_places(), nest_overlapping);
    add_packed("failures", mode, crossing_places(), fail_in_plain_calls, true);
  }
  add_packed("edits", Mode::kPipeline, own_places(), edit_masters);
  add("passes without copies", Mode::kPipeline, kShared, own_places(), go_through_passes);
  add("edits", Mode::kPipeline, kShared, own_places(), edit_masters);
  for (const Mode mode : {Mode::kEvents, Mode::kPipeline}) {
    add("streams between uses", mode, kShared, two_places(), change_streams_between_uses, false);
    add("streams in a use", mode, kShared, two_places(), change_streams_in_a_use, false);
  }
  add("nested on another stream", Mode::kEvents, kShared, two_places(), nest_on_another_stream,
      false);
  add("replanned", Mode::kPipeline, kShared, own_places(), replan);
  add("old place", Mode::kPipeline, kSplit, places_in_between(), take_an_old_place);
  add("failures in a use of two streams", Mode::kEvents, kShared, two_places(),
      fail_in_a_use_of_two_streams, false, true);
  add("failures in packing", Mode::kPipeline, kShared, two_places(), fail_in_packing, true, true);
  const FileLimits takes_turns{true, 2, SIZE_MAX};
  add_in_files("passes, files in turn", takes_turns, two_places(), go_through_passes);
  add_in_files("other ways, files in turn", takes_turns, crossing_places(), go_another_way);
  add_in_files("failures, files in turn", takes_turns, crossing_places(), fail_in_plain_calls,
               true);
  add_in_files("passes, files beyond a limit", {true, SIZE_MAX, 2}, two_places(),
               go_through_passes);
  add_in_files("residents, files", {true, SIZE_MAX, SIZE_MAX}, one_resident(), bring_residents);
  return schedules;
}

}  // namespace torch_offload::lanes
