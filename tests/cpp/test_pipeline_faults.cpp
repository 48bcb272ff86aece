// The device fails at every call that a few forwards make, one after the other. Each time the error
// is the device's own, nothing stays held, and the next forward is right.

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "core/pipeline.h"
#include "pipeline_fixture.h"

namespace torch_offload {
namespace {

using testing::InjectedFault;
using testing::layers_of;
using testing::plan_of;
using testing::plan_with_places;
using testing::Rig;
using testing::sequence_of;

constexpr std::size_t kSlice = kAlignmentBytes;

class PipelineFaultTest : public ::testing::TestWithParam<std::tuple<Mode, StreamLayout, bool>> {
 protected:
  /// A copy that no event tells of must have been waited for by the host, before anybody could have
  /// copied into the same bytes.
  static void expect_no_copy_out_of_sight(const Rig& rig) {
    const bool host_synchronizes = policy_of(rig.pipeline->options().mode).host_synchronizes;
    const std::vector<Op>& ops = rig.log.ops();
    for (std::size_t i = 0; i < ops.size(); ++i) {
      if (ops[i].kind != OpKind::kCopy) {
        continue;
      }
      bool is_seen = false;
      for (std::size_t j = i + 1; j < ops.size() && !is_seen; ++j) {
        const bool same_stream = ops[j].stream == ops[i].stream;
        is_seen = same_stream && (ops[j].kind == OpKind::kSynchronize ||
                                  (ops[j].kind == OpKind::kRecord && !host_synchronizes));
        if (ops[j].kind == OpKind::kCopy) {
          break;
        }
      }
      EXPECT_TRUE(is_seen) << "the copy of unit " << ops[i].unit << " at op " << i;
    }
  }

  PipelineOptions options() const {
    return {std::get<0>(GetParam()), std::get<1>(GetParam()), std::get<2>(GetParam())};
  }

  /// Runs `forwards` with the fault at its first call, its second, and so on until it gets through.
  void fail_everywhere(const Plan& plan, const std::function<void(Rig&)>& forwards) {
    constexpr int kTooMany = 2000;
    int call = 1;
    for (; call < kTooMany; ++call) {
      SCOPED_TRACE("fault at call " + std::to_string(call));
      Rig rig(plan, options());
      rig.pass(sequence_of(plan.units.size()));
      rig.device.fail_at(call);
      bool failed = false;
      try {
        forwards(rig);
      } catch (const InjectedFault&) {
        failed = true;
      }
      rig.device.await([] { return true; });
      const bool got_through = !rig.device.fault_is_over();
      rig.device.fail_at(0);
      EXPECT_NE(failed, got_through) << "a fault was swallowed, or came from nowhere";
      EXPECT_EQ(rig.device.current_stream(), rig.callers[0]);
      expect_no_copy_out_of_sight(rig);  // before anything below synchronizes
      rig.expect_at_rest_and_right();
      for (int pass = 0; pass < 2; ++pass) {
        rig.pass(sequence_of(plan.units.size()));
      }
      rig.expect_at_rest_and_right();
      if (got_through || HasFailure()) {
        break;
      }
    }
    EXPECT_GT(call, 20) << "so few calls make no forward";
    EXPECT_LT(call, kTooMany);
  }
};

TEST_P(PipelineFaultTest, InPlainForwards) {
  fail_everywhere(plan_of(layers_of(3, 1, 2)), [](Rig& rig) {
    rig.pass({0, 1, 2, 3, 4, 5});
    rig.pass({0, 3, 1, 5});
  });
}

/// Units called inside others, on the same place and on others, with streams switched in between.
TEST_P(PipelineFaultTest, InNestedCallsAndSwitchedStreams) {
  const Plan plan = plan_with_places(layers_of(2, 2, 2),
                                     {{0, 512}, {512, 1024}, {256, 768}, {768, 1280}}, 4 * kSlice);
  fail_everywhere(plan, [](Rig& rig) {
    rig.pipeline->enter();
    const auto guarded = [&rig](UnitIndex unit, const std::function<void()>& inside) {
      // As the wrapper does it: whatever was acquired is released, and the pass is left. A module
      // that fails puts back the stream that it switched from, as torch's guard does.
      const std::byte* place = rig.pipeline->acquire(unit);
      const StreamId found = rig.device.current_stream();
      try {
        rig.read(unit, place);
        inside();
      } catch (...) {
        rig.device.set_current_stream(found);
        rig.pipeline->release(unit);
        throw;
      }
      rig.pipeline->release(unit);
    };
    const StreamId caller = rig.callers[0];
    try {
      guarded(0, [&] {
        guarded(0, [&] { guarded(2, [] {}); });
        guarded(1, [] {});
      });
      rig.device.set_current_stream(rig.callers[1]);
      guarded(3, [&] {
        // Ends on another stream than it began on.
        if (rig.pipeline->options().layout == StreamLayout::kShared) {
          rig.device.set_current_stream(caller);
        }
      });
      guarded(3, [] {});
      rig.device.set_current_stream(caller);
      guarded(3, [] {});
    } catch (...) {
      rig.device.set_current_stream(caller);
      rig.pipeline->leave(false);
      throw;
    }
    rig.pipeline->leave(true);
  });
}

INSTANTIATE_TEST_SUITE_P(All, PipelineFaultTest,
                         ::testing::Values(std::tuple{Mode::kSync, StreamLayout::kShared, false},
                                           std::tuple{Mode::kStreams, StreamLayout::kShared, false},
                                           std::tuple{Mode::kStreams, StreamLayout::kSplit, false},
                                           std::tuple{Mode::kEvents, StreamLayout::kShared, false},
                                           std::tuple{Mode::kEvents, StreamLayout::kSplit, false},
                                           std::tuple{Mode::kPipeline, StreamLayout::kShared,
                                                      false},
                                           std::tuple{Mode::kPipeline, StreamLayout::kSplit, false},
                                           std::tuple{Mode::kPipeline, StreamLayout::kShared, true},
                                           std::tuple{Mode::kPipeline, StreamLayout::kSplit, true}),
                         [](const auto& info) {
                           return std::string(name_of(std::get<0>(info.param))) + "_" +
                                  name_of(std::get<1>(info.param)) +
                                  (std::get<2>(info.param) ? "_poison" : "");
                         });

/// A unit that cannot be given a place of its own keeps what it knows of its old one: who copies
/// there next must still wait for its readers.
TEST(PipelineOwnPlaceFaultTest, FailedWaitForgetsNoReader) {
  constexpr UnitIndex kBehind = 0;  // MHA, shares bytes with kInner only
  constexpr UnitIndex kOuter = 1;   // FFN, likewise
  constexpr UnitIndex kInner = 2;   // MHA
  for (int call = 1; call < 10; ++call) {
    SCOPED_TRACE("fault at call " + std::to_string(call));
    Rig rig(plan_with_places(layers_of(2, 2, 2), {{512, 1024}, {0, 512}, {256, 768}, {1024, 1536}},
                             2 * kSlice),
            {Mode::kEvents, StreamLayout::kSplit, false});
    rig.pipeline->enter();
    rig.use(kInner);
    const std::byte* place = rig.pipeline->acquire(kOuter);
    rig.read(kOuter, place);
    rig.device.fail_at(call);
    try {
      rig.read(kInner, rig.pipeline->acquire(kInner));
      rig.pipeline->release(kInner);
    } catch (const InjectedFault&) {
    }
    rig.device.fail_at(0);
    rig.pipeline->release(kOuter);
    rig.use(kBehind);
    rig.pipeline->leave(false);
    rig.expect_at_rest_and_right();
  }
}

TEST(PipelineConstructorFaultTest, GivesTheWindowBackWhereverItFails) {
  const Plan plan = plan_of(layers_of(2, 1, 2));
  bool got_through = false;
  for (int call = 1; !got_through; ++call) {
    testing::TestDevice device(HostDevice::ComputeStreams::kWorker);
    testing::Masters masters(device, plan.units);
    testing::RawLoader loader(device, masters);
    device.fail_at(call);
    try {
      const Pipeline pipeline(device, loader, plan, {Mode::kPipeline, StreamLayout::kSplit, false});
      got_through = true;
      EXPECT_GT(call, 10);
      device.fail_at(0);
    } catch (const InjectedFault&) {
    }
    EXPECT_EQ(device.counters().allocated_bytes, 0U) << "fault at call " << call;
  }
}

}  // namespace
}  // namespace torch_offload
