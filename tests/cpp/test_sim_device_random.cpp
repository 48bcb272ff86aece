#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <random>
#include <tuple>
#include <vector>

#include "sim/sim_device.h"
#include "sim_fixture.h"

namespace torch_offload {
namespace {

using testing::costs_by_unit;
using testing::Interval;
using testing::SimBench;

/// Costs of any kind, but no work that takes less than its call.
SimCosts random_costs(std::mt19937& random) {
  SimCosts costs = costs_by_unit(60);
  costs.calls.copy_ns = static_cast<std::int64_t>(random() % 3);
  costs.calls.wait_ns = static_cast<std::int64_t>(random() % 3);
  costs.calls.record_ns = static_cast<std::int64_t>(random() % 3);
  costs.calls.launch_ns = static_cast<std::int64_t>(random() % 2);
  costs.num_copy_engines = 1 + static_cast<int>(random() % 2);
  return costs;
}

/// A random program on five streams, and what is known of it.
struct Program {
  static constexpr UnitIndex kFirstKernel = 1000;

  Program(std::mt19937& random, SimBench& bench) {
    for (int i = 0; i < 4; ++i) {
      priorities.push_back(-static_cast<int>(random() % 2));
      bench.copy_stream(priorities.back());
    }
    std::vector<EventId> events;
    for (UnitIndex step = 1; step < 60; ++step) {
      const auto stream = static_cast<StreamId>(random() % priorities.size());
      const std::size_t choice = random() % 7;
      if (choice < 2) {
        bench.copy(stream, step);
      } else if (choice < 4) {
        kernel_ns[kFirstKernel + step] = 1 + static_cast<std::int64_t>(random() % 50);
        bench.compute(stream, kFirstKernel + step, kernel_ns[kFirstKernel + step]);
      } else if (choice < 5 || events.empty()) {
        events.push_back(bench.record(stream));
      } else if (choice < 6) {
        bench.device.wait(stream, events[random() % events.size()]);
      } else {
        if (random() % 4 == 0) {
          bench.device.synchronize(stream);
        } else {
          bench.device.is_done(events[random() % events.size()]);
        }
        bench.device.spend_host_time(static_cast<std::int64_t>(random() % 40));
      }
    }
  }

  std::vector<int> priorities{0};  // by StreamId
  std::map<UnitIndex, std::int64_t> kernel_ns;
};

/// A copy or a unit's kernels: when they could have begun, and when they ran.
struct Job {
  bool is_copy;
  int priority;
  std::int64_t ready_ns;
  std::size_t op_index;
  Interval ran;
};

/// Every stream does its work in order and keeps its waits. Returns the work.
std::vector<Job> expect_streams_in_order(const std::vector<Op>& ops, const SimCosts& costs,
                                         const Program& program) {
  std::map<StreamId, std::int64_t> reached;
  std::map<EventId, std::int64_t> recorded;
  std::vector<Job> jobs;
  for (std::size_t at = 0; at < ops.size(); ++at) {
    const Op& op = ops[at];
    if (op.kind == OpKind::kQuery || op.kind == OpKind::kSynchronize) {
      continue;
    }
    const int priority = program.priorities[op.stream];
    const std::int64_t ready_ns = std::max(reached[op.stream], op.host_time_ns);
    EXPECT_GE(op.begin_ns, ready_ns);
    EXPECT_GE(op.end_ns, op.begin_ns);
    if (op.kind == OpKind::kCopy) {
      const std::int64_t returned_ns = op.host_time_ns + costs.calls.copy_ns;
      EXPECT_EQ(op.end_ns, std::max(op.begin_ns + op.unit, returned_ns));
      jobs.push_back({true, priority, ready_ns, at, {op.begin_ns, op.end_ns}});
    } else if (op.kind == OpKind::kReadEnd) {
      const std::int64_t begin_ns = op.begin_ns - program.kernel_ns.at(op.unit);
      EXPECT_GE(begin_ns, ops[at - 1].end_ns);
      jobs.push_back({false, priority, ops[at - 1].end_ns, at - 1, {begin_ns, op.begin_ns}});
    } else if (op.kind == OpKind::kRecord) {
      recorded[op.event] = op.end_ns;
    } else if (op.kind == OpKind::kWait) {
      EXPECT_EQ(op.begin_ns, std::max(ready_ns, op.host_time_ns + costs.calls.wait_ns));
      EXPECT_EQ(op.end_ns, std::max(op.begin_ns, recorded.at(op.event)));
    }
    reached[op.stream] = op.end_ns;
  }
  return jobs;
}

/// No engine does two things at once, stands still while something is ready for it, or takes the
/// wrong one of two.
void expect_engines_well_used(const std::vector<Job>& jobs, const SimCosts& costs) {
  for (const Job& job : jobs) {
    const std::int64_t begin_ns = job.ran.first;
    int running = 1;
    bool took_over = false;
    for (const Job& other : jobs) {
      if (other.is_copy != job.is_copy || &other == &job) {
        continue;
      }
      running += other.ran.first <= begin_ns && begin_ns < other.ran.second ? 1 : 0;
      took_over = took_over || other.ran.second == begin_ns;
      if (other.ready_ns <= begin_ns && begin_ns < other.ran.first) {
        EXPECT_LT(std::tuple(job.priority, job.ready_ns, job.op_index),
                  std::tuple(other.priority, other.ready_ns, other.op_index));
      }
    }
    EXPECT_LE(running, job.is_copy ? costs.num_copy_engines : 1);
    EXPECT_TRUE(begin_ns == job.ready_ns || took_over) << "idle until " << begin_ns;
  }
}

TEST(SimDeviceRandomTest, RandomProgramsKeepOrderAndUseTheirEngines) {
  for (unsigned seed = 0; seed < 500 && !HasFailure(); ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const SimCosts costs = random_costs(random);
    SimBench bench(costs);
    const Program program(random, bench);
    const std::vector<Job> jobs = expect_streams_in_order(bench.finish(), costs, program);
    EXPECT_FALSE(jobs.empty());
    expect_engines_well_used(jobs, costs);
  }
}

}  // namespace
}  // namespace torch_offload
