// A log with times on the host device: times against the same clock, read beside it.

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "core/op_log.h"
#include "host/host_device.h"
#include "pipeline_fixture.h"

namespace torch_offload {
namespace {

using testing::Gate;
using testing::layers_of;
using testing::plan_of;
using testing::Rig;
using testing::sequence_of;
using testing::TestDevice;

constexpr std::size_t kPageBytes = 4096;

std::int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

class TimedLogTest : public ::testing::Test {
 protected:
  TimedLogTest() { device_.register_host(host_.data(), host_.size()); }
  ~TimedLogTest() override {
    device_.attach_log(nullptr);
    device_.synchronize(copies_);
    device_.synchronize(compute_);
    device_.unregister_host(host_.data());
  }

  void copy(UnitIndex unit = 0) {
    device_.copy(copies_, {place_.data(), host_.data(), place_.size(), unit, 1});
  }

  alignas(kPageBytes) std::array<std::byte, kPageBytes> host_{};
  std::array<std::byte, kPageBytes> place_{};
  OpLog log_;
  TestDevice device_{HostDevice::ComputeStreams::kWorker};
  const StreamId copies_ = device_.create_stream({"copies", StreamRole::kCopy, 0});
  const StreamId compute_ = device_.create_stream({"compute", StreamRole::kCompute, 0});
};

TEST_F(TimedLogTest, TimesTellWhenTheStreamsWereHeld) {
  device_.attach_log(&log_, /*with_times=*/true);
  const EventId ready = device_.create_event();
  Gate copies_gate;
  Gate compute_gate;
  copies_gate.hold(device_, copies_);
  copy();
  device_.record(ready, copies_);
  device_.wait(compute_, ready);
  device_.begin_read(compute_, place_.data(), place_.size(), 0, 1);
  std::int64_t kernel_ns = 0;
  device_.run(compute_, [&] { kernel_ns = now_ns(); });
  compute_gate.hold(device_, compute_);
  device_.end_read(compute_, place_.data(), place_.size(), 0, 1);

  const std::int64_t copies_opened_ns = now_ns();
  copies_gate.open();
  device_.synchronize(copies_);
  const std::int64_t compute_opened_ns = now_ns();
  compute_gate.open();
  device_.synchronize(compute_);
  const std::int64_t end_ns = now_ns();
  device_.attach_log(nullptr);

  ASSERT_TRUE(log_.has_times());
  ASSERT_EQ(log_.ops().size(), 7U);
  const Op& copied = log_.ops()[0];
  EXPECT_LT(copied.host_time_ns, copies_opened_ns);
  EXPECT_GE(copied.begin_ns, copies_opened_ns);
  EXPECT_GE(copied.end_ns, copied.begin_ns);
  EXPECT_LE(copied.end_ns, compute_opened_ns);
  const Op& recorded = log_.ops()[1];
  EXPECT_EQ(recorded.begin_ns, recorded.end_ns);
  EXPECT_GE(recorded.end_ns, copied.end_ns);
  const Op& waited = log_.ops()[2];
  EXPECT_GE(waited.end_ns, copies_opened_ns);
  EXPECT_LE(waited.begin_ns, waited.end_ns);
  const Op& read = log_.ops()[3];
  EXPECT_EQ(read.begin_ns, read.end_ns);
  EXPECT_GE(read.end_ns, waited.end_ns);
  EXPECT_LE(read.end_ns, kernel_ns);
  const Op& read_end = log_.ops()[4];
  EXPECT_EQ(read_end.begin_ns, read_end.end_ns);
  EXPECT_GE(read_end.begin_ns, compute_opened_ns) << "the last kernel ended behind the gate";
  EXPECT_LE(read_end.end_ns, end_ns);
  const Op& synchronized = log_.ops()[6];
  EXPECT_EQ(synchronized.begin_ns, synchronized.host_time_ns);
  EXPECT_GE(synchronized.end_ns, read_end.end_ns);
  EXPECT_LE(synchronized.end_ns, end_ns);
}

/// All from where a free stream comes to the wait until the gate opens is stall.
TEST_F(TimedLogTest, WaitBeginsWhereItsStreamCameToIt) {
  device_.attach_log(&log_, /*with_times=*/true);
  const EventId ready = device_.create_event();
  Gate gate;
  gate.hold(device_, copies_);
  device_.record(ready, copies_);
  device_.wait(compute_, ready);
  device_.await([&] { return device_.blocked_on(compute_) == ready; });
  const std::int64_t blocked_ns = now_ns();
  const std::int64_t opened_ns = now_ns();
  gate.open();
  device_.attach_log(nullptr);
  const Op& waited = log_.ops().back();
  EXPECT_GE(waited.begin_ns, waited.host_time_ns);
  EXPECT_LE(waited.begin_ns, blocked_ns);
  EXPECT_GE(waited.end_ns, opened_ns);
}

TEST_F(TimedLogTest, DetachingWaitsForWhatIsStillUnderWay) {
  device_.attach_log(&log_, /*with_times=*/true);
  Gate gate;
  gate.hold(device_, copies_);
  copy();
  std::int64_t opened_ns = 0;
  std::thread opener([&] {
    opened_ns = now_ns();
    gate.open();
  });
  device_.attach_log(nullptr);
  const std::int64_t detached_ns = now_ns();
  opener.join();
  EXPECT_GE(log_.ops()[0].begin_ns, opened_ns);
  EXPECT_LE(log_.ops()[0].end_ns, detached_ns);
}

TEST_F(TimedLogTest, CallerStreamsAreTimedWhereTheyRun) {
  device_.attach_log(&log_, /*with_times=*/true);
  const EventId ready = device_.create_event();
  copy();
  device_.record(ready, copies_);
  const std::int64_t before_ns = now_ns();
  device_.wait(HostDevice::kCallerStream, ready);
  const std::int64_t after_ns = now_ns();
  device_.attach_log(nullptr);
  const Op& waited = log_.ops().back();
  EXPECT_GE(waited.begin_ns, before_ns);
  EXPECT_LE(waited.end_ns, after_ns);
  EXPECT_GE(waited.end_ns, log_.ops()[0].end_ns);
}

TEST_F(TimedLogTest, WithoutTimesAllAreUnknown) {
  device_.attach_log(&log_);
  copy();
  device_.synchronize(copies_);
  device_.attach_log(nullptr);
  EXPECT_FALSE(log_.has_times());
  for (const Op& op : log_.ops()) {
    EXPECT_EQ(op.begin_ns, kUnknownTime);
    EXPECT_EQ(op.end_ns, kUnknownTime);
    EXPECT_GT(op.host_time_ns, 0);
  }
}

TEST_F(TimedLogTest, CallsWithoutAPlaceOnAStreamHaveNoTimes) {
  device_.attach_log(&log_, /*with_times=*/true);
  void* const memory = device_.allocate(256);
  device_.host_read(host_.data(), 8, 0);
  const EventId event = device_.create_event();
  device_.record(event, compute_);
  device_.is_done(event);
  device_.free(memory);
  device_.attach_log(nullptr);
  for (const Op& op : log_.ops()) {
    EXPECT_EQ(op.begin_ns == kUnknownTime, op.kind != OpKind::kRecord) << name_of(op.kind);
  }
}

TEST_F(TimedLogTest, LogMayBeClearedAndAttachedAgain) {
  device_.attach_log(&log_, /*with_times=*/true);
  copy(1);
  log_.clear();
  copy(2);
  device_.attach_log(nullptr);
  ASSERT_EQ(log_.ops().size(), 1U);
  const std::int64_t first_ns = log_.ops()[0].end_ns;
  EXPECT_NE(first_ns, kUnknownTime);
  device_.attach_log(&log_, /*with_times=*/true);
  copy(3);
  device_.attach_log(nullptr);
  ASSERT_EQ(log_.ops().size(), 2U);
  EXPECT_EQ(log_.ops()[0].end_ns, first_ns) << "what is known stays";
  EXPECT_GE(log_.ops()[1].begin_ns, first_ns);
}

TEST_F(TimedLogTest, AnotherLogEndsTheFirst) {
  OpLog other;
  device_.attach_log(&log_, /*with_times=*/true);
  copy(1);
  device_.attach_log(&other);
  copy(2);
  device_.attach_log(nullptr);
  ASSERT_EQ(log_.ops().size(), 1U);
  EXPECT_NE(log_.ops()[0].end_ns, kUnknownTime);
  EXPECT_EQ(log_.stream_names(), (std::vector<std::string>{"caller", "copies"}));
  ASSERT_EQ(other.ops().size(), 1U);
  EXPECT_EQ(other.ops()[0].end_ns, kUnknownTime);
}

/// The threads that would come to the marks do not exist there.
TEST_F(TimedLogTest, ForkedChildDetachesWithoutWaiting) {
  device_.attach_log(&log_, /*with_times=*/true);
  Gate gate;
  gate.hold(device_, copies_);
  copy();
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(20);  // a hang ends the child by signal
    device_.attach_log(nullptr);
    _exit(log_.has_times() ? 1 : 0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << "ended by signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0);
  gate.open();
}

/// Whole passes: streams keep their order, a unit is read behind its copy, and a copy comes behind
/// the uses of all that it overwrites.
TEST(TimedPipelineTest, TimesOfWholePassesFitTogether) {
  for (const auto layout : {StreamLayout::kShared, StreamLayout::kSplit}) {
    const Plan plan = plan_of(layers_of(5, 1, 2));
    Rig rig(plan, {Mode::kPipeline, layout, /*poison_on_release=*/true});
    OpLog log;
    rig.device.attach_log(&log, /*with_times=*/true);
    for (int pass = 0; pass < 3; ++pass) {
      rig.pass(sequence_of(plan.units.size()));
    }
    rig.device.attach_log(nullptr);
    std::map<StreamId, std::int64_t> reached;
    std::map<UnitIndex, std::int64_t> copied;
    std::map<UnitIndex, std::int64_t> used;
    for (const Op& op : log.ops()) {
      if (op.kind == OpKind::kLeave || op.kind == OpKind::kEnter || op.kind == OpKind::kReturn) {
        continue;  // the host's doing, which takes no stream any time
      }
      ASSERT_NE(op.begin_ns, kUnknownTime) << name_of(op.kind);
      EXPECT_GE(op.begin_ns, std::max(op.host_time_ns, reached[op.stream]));
      EXPECT_GE(op.end_ns, op.begin_ns);
      reached[op.stream] = op.end_ns;
      if (op.kind == OpKind::kCopy) {
        copied[op.unit] = op.end_ns;
        EXPECT_GE(op.begin_ns, used[op.unit]);
        for (const UnitIndex other : plan.overlaps[op.unit]) {
          EXPECT_GE(op.begin_ns, used[other]);
        }
      } else if (op.kind == OpKind::kRead) {
        EXPECT_GE(op.begin_ns, copied.at(op.unit));
      } else if (op.kind == OpKind::kReadEnd) {
        used[op.unit] = op.end_ns;
      }
    }
    EXPECT_EQ(used.size(), plan.units.size());
  }
}

}  // namespace
}  // namespace torch_offload
