// The checker against brute force: of thousands of small random logs, every order in which they can
// run is run, and what the checker says of a log must be what these orders show.
//
// TORCH_OFFLOAD_LINEARISATIONS=100000000 runs at least so many orders instead of a slice.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "brute_force.h"
#include "check/hazard_checker.h"
#include "linearisations.h"
#include "log_builder.h"
#include "random_log.h"

namespace torch_offload {
namespace {

using testing::Answer;
using testing::disagreements;
using testing::Linearisations;
using testing::LogBuilder;
using testing::masters;
using testing::RandomLog;
using testing::slices;
using testing::text_of;

/// How many logs of each sort there were: a comparison of faulty logs alone would prove little.
struct Tally {
  std::uint64_t orders = 0;
  std::uint64_t logs = 0;
  std::uint64_t clean = 0;
  std::uint64_t unordered = 0;
  std::uint64_t stale = 0;
  std::uint64_t too_large = 0;
};

constexpr std::uint64_t kMostOrdersOfALog = 20'000;

std::uint64_t wanted_orders() {
  const char* wanted = std::getenv("TORCH_OFFLOAD_LINEARISATIONS");
  return wanted == nullptr ? 2'000'000 : std::strtoull(wanted, nullptr, 10);
}

TEST(LinearisationsTest, CheckerAndBruteForceAgree) {
  HazardChecker checker(100'000);
  Tally tally;
  for (unsigned seed = 0; tally.orders < wanted_orders(); ++seed) {
    const OpLog log = RandomLog(seed).build.log;
    const Linearisations orders(log, kMostOrdersOfALog);
    if (!orders.is_complete()) {
      ++tally.too_large;
      continue;
    }
    const Answer answer(checker.check(log));
    ASSERT_EQ(disagreements(answer, log, orders), "") << "seed " << seed << "\n" << text_of(log);
    tally.orders += orders.count();
    ++tally.logs;
    tally.unordered += answer.unordered.empty() ? 0U : 1U;
    tally.stale += answer.unordered.empty() && !answer.stale.empty() ? 1U : 0U;
    tally.clean += answer.unordered.empty() && answer.stale.empty() ? 1U : 0U;
  }
  EXPECT_GT(tally.clean * 10, tally.logs) << "hardly a log without a fault";
  EXPECT_GT(tally.unordered * 10, tally.logs) << "hardly a log with a fault";
  EXPECT_GT(tally.stale * 500, tally.logs) << "hardly a log with stale bytes alone";
  EXPECT_LT(tally.too_large * 10, tally.logs);
  std::printf("%llu orders of %llu logs: %llu clean, %llu unordered, %llu stale, %llu too large\n",
              static_cast<unsigned long long>(tally.orders),
              static_cast<unsigned long long>(tally.logs),
              static_cast<unsigned long long>(tally.clean),
              static_cast<unsigned long long>(tally.unordered),
              static_cast<unsigned long long>(tally.stale),
              static_cast<unsigned long long>(tally.too_large));
}

/// What makes the test above a test: a checker that forgets about waits is found out.
TEST(LinearisationsTest, CheckerThatMissesOneWaitIsFoundOut) {
  HazardChecker checker(100'000);
  int num_waits = 0;
  int num_found_out = 0;
  for (unsigned seed = 0; seed < 500; ++seed) {
    const OpLog log = RandomLog(seed).build.log;
    const Linearisations orders(log, kMostOrdersOfALog);
    if (!orders.is_complete()) {
      continue;
    }
    for (std::size_t i = 0; i < log.ops().size(); ++i) {
      OpLog without = log;
      if (log.ops()[i].kind != OpKind::kWait) {
        continue;
      }
      // The op stays, so that all others keep their index, but orders nothing any more.
      without.clear();
      for (Op op : log.ops()) {
        op.kind = without.ops().size() == i ? OpKind::kQuery : op.kind;
        without.append(op);
      }
      ++num_waits;
      num_found_out += disagreements(Answer(checker.check(without)), log, orders).empty() ? 0 : 1;
    }
  }
  EXPECT_GT(num_found_out, 50) << "of " << num_waits << " waits, most of which order nothing";
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
