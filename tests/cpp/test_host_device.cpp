#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"
#include "host/host_device.h"
#include "pipeline_fixture.h"

namespace torch_offload {
namespace {

using testing::Gate;
using testing::TestDevice;

constexpr StreamId kCaller = HostDevice::kCallerStream;

class HostDeviceTest : public ::testing::Test {
 protected:
  StreamId stream(const std::string& name) {
    return device_.create_stream({name, StreamRole::kCompute, 0});
  }
  /// Queues a step and returns where it tells that it has run.
  std::shared_ptr<bool> queue(StreamId id) {
    auto has_run = std::make_shared<bool>(false);
    device_.run(id, [this, has_run] { device_.step([&] { *has_run = true; }); });
    return has_run;
  }
  /// Whether the stream comes to a halt at `event` before the step has run.
  bool halts_before(StreamId id, EventId event, const std::shared_ptr<bool>& has_run) {
    bool halts = false;
    device_.await([&] {
      halts = device_.blocked_on(id) == event && !*has_run;
      return halts || *has_run;
    });
    return halts;
  }

  TestDevice device_{HostDevice::ComputeStreams::kWorker};
};

TEST_F(HostDeviceTest, OneStreamRunsInTheOrderOfSubmission) {
  const StreamId id = stream("s");
  std::vector<int> order;
  Gate gate;
  gate.hold(device_, id);
  for (int i = 0; i < 100; ++i) {
    device_.run(id, [&order, i] { order.push_back(i); });
  }
  gate.open();
  device_.synchronize(id);
  ASSERT_EQ(order.size(), 100U);
  for (int i = 0; i < 100; ++i) {
    EXPECT_EQ(order[static_cast<std::size_t>(i)], i);
  }
}

TEST_F(HostDeviceTest, WaitHoldsTheWaiterUntilTheRecordIsReached) {
  const StreamId producer = stream("producer");
  const StreamId consumer = stream("consumer");
  const EventId event = device_.create_event();
  Gate gate;
  gate.hold(device_, producer);
  device_.record(event, producer);
  device_.wait(consumer, event);
  const auto has_run = queue(consumer);
  EXPECT_TRUE(halts_before(consumer, event, has_run));
  EXPECT_FALSE(device_.is_done(event));
  gate.open();
  device_.synchronize(consumer);
  EXPECT_TRUE(*has_run);
  EXPECT_TRUE(device_.is_done(event));
}

TEST_F(HostDeviceTest, StreamsDoNotHoldEachOther) {
  const StreamId held = stream("held");
  const StreamId free = stream("free");
  Gate gate;
  gate.hold(device_, held);
  const auto has_run = queue(free);
  device_.synchronize(free);  // would never return if it had to wait for the held one
  EXPECT_TRUE(*has_run);
}

TEST_F(HostDeviceTest, WaitMeansTheLastRecordBeforeItAndNoLaterOne) {
  const StreamId producer = stream("producer");
  const StreamId consumer = stream("consumer");
  const EventId event = device_.create_event();
  device_.record(event, producer);
  device_.wait(consumer, event);
  const auto has_run = queue(consumer);
  Gate gate;
  gate.hold(device_, producer);
  device_.record(event, producer);  // comes after the wait: nobody waits for it
  device_.synchronize(consumer);
  EXPECT_TRUE(*has_run);
  EXPECT_FALSE(device_.is_done(event)) << "the last record is the held one";
}

/// A record that is reached early on one stream says nothing about an earlier record on another.
TEST_F(HostDeviceTest, RecordedAnewOnAFasterStreamTheEarlierWaitStillHolds) {
  const StreamId slow = stream("slow");
  const StreamId fast = stream("fast");
  const StreamId consumer = stream("consumer");
  // Where the event is confused, the consumer is let go and races with the opening of the gate:
  // in so many rounds it wins some.
  for (int round = 0; round < 200; ++round) {
    const EventId event = device_.create_event();
    Gate gate;
    bool producer_has_run = false;
    bool consumer_was_right = false;
    gate.hold(device_, slow);
    device_.run(slow, [&] { device_.step([&] { producer_has_run = true; }); });
    device_.record(event, slow);
    device_.wait(consumer, event);
    device_.run(consumer, [&] { device_.step([&] { consumer_was_right = producer_has_run; }); });
    device_.await([&] { return device_.blocked_on(consumer) == event; });
    device_.record(event, fast);
    device_.synchronize(fast);
    ASSERT_TRUE(device_.is_done(event)) << "as recorded last";
    gate.open();
    device_.synchronize(slow);
    device_.synchronize(consumer);
    ASSERT_TRUE(consumer_was_right) << "round " << round;
  }
}

TEST_F(HostDeviceTest, InlineStreamsRunAtOnceOnTheCallingThread) {
  HostDevice device;  // compute streams are inline
  const StreamId compute = device.create_stream({"compute", StreamRole::kCompute, 0});
  for (const StreamId id : {kCaller, compute}) {
    std::thread::id ran_on;
    device.run(id, [&] { ran_on = std::this_thread::get_id(); });
    EXPECT_EQ(ran_on, std::this_thread::get_id());
    const EventId event = device.create_event();
    device.record(event, id);
    EXPECT_TRUE(device.is_done(event));
  }
  const StreamId copy = device.create_stream({"copy", StreamRole::kCopy, 0});
  std::thread::id ran_on;
  device.run(copy, [&] { ran_on = std::this_thread::get_id(); });
  device.synchronize(copy);
  EXPECT_NE(ran_on, std::this_thread::get_id());
}

TEST_F(HostDeviceTest, WaitOnTheCallerStreamBlocksAndIsCounted) {
  const StreamId producer = stream("producer");
  const EventId event = device_.create_event();
  device_.record(event, producer);
  device_.synchronize(producer);
  device_.wait(kCaller, event);
  EXPECT_EQ(device_.counters().caller_waits, 0U) << "it was done: nothing had to be waited for";

  // The gate may be open a moment before the wait looks: not every round has to wait, nearly all
  // do.
  constexpr int kRounds = 50;
  for (int round = 0; round < kRounds; ++round) {
    Gate gate;
    gate.hold(device_, producer);
    const auto has_run = queue(producer);
    device_.record(event, producer);
    std::thread opener([&] {
      device_.await([&] { return device_.blocked_on(kCaller) == event; });
      gate.open();
    });
    device_.wait(kCaller, event);
    EXPECT_TRUE(*has_run);
    opener.join();
  }
  EXPECT_GE(device_.counters().caller_waits, 1U);
  EXPECT_LE(device_.counters().caller_waits, static_cast<std::uint64_t>(kRounds));
  EXPECT_EQ(device_.counters().host_synchronizes, 1U) << "a wait is no synchronize";
}

TEST_F(HostDeviceTest, CurrentStreamIsTheCallersUnlessSet) {
  EXPECT_EQ(device_.current_stream(), kCaller);
  const StreamId id = stream("mine");
  device_.set_current_stream(id);
  EXPECT_EQ(device_.current_stream(), id);
  EXPECT_THROW(device_.set_current_stream(id + 1), InternalError);
  EXPECT_EQ(device_.current_stream(), id);
}

TEST_F(HostDeviceTest, NamesOutliveTheMakingOfMoreStreams) {
  const std::string& name = device_.stream_name(stream("first"));
  for (int i = 0; i < 20; ++i) {
    stream("another");
  }
  EXPECT_EQ(name, "first");
  EXPECT_EQ(device_.stream_name(kCaller), "caller");
  EXPECT_THROW(device_.stream_name(1000), InternalError);
}

TEST_F(HostDeviceTest, DestructorRunsWhatIsQueued) {
  std::atomic<int> runs{0};
  {
    HostDevice device(HostDevice::ComputeStreams::kWorker);
    const StreamId first = device.create_stream({"first", StreamRole::kCopy, 0});
    const StreamId second = device.create_stream({"second", StreamRole::kCompute, 0});
    const EventId event = device.create_event();
    Gate gate;
    gate.hold(device, second);
    device.record(event, second);
    device.wait(first, event);
    for (const StreamId id : {first, second}) {
      device.run(id, [&] { ++runs; });
    }
    gate.open();
  }
  EXPECT_EQ(runs, 2);
}

TEST_F(HostDeviceTest, CopyAndFillWriteExactlyTheirRange) {
  alignas(4096) std::array<std::byte, 4096> source{};
  std::array<std::byte, 64> place{};
  source.fill(std::byte{7});
  const StreamId id = stream("copies");
  device_.register_host(source.data(), source.size());
  device_.copy(id, {place.data() + 8, source.data(), 16, 0, 1});
  device_.fill(id, place.data() + 32, 8, 0xFF, 0);
  device_.synchronize(id);
  for (std::size_t i = 0; i < place.size(); ++i) {
    const bool copied = i >= 8 && i < 24;
    const bool filled = i >= 32 && i < 40;
    EXPECT_EQ(std::to_integer<int>(place[i]), copied ? 7 : (filled ? 0xFF : 0)) << i;
  }
  device_.unregister_host(source.data());
}

/// The threads do not exist in a forked child: joining them there would never end.
TEST_F(HostDeviceTest, ForkedChildLeavesTheThreadsAlone) {
  auto device = std::make_unique<HostDevice>(HostDevice::ComputeStreams::kWorker);
  const StreamId id = device->create_stream({"held", StreamRole::kCopy, 0});
  Gate gate;
  gate.hold(*device, id);
  EXPECT_FALSE(device->in_forked_child());
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(20);  // a hang ends the child by signal
    const bool knows = device->in_forked_child();
    device.reset();
    _exit(knows ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << "ended by signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0);
  gate.open();
  device->synchronize(id);
}

}  // namespace
}  // namespace torch_offload
