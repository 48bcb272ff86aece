#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "core/error.h"
#include "sim/sim_device.h"
#include "sim_fixture.h"

namespace torch_offload {
namespace {

using testing::costs_by_unit;
using testing::Interval;
using testing::kPageBytes;
using testing::SimBench;

constexpr StreamId kCaller = SimDevice::kCallerStream;

TEST(SimDeviceTest, CopyTakesLatencyAndBytesOverRate) {
  SimCosts costs;
  costs.copy_bytes_per_second = 1e9;  // a byte a nanosecond
  costs.copy_latency_ns = 50;
  SimBench bench(costs);
  bench.copy(kCaller, 0, 256);
  bench.copy(kCaller, 1, 1000);
  EXPECT_EQ(bench.copied(0), Interval(0, 306));
  EXPECT_EQ(bench.copied(1), Interval(306, 1356));
}

TEST(SimDeviceTest, CopyOfAUnitWithoutATimeThrowsAndChangesNothing) {
  SimCosts costs = costs_by_unit(3);
  costs.calls.copy_ns = 7;
  SimBench bench(costs);
  EXPECT_THROW(bench.copy(kCaller, 3), ValueError);
  EXPECT_EQ(bench.device.host_time_ns(), 0);
  EXPECT_EQ(bench.device.counters().copies, 0U);
  EXPECT_TRUE(bench.finish().empty());
}

TEST(SimDeviceTest, HostClockMovesByTheCostOfEachCall) {
  SimCosts costs = costs_by_unit();
  costs.calls = {10, 1, 2, 3, 500};
  SimBench bench(costs);
  const StreamId copies = bench.copy_stream();
  EXPECT_EQ(bench.device.host_time_ns(), 0) << "making a stream is not part of a forward";
  bench.copy(copies, 100);
  EXPECT_EQ(bench.device.host_time_ns(), 10);
  const EventId event = bench.record(copies);
  EXPECT_EQ(bench.device.host_time_ns(), 11);
  bench.device.wait(kCaller, event);
  EXPECT_EQ(bench.device.host_time_ns(), 13);
  bench.compute(kCaller, 1, 20);
  EXPECT_EQ(bench.device.host_time_ns(), 513);
  bench.device.spend_host_time(87);
  EXPECT_EQ(bench.device.host_time_ns(), 600);
  EXPECT_TRUE(bench.device.is_done(event));
  EXPECT_EQ(bench.device.host_time_ns(), 600);
  bench.device.synchronize(copies);
  EXPECT_EQ(bench.device.host_time_ns(), 603);
  EXPECT_EQ(bench.device.host_blocked_ns(), 0) << "the stream was done before the host asked";
  std::vector<std::int64_t> called_at;
  for (const Op& op : bench.finish()) {
    called_at.push_back(op.host_time_ns);
  }
  EXPECT_EQ(called_at, (std::vector<std::int64_t>{0, 10, 11, 13, 513, 600, 600}));
}

TEST(SimDeviceTest, WorkBeginsWithItsCallAndDoesNotEndBeforeIt) {
  SimCosts costs = costs_by_unit();
  costs.calls.launch_ns = 500;
  costs.calls.copy_ns = 10;
  SimBench bench(costs);
  const StreamId copies = bench.copy_stream();
  bench.compute(kCaller, 1, 20);   // the host takes longer to launch than the device to run
  bench.compute(kCaller, 2, 900);  // and here it does not
  bench.copy(copies, 3);
  EXPECT_EQ(bench.computed(1), Interval(0, 500));
  EXPECT_EQ(bench.computed(2), Interval(500, 1400));
  EXPECT_EQ(bench.copied(3), Interval(1000, 1010));
}

TEST(SimDeviceTest, CopiesAndKernelsRunSideBySideAndStreamsInOrder) {
  SimBench bench;
  const StreamId copies = bench.copy_stream();
  bench.copy(copies, 100);
  bench.copy(copies, 30);
  bench.compute(kCaller, 1, 40);
  bench.compute(kCaller, 2, 50);
  EXPECT_EQ(bench.copied(100), Interval(0, 100));
  EXPECT_EQ(bench.copied(30), Interval(100, 130));
  EXPECT_EQ(bench.computed(1), Interval(0, 40));
  EXPECT_EQ(bench.computed(2), Interval(40, 90));
}

TEST(SimDeviceTest, WaitHoldsTheWaiterUntilTheRecordIsReached) {
  SimBench bench;
  const StreamId copies = bench.copy_stream();
  bench.copy(copies, 100);
  bench.order(kCaller, copies);
  bench.compute(kCaller, 1, 20);
  EXPECT_EQ(bench.computed(1), Interval(100, 120));
  const Op& wait = bench.finish()[2];
  ASSERT_EQ(wait.kind, OpKind::kWait);
  EXPECT_EQ(wait.begin_ns, 0);
  EXPECT_EQ(wait.end_ns, 100) << "the stall";
}

TEST(SimDeviceTest, WaitMeansTheLastRecordBeforeItAndNoLaterOne) {
  SimBench bench;
  const StreamId copies = bench.copy_stream();
  const EventId event = bench.device.create_event();
  bench.copy(copies, 100);
  bench.device.record(event, copies);
  bench.device.wait(kCaller, event);
  bench.copy(copies, 200);
  bench.device.record(event, copies);
  bench.compute(kCaller, 1, 20);
  bench.device.spend_host_time(150);
  EXPECT_FALSE(bench.device.is_done(event)) << "the last record is behind the second copy";
  EXPECT_EQ(bench.computed(1), Interval(100, 120));
}

TEST(SimDeviceTest, RecordedAnewOnAFasterStreamTheEarlierWaitStillHolds) {
  SimBench bench;
  const StreamId slow = bench.copy_stream();
  const EventId event = bench.device.create_event();
  bench.copy(slow, 100);
  bench.device.record(event, slow);
  bench.device.wait(kCaller, event);
  bench.compute(kCaller, 1, 20);
  bench.device.record(event, bench.compute_stream());
  EXPECT_TRUE(bench.device.is_done(event));
  EXPECT_EQ(bench.computed(1), Interval(100, 120));
}

TEST(SimDeviceTest, ManyStreamsWaitForOneRecord) {
  SimBench bench;
  const StreamId copies = bench.copy_stream();
  bench.copy(copies, 100);
  const EventId event = bench.record(copies);
  for (UnitIndex unit = 1; unit <= 5; ++unit) {
    const StreamId stream = bench.compute_stream();
    bench.device.wait(stream, event);
    bench.device.wait(stream, event);
    bench.device.begin_read(stream, nullptr, 0, unit, 1);
  }
  const std::vector<Op>& ops = bench.finish();
  EXPECT_EQ(
      std::count_if(ops.begin(), ops.end(),
                    [](const Op& op) { return op.kind == OpKind::kRead && op.begin_ns == 100; }),
      5);
}

TEST(SimDeviceTest, OneCopyEngineServesTheStreamThatWasReadyFirst) {
  SimBench bench;
  const StreamId first = bench.copy_stream();
  const StreamId second = bench.copy_stream();
  bench.copy(first, 100);
  bench.copy(second, 30);
  bench.copy(first, 50);
  EXPECT_EQ(bench.copied(100), Interval(0, 100));
  EXPECT_EQ(bench.copied(30), Interval(100, 130))
      << "the transfer itself, not the time in the queue";
  EXPECT_EQ(bench.copied(50), Interval(130, 180)) << "was ready when the first one ended";
}

TEST(SimDeviceTest, TwoCopyEnginesServeTwoStreamsAtOnce) {
  SimCosts costs = costs_by_unit();
  costs.num_copy_engines = 2;
  SimBench bench(costs);
  const StreamId first = bench.copy_stream();
  const StreamId second = bench.copy_stream();
  const StreamId third = bench.copy_stream();
  bench.copy(first, 100);
  bench.copy(second, 30);
  bench.copy(third, 50);
  EXPECT_EQ(bench.copied(100), Interval(0, 100));
  EXPECT_EQ(bench.copied(30), Interval(0, 30));
  EXPECT_EQ(bench.copied(50), Interval(30, 80));
}

TEST(SimDeviceTest, HigherPriorityGoesFirstWhenBothAreReady) {
  SimBench bench;
  const StreamId busy = bench.copy_stream(0);
  const StreamId normal = bench.copy_stream(0);
  const StreamId high = bench.copy_stream(-1);
  bench.copy(busy, 100);
  bench.copy(normal, 30);
  bench.device.spend_host_time(20);
  bench.copy(high, 50);
  EXPECT_EQ(bench.copied(100), Interval(0, 100)) << "what runs is not interrupted";
  EXPECT_EQ(bench.copied(50), Interval(100, 150));
  EXPECT_EQ(bench.copied(30), Interval(150, 180));
}

TEST(SimDeviceTest, HigherPriorityThatIsNotReadyHoldsNobody) {
  SimBench bench;
  const StreamId normal = bench.copy_stream(0);
  const StreamId high = bench.copy_stream(-1);
  bench.compute(kCaller, 1, 40);
  bench.order(high, kCaller);
  bench.copy(high, 50);
  bench.copy(normal, 100);
  EXPECT_EQ(bench.copied(100), Interval(0, 100));
  EXPECT_EQ(bench.copied(50), Interval(100, 150));
}

/// The host submitted A long before B, but A still waits for a kernel.
TEST(SimDeviceTest, SubmittedLaterButReadyEarlierGoesFirst) {
  SimBench bench;
  const StreamId first = bench.copy_stream();
  const StreamId second = bench.copy_stream();
  bench.compute(kCaller, 1, 100);
  bench.order(first, kCaller);
  bench.copy(first, 30);
  bench.device.spend_host_time(90);
  bench.copy(second, 50);
  EXPECT_EQ(bench.copied(50), Interval(90, 140));
  EXPECT_EQ(bench.copied(30), Interval(140, 170));
}

TEST(SimDeviceTest, KernelsOfTwoStreamsTakeTurns) {
  SimBench bench;
  const StreamId other = bench.compute_stream();
  bench.compute(kCaller, 1, 100);
  bench.compute(other, 2, 50);
  bench.compute(kCaller, 3, 10);
  EXPECT_EQ(bench.computed(1), Interval(0, 100));
  EXPECT_EQ(bench.computed(2), Interval(0, 150)) << "came there at once, ended behind the other";
  EXPECT_EQ(bench.computed(3), Interval(100, 160));
}

TEST(SimDeviceTest, KernelsOfTwoStreamsRunAtOnceWhereTheLimitIsLifted) {
  SimCosts costs = costs_by_unit();
  costs.shared_compute = false;
  SimBench bench(costs);
  const StreamId other = bench.compute_stream();
  bench.compute(kCaller, 1, 100);
  bench.compute(other, 2, 50);
  EXPECT_EQ(bench.computed(1), Interval(0, 100));
  EXPECT_EQ(bench.computed(2), Interval(0, 50));
}

TEST(SimDeviceTest, SynchronizeTakesTheHostToTheEndOfTheStream) {
  SimCosts costs = costs_by_unit();
  costs.calls.synchronize_ns = 3;
  SimBench bench(costs);
  const StreamId copies = bench.copy_stream();
  const StreamId others = bench.copy_stream();
  bench.copy(copies, 100);
  bench.copy(others, 500);
  bench.device.synchronize(copies);
  EXPECT_EQ(bench.device.host_time_ns(), 103) << "the other stream is not waited for";
  EXPECT_EQ(bench.device.host_blocked_ns(), 100);
  bench.copy(copies, 50);
  bench.device.synchronize(others);
  EXPECT_EQ(bench.device.host_time_ns(), 603);
  EXPECT_EQ(bench.copied(50), Interval(600, 650));
  const Op& first = bench.finish()[2];
  ASSERT_EQ(first.kind, OpKind::kSynchronize);
  EXPECT_EQ(first.begin_ns, 0);
  EXPECT_EQ(first.end_ns, 103);
}

TEST(SimDeviceTest, SynchronizeOfAnIdleStreamReturnsAtOnce) {
  SimBench bench;
  bench.device.synchronize(kCaller);
  EXPECT_EQ(bench.device.host_time_ns(), 0);
  EXPECT_EQ(bench.device.counters().host_synchronizes, 1U);
}

TEST(SimDeviceTest, IsDoneAnswersForThePresentOfTheHost) {
  SimBench bench;
  const StreamId copies = bench.copy_stream();
  bench.copy(copies, 100);
  const EventId event = bench.record(copies);
  EXPECT_FALSE(bench.device.is_done(event));
  bench.device.spend_host_time(99);
  EXPECT_FALSE(bench.device.is_done(event));
  bench.device.spend_host_time(1);
  EXPECT_TRUE(bench.device.is_done(event));
}

TEST(SimDeviceTest, AskingDecidesNothingThatTheHostCanStillChange) {
  SimBench bench;
  const StreamId normal = bench.copy_stream(0);
  const StreamId high = bench.copy_stream(-1);
  bench.copy(normal, 100);
  EXPECT_FALSE(bench.device.is_done(bench.record(normal)));
  bench.copy(high, 50);  // at the very moment at which the other became ready
  EXPECT_EQ(bench.copied(50), Interval(0, 50));
  EXPECT_EQ(bench.copied(100), Interval(50, 150));
}

TEST(SimDeviceTest, FillsTakeNoTimeButTheirTurn) {
  SimBench bench;
  bench.compute(kCaller, 1, 100);
  void* const place = bench.device.allocate(256);
  bench.device.fill(kCaller, place, 256, 0xFF, 1);
  const Op& fill = bench.finish().back();
  ASSERT_EQ(fill.kind, OpKind::kFill);
  EXPECT_EQ(fill.begin_ns, 100);
  EXPECT_EQ(fill.end_ns, 100);
}

TEST(SimDeviceTest, PointsTellWhenAStreamCameToThem) {
  SimBench bench;
  const SimDevice::Point start = bench.device.end_of(kCaller);
  bench.compute(kCaller, 1, 100);
  const SimDevice::Point end = bench.device.end_of(kCaller);
  bench.device.spend_host_time(300);
  const SimDevice::Point later = bench.device.end_of(kCaller);
  bench.compute(kCaller, 2, 50);
  EXPECT_EQ(bench.device.time_of(end), 100);
  EXPECT_EQ(bench.device.time_of(start), 0);
  EXPECT_EQ(bench.device.time_of(later), 300);
  EXPECT_EQ(bench.device.host_time_ns(), 300);
  EXPECT_EQ(bench.device.time_of(bench.device.end_of(kCaller)), 350);
  EXPECT_EQ(bench.device.host_time_ns(), 350) << "the host waited for it";
}

TEST(SimDeviceTest, ResetSetsTheClocksBackAndKeepsEventsDone) {
  SimDevice device(costs_by_unit());
  const EventId event = device.create_event();
  device.run(kCaller, 100);
  device.record(event, kCaller);
  EXPECT_THROW(device.reset_clocks(), InternalError) << "the kernel has not ended";
  device.synchronize(kCaller);
  device.reset_clocks();
  EXPECT_EQ(device.host_time_ns(), 0);
  EXPECT_EQ(device.host_blocked_ns(), 0);
  EXPECT_TRUE(device.is_done(event));
  device.wait(kCaller, event);
  device.run(kCaller, 10);
  EXPECT_EQ(device.time_of(device.end_of(kCaller)), 10);
}

TEST(SimDeviceTest, MemoryIsAddressesOnlyAndNeverTheSameTwice) {
  SimDevice device(costs_by_unit());
  constexpr std::size_t kTiB = std::size_t{1} << 40U;
  std::vector<AddressRange> ranges;
  for (const std::size_t size_bytes : {kTiB, std::size_t{1}, kPageBytes, 100 * kTiB}) {
    void* const memory = device.allocate(size_bytes);
    ranges.push_back(AddressRange::of(memory, size_bytes));
    device.free(memory);
    ranges.push_back(AddressRange::of(device.make_host_memory(size_bytes), size_bytes));
  }
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    EXPECT_EQ(ranges[i].begin % kPageBytes, 0U);
    EXPECT_TRUE(i == 0 || ranges[i - 1].end < ranges[i].begin) << "nor do two ranges touch";
  }
  EXPECT_THROW(device.allocate(SIZE_MAX / 2), MemoryError);
  EXPECT_EQ(device.counters().allocated_bytes, 0U);
}

TEST(SimDeviceTest, UnknownStreamsAndUnrecordedEventsThrow) {
  SimDevice device(costs_by_unit());
  EXPECT_THROW(device.run(5, 1), InternalError);
  EXPECT_THROW(device.synchronize(5), InternalError);
  EXPECT_THROW(device.set_current_stream(5), InternalError);
  EXPECT_THROW(device.stream_name(5), InternalError);
  EXPECT_THROW(device.wait(kCaller, device.create_event()), InternalError);
  EXPECT_EQ(device.stream_name(kCaller), "caller");
  EXPECT_EQ(device.current_stream(), kCaller);
}

TEST(SimDeviceTest, LogTellsTheStreamsByName) {
  SimBench bench;
  const StreamId copies = bench.copy_stream();
  bench.copy(copies, 1);
  bench.finish();
  EXPECT_EQ(bench.log.stream_names(), (std::vector<std::string>{"caller", "copies"}));
  EXPECT_TRUE(bench.log.has_times());
}

}  // namespace
}  // namespace torch_offload
