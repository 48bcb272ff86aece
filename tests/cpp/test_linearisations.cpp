// The checker against brute force: of thousands of small random logs, every order in which they can
// run is run, and what the checker says of a log must be what these orders show.
//
// TORCH_OFFLOAD_LINEARISATIONS=100000000 runs at least so many orders instead of a slice.

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "lanes/linearisation_lane.h"
#include "lanes/linearisations.h"
#include "lanes/log_builder.h"

namespace torch_offload {
namespace {

using lanes::Linearisations;
using lanes::LogBuilder;
using lanes::masters;
using lanes::slices;

void print(const LinearisationReport& report) {
  std::printf("%llu orders of %llu logs: %llu clean, %llu unordered, %llu stale, %llu too large\n",
              static_cast<unsigned long long>(report.num_orders),
              static_cast<unsigned long long>(report.num_logs),
              static_cast<unsigned long long>(report.num_clean),
              static_cast<unsigned long long>(report.num_unordered),
              static_cast<unsigned long long>(report.num_stale),
              static_cast<unsigned long long>(report.num_too_large));
}

TEST(LinearisationsTest, CheckerAndBruteForceAgree) {
  const char* wanted = std::getenv("TORCH_OFFLOAD_LINEARISATIONS");
  LinearisationLane lane;
  lane.advance(wanted == nullptr ? 2'000'000 : std::strtoull(wanted, nullptr, 10));
  const LinearisationReport& report = lane.report();
  EXPECT_EQ(report.num_disagreements, 0U);
  for (const std::string& example : report.examples) {
    ADD_FAILURE() << example;
  }
  EXPECT_GT(report.num_clean * 10, report.num_logs) << "hardly a log without a fault";
  EXPECT_GT(report.num_unordered * 10, report.num_logs) << "hardly a log with a fault";
  EXPECT_GT(report.num_stale * 500, report.num_logs) << "hardly a log with stale bytes alone";
  EXPECT_LT(report.num_too_large * 10, report.num_logs);
  print(report);
}

/// What makes the test above a test: a checker that forgets about a wait is found out.
TEST(LinearisationsTest, CheckerThatMissesOneWaitIsFoundOut) {
  LinearisationLane lane(/*is_control=*/true);
  lane.advance(100'000);
  EXPECT_GT(lane.report().num_disagreements, 10U) << "most waits order nothing, but not all";
  EXPECT_FALSE(lane.report().examples.empty());
}

/// The oracle is no better than its count: orders that can be counted by hand.
TEST(LinearisationsTest, CountsTheOrdersOfLogsThatCanBeCountedByHand) {
  LogBuilder apart;  // three streams of two ops: 6! / (2! 2! 2!)
  for (StreamId stream = 0; stream < 3; ++stream) {
    apart.copy(stream, slices(stream), masters(0));
    apart.copy(stream, slices(stream), masters(0));
  }
  EXPECT_EQ(Linearisations(apart.log, 1000).count(), 90U);

  LogBuilder waiting;  // copy, record | wait, read: the wait comes last but one
  waiting.copy(0, slices(0), masters(0));
  waiting.record(0, 0);
  waiting.wait(1, 0);
  waiting.read(1, slices(0));
  EXPECT_EQ(Linearisations(waiting.log, 1000).count(), 1U);

  LogBuilder host;  // what comes after the host's write was submitted after it
  host.copy(0, slices(0), masters(0));
  host.host_write(masters(1));
  host.copy(1, slices(1), masters(1));
  EXPECT_EQ(Linearisations(host.log, 1000).count(), 3U);
  host.synchronize(0);
  EXPECT_EQ(Linearisations(host.log, 1000).count(), 5U);
}

}  // namespace
}  // namespace torch_offload
