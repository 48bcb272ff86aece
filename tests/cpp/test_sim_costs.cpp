#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "core/error.h"
#include "sim/sim_costs.h"
#include "sim/sim_device.h"
#include "sim_fixture.h"

namespace torch_offload {
namespace {

using testing::costs_by_unit;
using testing::SimBench;

/// What costs are refused, and what the message names.
struct BadCosts {
  const char* named;
  void (*spoil)(SimCosts&);
};

class SimCostsTest : public ::testing::TestWithParam<BadCosts> {};

TEST_P(SimCostsTest, BadCostsAreRefused) {
  SimCosts costs = costs_by_unit();
  EXPECT_NO_THROW(SimDevice{costs});
  GetParam().spoil(costs);
  try {
    SimDevice device(costs);
    FAIL() << "expected a ValueError";
  } catch (const ValueError& error) {
    EXPECT_NE(std::string(error.what()).find(GetParam().named), std::string::npos) << error.what();
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, SimCostsTest,
    ::testing::Values(
        BadCosts{"got both", [](SimCosts& costs) { costs.copy_bytes_per_second = 1e9; }},
        BadCosts{"got neither", [](SimCosts& costs) { costs.copy_ns.reset(); }},
        BadCosts{"copy_bytes_per_second",
                 [](SimCosts& costs) {
                   costs.copy_ns.reset();
                   costs.copy_bytes_per_second = 0;
                 }},
        BadCosts{"copy_ns[1]", [](SimCosts& costs) { (*costs.copy_ns)[1] = -1; }},
        BadCosts{"compute_ns[0]", [](SimCosts& costs) { costs.compute_ns = {INT64_MAX}; }},
        BadCosts{"launch_ns[1]", [](SimCosts& costs) { costs.launch_ns = {0, -1}; }},
        BadCosts{"copy_latency_ns", [](SimCosts& costs) { costs.copy_latency_ns = -1; }},
        BadCosts{"call_ns['copy']", [](SimCosts& costs) { costs.calls.copy_ns = -1; }},
        BadCosts{"call_ns['record']", [](SimCosts& costs) { costs.calls.record_ns = -1; }},
        BadCosts{"call_ns['wait']", [](SimCosts& costs) { costs.calls.wait_ns = -1; }},
        BadCosts{"call_ns['synchronize']",
                 [](SimCosts& costs) { costs.calls.synchronize_ns = -1; }},
        BadCosts{"call_ns['launch']", [](SimCosts& costs) { costs.calls.launch_ns = -1; }},
        BadCosts{"num_copy_engines", [](SimCosts& costs) { costs.num_copy_engines = 0; }}));

TEST(SimCostsTest, CallCostsGoByName) {
  SimCallCosts calls;
  std::int64_t cost_ns = 0;
  for (const char* name : {"copy", "record", "wait", "synchronize", "launch"}) {
    call_cost(calls, name) = ++cost_ns;
  }
  EXPECT_EQ(calls.copy_ns, 1);
  EXPECT_EQ(calls.record_ns, 2);
  EXPECT_EQ(calls.wait_ns, 3);
  EXPECT_EQ(calls.synchronize_ns, 4);
  EXPECT_EQ(calls.launch_ns, 5);
  EXPECT_THROW(call_cost(calls, "query"), ValueError);
}

TEST(SimCostsTest, CopyOfMoreThanAnHourThrows) {
  SimCosts costs;
  costs.copy_bytes_per_second = 1e-3;
  SimBench bench(costs);
  EXPECT_THROW(bench.copy(SimDevice::kCallerStream, 0, 256), ValueError);
}

}  // namespace
}  // namespace torch_offload
