// Debugging: everything is waited for as soon as it is submitted, and what is not done is named.

#include <gtest/gtest.h>

#include <string>
#include <tuple>
#include <vector>

#include "core/error.h"
#include "core/pipeline.h"
#include "pipeline_fixture.h"

namespace torch_offload {
namespace {

using testing::Gate;
using testing::layers_of;
using testing::plan_of;
using testing::Rig;
using testing::sequence_of;

std::vector<std::string> warnings;  // what the pipeline of the running test has said

PipelineOptions debugging(Mode mode, StreamLayout layout) {
  PipelineOptions options{mode, layout, /*poison_on_release=*/true};
  options.wait_for_each = true;
  options.warn = [](const std::string& text) { warnings.push_back(text); };
  warnings.clear();
  return options;
}

class PipelineDebugTest : public ::testing::TestWithParam<std::tuple<Mode, StreamLayout>> {};

TEST_P(PipelineDebugTest, CopiesAndUsesAreOverBeforeTheNextCall) {
  const Plan plan = plan_of(layers_of(3, 1, 2));
  Rig rig(plan, debugging(std::get<0>(GetParam()), std::get<1>(GetParam())));
  for (int forward = 0; forward < 2; ++forward) {
    rig.pass(sequence_of(plan.units.size()));
  }
  rig.expect_at_rest_and_right();
  EXPECT_TRUE(warnings.empty());
  const std::vector<Op>& ops = rig.log.ops();
  for (std::size_t i = 0; i < ops.size(); ++i) {
    if (ops[i].kind != OpKind::kCopy && ops[i].kind != OpKind::kReadEnd) {
      continue;
    }
    std::size_t next = i + 1;
    while (next < ops.size() && ops[next].kind != OpKind::kSynchronize &&
           ops[next].kind != OpKind::kCopy && ops[next].kind != OpKind::kRead) {
      ++next;
    }
    ASSERT_LT(next, ops.size());
    EXPECT_EQ(ops[next].kind, OpKind::kSynchronize) << "behind op " << i;
    EXPECT_EQ(ops[next].stream, ops[i].stream);
  }
}

INSTANTIATE_TEST_SUITE_P(All, PipelineDebugTest,
                         ::testing::Values(std::tuple(Mode::kSync, StreamLayout::kShared),
                                           std::tuple(Mode::kStreams, StreamLayout::kShared),
                                           std::tuple(Mode::kStreams, StreamLayout::kSplit),
                                           std::tuple(Mode::kEvents, StreamLayout::kShared),
                                           std::tuple(Mode::kEvents, StreamLayout::kSplit),
                                           std::tuple(Mode::kPipeline, StreamLayout::kShared),
                                           std::tuple(Mode::kPipeline, StreamLayout::kSplit)));

/// The copy went off, its event did not: there is nothing to ask yet.
TEST(PipelineDebugFaultTest, UnitWhoseFirstOnloadFailedCanBeWaitedFor) {
  for (int call = 1; call < 6; ++call) {
    SCOPED_TRACE("fault at call " + std::to_string(call));
    Rig rig(plan_of(layers_of(2, 1, 1)), debugging(Mode::kPipeline, StreamLayout::kShared));
    rig.device.fail_at(call);
    EXPECT_THROW(rig.pass({0, 1}), testing::InjectedFault);
    rig.pipeline->synchronize_onload(0);
    rig.pipeline->synchronize_onload(1);
    rig.masters.edit(0);
    rig.pipeline->invalidate(0);
    rig.pass({0, 1, 2, 3});
    rig.expect_at_rest_and_right();
  }
}

TEST(PipelineDebugWarningTest, CopyThatIsUnderWayAfterItsWaitIsNamed) {
  const Plan plan = plan_of(layers_of(2, 1, 1));
  Rig rig(plan, debugging(Mode::kEvents, StreamLayout::kShared));
  Gate gate;
  gate.hold(rig.device, rig.copy_stream(0));
  rig.device.forgets_synchronize = true;  // the planted fault
  rig.pipeline->enter();
  rig.use(0);
  EXPECT_EQ(warnings.size(), 1U);
  rig.device.forgets_synchronize = false;
  gate.open();
  rig.pipeline->synchronize();
  rig.use(1);
  rig.pipeline->leave(true);
  ASSERT_EQ(warnings.size(), 1U) << "the second unit was waited for";
  EXPECT_NE(warnings[0].find(plan.units[0].name), std::string::npos) << warnings[0];
  rig.expect_at_rest_and_right();
}

TEST(PipelineDebugWarningTest, WarningThatThrowsEndsTheAcquire) {
  const Plan plan = plan_of(layers_of(2, 1, 1));
  PipelineOptions options = debugging(Mode::kEvents, StreamLayout::kShared);
  options.warn = [](const std::string& text) { throw StateError(text); };
  Rig rig(plan, options);
  Gate gate;
  gate.hold(rig.device, rig.copy_stream(0));
  rig.device.forgets_synchronize = true;
  rig.pipeline->enter();
  EXPECT_THROW(rig.pipeline->acquire(0), StateError);
  EXPECT_FALSE(rig.pipeline->is_acquired(0));
  rig.device.forgets_synchronize = false;
  gate.open();
  rig.pipeline->synchronize();
  rig.use(0);
  rig.pipeline->leave(true);
  rig.expect_at_rest_and_right();
}

}  // namespace
}  // namespace torch_offload
