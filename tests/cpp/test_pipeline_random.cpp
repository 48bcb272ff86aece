// Random plans, random calls, random gates: whatever is asked for, in whatever order, with
// whichever stream standing still, each reader finds the bytes of its unit.

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/pipeline.h"
#include "pipeline_fixture.h"

namespace torch_offload {
namespace {

using testing::Gate;
using testing::plan_of;
using testing::plan_with_places;
using testing::Rig;

constexpr std::size_t kSlice = kAlignmentBytes;

/// One schedule, drawn from its seed alone.
class Schedule {
 public:
  explicit Schedule(unsigned seed) : random_(seed) {
    const Mode modes[] = {Mode::kSync,   Mode::kStreams,  Mode::kEvents,
                          Mode::kEvents, Mode::kPipeline, Mode::kPipeline};
    PipelineOptions options;
    options.mode = modes[draw(6)];
    options.layout =
        options.mode != Mode::kSync && draw(2) == 0 ? StreamLayout::kSplit : StreamLayout::kShared;
    options.poison_on_release = draw(4) == 0;
    may_hold_ = !policy_of(options.mode).host_synchronizes;
    rig_ = std::make_unique<Rig>(random_plan(), options);
    streams_ = rig_->pipeline->streams();
    streams_.insert(streams_.end(), rig_->callers.begin(), rig_->callers.end());
    routine_ = random_sequence();
  }

  void run() {
    const std::size_t num_passes = 2 + draw(5);
    for (std::size_t pass = 0; pass < num_passes; ++pass) {
      edit_now_and_then();
      rig_->pipeline->enter();
      const std::vector<UnitIndex> sequence = draw(3) == 0 ? random_sequence() : routine_;
      const std::size_t length = draw(5) == 0 ? draw(sequence.size() + 1) : sequence.size();
      for (std::size_t i = 0; i < length; ++i) {
        call(sequence[i], /*nesting=*/0);
      }
      rig_->pipeline->leave(length == sequence.size());
    }
    gates_.clear();
    rig_->expect_at_rest_and_right();
    EXPECT_EQ(rig_->device.counters().copies, rig_->pipeline->stats().onloads);
  }

 private:
  std::size_t draw(std::size_t bound) { return random_() % bound; }

  Plan random_plan() {
    std::vector<Unit> units;
    const std::size_t count = 1 + draw(8);
    for (std::size_t i = 0; i < count; ++i) {
      units.push_back({"unit" + std::to_string(i), (1 + draw(6)) * kSlice,
                       static_cast<std::uint32_t>(i / 2),
                       draw(2) == 0 ? UnitKind::kMha : UnitKind::kFfn});
    }
    if (draw(2) == 0) {
      return plan_of(units, draw(20) * kSlice);
    }
    // Places that no planner would choose: safety must not hang on the plan's kindness.
    std::vector<ByteRange> places;
    for (const Unit& unit : units) {
      const std::size_t begin = draw(12) * kSlice;
      places.push_back({begin, begin + unit.size_bytes});
    }
    return plan_with_places(units, places, draw(20) * kSlice);
  }

  std::vector<UnitIndex> random_sequence() {
    std::vector<UnitIndex> sequence(1 + draw(12));
    for (UnitIndex& unit : sequence) {
      unit = static_cast<UnitIndex>(draw(rig_->pipeline->plan().units.size()));
    }
    return sequence;
  }

  /// One unit, perhaps with another one called inside it, on any stream.
  void call(UnitIndex unit, int nesting) {
    move_gates();
    const StreamId found = rig_->device.current_stream();
    if (draw(3) == 0) {
      rig_->device.set_current_stream(rig_->callers[draw(2)]);
    }
    const std::byte* place = rig_->pipeline->acquire(unit);
    rig_->read(unit, place);
    if (nesting < 3 && draw(6) == 0) {
      call(draw(2) == 0 ? unit : static_cast<UnitIndex>(draw(rig_->pipeline->plan().units.size())),
           nesting + 1);
      rig_->read(unit, place);
    }
    move_gates();
    rig_->pipeline->release(unit);
    // Between units a caller may stay on another stream; inside one, it comes back.
    if (nesting > 0 || draw(2) == 0) {
      rig_->device.set_current_stream(found);
    }
  }

  void move_gates() {
    if (may_hold_ && draw(3) == 0) {
      gates_.push_back(std::make_unique<Gate>());
      gates_.back()->hold(rig_->device, streams_[draw(streams_.size())]);
    }
    if (!gates_.empty() && draw(4) == 0) {
      gates_.erase(gates_.begin() + static_cast<std::ptrdiff_t>(draw(gates_.size())));
    }
  }

  /// An edit of a master, with the care that its owner has to take.
  void edit_now_and_then() {
    if (draw(4) == 0) {
      gates_.clear();
      const auto unit = static_cast<UnitIndex>(draw(rig_->pipeline->plan().units.size()));
      rig_->pipeline->synchronize_onload(unit);
      rig_->masters.edit(unit);
      rig_->pipeline->invalidate(unit);
    }
  }

  std::mt19937 random_;
  bool may_hold_ = false;  // the host waits for streams in the other modes
  std::unique_ptr<Rig> rig_;
  std::vector<StreamId> streams_;
  std::vector<UnitIndex> routine_;
  std::vector<std::unique_ptr<Gate>> gates_;  // after rig_: opened before it is drained
};

class PipelineRandomTest : public ::testing::TestWithParam<unsigned> {};

TEST_P(PipelineRandomTest, EveryReaderFindsItsUnit) {
  constexpr unsigned kSchedules = 250;
  for (unsigned i = 0; i < kSchedules; ++i) {
    const unsigned seed = GetParam() * kSchedules + i;
    SCOPED_TRACE("seed " + std::to_string(seed));
    Schedule(seed).run();
    if (HasFailure()) {
      return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, PipelineRandomTest, ::testing::Range(0U, 10U));

}  // namespace
}  // namespace torch_offload
