#include "lanes/random_lane.h"

#include <algorithm>
#include <exception>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "lanes/expect.h"
#include "lanes/failing_end.h"
#include "lanes/foretelling.h"
#include "lanes/misuse.h"
#include "lanes/placed_plan.h"
#include "lanes/schedule_rig.h"

namespace torch_offload {

namespace {

constexpr std::size_t kSlice = kAlignmentBytes;
constexpr int kDeepestNesting = 3;

class RandomSchedule {
 public:
  explicit RandomSchedule(std::uint64_t seed)
      : random_(seed), foretelling_(draw(3) == 0 ? (1 + draw(20)) * kSlice : 0) {
    constexpr Mode kModes[] = {Mode::kSync,   Mode::kStreams,  Mode::kEvents,
                               Mode::kEvents, Mode::kPipeline, Mode::kPipeline};
    PipelineOptions options;
    options.mode = kModes[draw(6)];
    options.layout =
        options.mode != Mode::kSync && draw(2) == 0 ? StreamLayout::kSplit : StreamLayout::kShared;
    options.poison_on_release = draw(5) == 0;
    options.wait_for_each = draw(12) == 0;
    num_units_ = 1 + draw(8);
    rig_ = std::make_unique<ScheduleRig>(plan(units()), options, draw(8) == 0);
    rig_->announce(foretelling_.wanted_bytes(),
                   [this](UnitIndex unit) { foretelling_.note(unit); });
    foretelling_.begin(pipeline().plan());
    routine_ = sequence();
  }

  const OpLog& run() {
    for (std::size_t passes = 1 + draw(5); passes > 0; --passes) {
      between_passes();
      pass();
    }
    end();
    return rig_->log();
  }

 private:
  std::size_t draw(std::size_t bound) { return random_() % bound; }
  UnitIndex unit() { return static_cast<UnitIndex>(draw(num_units_)); }
  Pipeline& pipeline() { return rig_->pipeline(); }

  std::vector<Unit> units() {
    std::vector<Unit> units(num_units_);
    for (std::size_t i = 0; i < num_units_; ++i) {
      units[i].name = std::to_string(i);
      units[i].size_bytes = (1 + draw(6)) * kSlice;
      units[i].layer_index = static_cast<std::uint32_t>(i / 2);
      units[i].kind = draw(2) == 0 ? UnitKind::kMha : UnitKind::kFfn;
    }
    return units;
  }

  /// How units travel: mostly raw, or each in its own way.
  std::vector<Transport> transports() {
    if (draw(2) == 0) {
      return {};
    }
    constexpr Transport kWays[] = {Transport::kRaw, Transport::kPacked, Transport::kPackedResident,
                                   Transport::kPackedResident};
    std::vector<Transport> transports(num_units_);
    for (Transport& transport : transports) {
      transport = kWays[draw(4)];
    }
    return transports;
  }

  Plan plan(std::vector<Unit> units) {
    if (draw(2) == 0) {
      PlanRequest request;
      request.units = std::move(units);
      request.depth_bytes = draw(20) * kSlice;
      if (draw(3) == 0) {
        request.resident.resize(num_units_);
        for (std::size_t i = 0; i < num_units_; ++i) {
          request.resident[i] = draw(2) == 0;
        }
      }
      request.transports = transports();
      for (std::size_t i = 0; i < request.resident.size() && !request.transports.empty(); ++i) {
        request.transports[i] = request.resident[i] ? Transport::kRaw : request.transports[i];
      }
      request.decode_depth_bytes = draw(20) * kSlice;
      request.one_ring = draw(3) == 0;
      return make_plan(request);
    }
    // Places that no planner would choose: safety must not hang on the plan's kindness.
    std::vector<ByteRange> places;
    for (const Unit& unit : units) {
      const std::size_t begin = draw(12) * kSlice;
      places.push_back({begin, begin + unit.size_bytes});
    }
    Plan plan = lanes::plan_with_places(std::move(units), places, draw(20) * kSlice);
    plan.transports = transports();
    plan.decode_depth_bytes = draw(20) * kSlice;
    return plan;
  }

  std::vector<UnitIndex> sequence() {
    std::vector<UnitIndex> sequence(draw(12));
    for (UnitIndex& called : sequence) {
      called = unit();
    }
    return sequence;
  }

  void between_passes() {
    if (draw(4) == 0) {
      edit();
    }
    if (draw(8) == 0) {
      rig_->device().set_current_stream(rig_->callers()[draw(2)]);
    }
    if (draw(12) == 0) {
      replan();
    }
    if (draw(16) == 0) {
      Misuse(*rig_).between_passes(unit());
    }
  }

  /// New weights, which may need more room than there is once they are packed.
  void edit() {
    if (draw(6) == 0) {
      rig_->fail_at(static_cast<int>(1 + draw(4)));
    }
    const UnitIndex edited = unit();
    const bool fits = draw(4) != 0;
    try {
      rig_->edit(edited, fits);
      expect(fits || pipeline().plan().transport(edited) == Transport::kRaw,
             "a unit without room to be raw");
      expect(!pipeline().is_whole(edited), "an edited unit to be copied anew");
    } catch (const PlantedFailure&) {
      rig_->fail_at(0);  // nothing was written yet, or the unit is raw
    }
    rig_->fail_at(0);
  }

  /// Other places, in a window of another size. Now and then the device fails, or has no room.
  void replan() {
    const std::size_t trouble = draw(4);
    if (trouble == 0) {
      rig_->fail_at(static_cast<int>(1 + draw(6)));
    }
    rig_->set_out_of_memory(trouble == 1);
    try {
      pipeline().replan(plan(pipeline().plan().units));
      foretelling_.begin(pipeline().plan());
    } catch (const PlantedFailure&) {
      rig_->fail_at(0);  // it is as it was, or without a window
      foretelling_.lose_track();
    } catch (const MemoryError&) {
      foretelling_.lose_track();
      Misuse(*rig_).without_memory(unit());
    }
    rig_->fail_at(0);
    rig_->set_out_of_memory(false);
    if (!pipeline().has_window()) {
      pipeline().replan(plan(pipeline().plan().units));
      foretelling_.begin(pipeline().plan());
    }
    rig_->pack();
  }

  void end() {
    switch (draw(64)) {
      case 0:
        return end_with_a_failing_drain(*rig_, static_cast<int>(1 + draw(4)));
      case 1:
        if (draw(4) == 0) {
          lose_window();
        }
        return end_with_lost_streams(*rig_, streams_to_lose());
      default:
        return end_well(*rig_);
    }
  }

  /// A plan that needs another window, for which there is no room, nor for the former one.
  void lose_window() {
    Plan larger = pipeline().plan();
    larger.window_bytes += kSlice;
    rig_->set_out_of_memory(true);
    try {
      pipeline().replan(larger);
    } catch (const MemoryError&) {
      Misuse(*rig_).without_memory(unit());
    }
  }

  /// All of them, or one.
  std::vector<StreamId> streams_to_lose() {
    std::vector<StreamId> streams = pipeline().streams();
    streams.insert(streams.end(), rig_->callers().begin(), rig_->callers().end());
    return draw(2) == 0 ? streams : std::vector<StreamId>{streams[draw(streams.size())]};
  }

  void pass() {
    if (draw(6) == 0) {
      rig_->fail_at(static_cast<int>(1 + draw(60)));
    }
    pipeline().enter();
    foretelling_.begin_pass();
    bool completed = false;
    const StreamId found = rig_->device().current_stream();
    try {
      for (const UnitIndex called : draw(3) == 0 ? sequence() : routine_) {
        call(called, 0);
      }
      completed = true;
    } catch (const PlantedFailure&) {
      rig_->fail_at(0);
      rig_->device().set_current_stream(found);
    }
    rig_->fail_at(0);
    pipeline().leave(completed);
    foretelling_.end_pass(completed);
  }

  /// One unit, perhaps with others inside it, perhaps on another stream, perhaps failing.
  void call(UnitIndex called, int nesting) {
    if (pipeline().plan().is_resident(called)) {
      return;  // it has no wrapper
    }
    const StreamId found = rig_->device().current_stream();
    if (draw(8) == 0) {
      rig_->device().set_current_stream(rig_->callers()[draw(2)]);
    }
    foretelling_.begin_call(pipeline(), called);
    if (draw(5) != 0) {
      rig_->call(called);
    } else {
      rig_->call(called, [&](const std::byte* place) { inside(called, place, nesting); });
    }
    // Between units a caller may stay on another stream; inside one, it comes back.
    if (nesting > 0 || draw(2) == 0) {
      rig_->device().set_current_stream(found);
    }
  }

  void inside(UnitIndex called, const std::byte* place, int nesting) {
    switch (draw(7)) {
      case 0:
        throw PlantedFailure();
      case 1:
        go_on_elsewhere();
        break;
      case 2:
        Misuse(*rig_).in_a_use(called, place, unit());
        break;
      default:
        if (nesting < kDeepestNesting) {
          nest(draw(2) == 0 ? called : unit(), nesting + 1);
        }
    }
  }

  /// One unit inside another one, below a wrapped ancestor of its own.
  void nest(UnitIndex called, int nesting) {
    pipeline().enter();
    bool completed = false;
    try {
      call(called, nesting);
      completed = true;
    } catch (...) {
      pipeline().leave(completed);
      throw;
    }
    pipeline().leave(completed);
  }

  /// A module that changes streams orders them itself.
  void go_on_elsewhere() {
    Device& device = rig_->device();
    const EventId here = device.create_event();
    const StreamId other = rig_->callers()[draw(2)];
    device.record(here, device.current_stream());
    device.wait(other, here);
    device.set_current_stream(other);
  }

  std::mt19937_64 random_;
  Foretelling foretelling_;
  std::size_t num_units_ = 0;
  std::unique_ptr<ScheduleRig> rig_;
  std::vector<UnitIndex> routine_;
};

}  // namespace

OpLog random_schedule(std::uint64_t seed) { return RandomSchedule(seed).run(); }

RandomLane::RandomLane(unsigned num_threads, bool is_control)
    : judges_(std::max(1U, num_threads), LaneJudge(is_control)) {}

void RandomLane::advance(std::uint64_t num_schedules) {
  const std::uint64_t end = next_seed_ + num_schedules;
  work_in_parallel(judges_, [&](LaneJudge& judge, std::size_t thread) {
    for (std::uint64_t seed = next_seed_ + thread; seed < end; seed += judges_.size()) {
      const auto what = [&] { return "seed " + std::to_string(seed); };
      try {
        RandomSchedule schedule(seed);
        const OpLog& log = schedule.run();
        judge.judge(log, what);
        judge.note_distinct(log);
      } catch (const std::exception& error) {
        judge.add_bad(what() + ": " + error.what());
      }
    }
  });
  next_seed_ = end;
}

}  // namespace torch_offload
