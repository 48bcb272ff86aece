// A log with times on the GPU: what the timing events say against the host's own clock.

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "core/op_log.h"
#include "cuda/cuda_device.h"
#include "cuda_fixture.h"

namespace torch_offload {
namespace {

using testing::CudaDeviceTest;
using testing::Gate;
using testing::kMiB;

constexpr std::int64_t kNsPerMs = 1'000'000;

// How far the two clocks may be apart. What is measured here takes much longer.
constexpr std::int64_t kSlackNs = 2 * kNsPerMs;

// How far two times of the GPU's own may be apart that are the same.
constexpr std::int64_t kTickNs = 5'000;

std::int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

/// Lets time pass that is to be measured.
void spend_ms(std::int64_t duration_ms) {
  const std::int64_t end_ns = now_ns() + duration_ms * kNsPerMs;
  while (now_ns() < end_ns) {
  }
}

class CudaTimesTest : public CudaDeviceTest {
 protected:
  StreamId stream(const char* name, StreamRole role) {
    StreamOptions options;
    options.name = name;
    options.role = role;
    return device_->create_stream(options);
  }
  void read(StreamId stream) {
    device_->begin_read(stream, nullptr, 0, 1, 1);
    device_->end_read(stream, nullptr, 0, 1, 1);
  }

  OpLog log_;
};

TEST_F(CudaTimesTest, TimesTellWhenTheStreamsWereHeld) {
  constexpr std::int64_t kHeldMs = 30;
  const StreamId copies = stream("copies", StreamRole::kCopy);
  const StreamId compute = stream("compute", StreamRole::kCompute);
  const auto arena = sealed_arena(kMiB, std::byte{1});
  void* const place = device_->allocate(kMiB);
  const EventId ready = device_->create_event();
  device_->attach_log(&log_, /*with_times=*/true);
  std::int64_t opened_ns = 0;
  {
    Gate gate(stream_of(copies));
    copy(copies, place, arena->piece_memory(0), kMiB);
    device_->record(ready, copies);
    device_->wait(compute, ready);
    read(compute);
    spend_ms(kHeldMs);
    opened_ns = now_ns();
    gate.open();
  }
  device_->synchronize(compute);
  const std::int64_t end_ns = now_ns();
  device_->attach_log(nullptr);
  device_->free(place);

  ASSERT_TRUE(log_.has_times());
  ASSERT_EQ(log_.ops().size(), 6U);
  const Op& copied = log_.ops()[0];
  EXPECT_GE(copied.begin_ns, opened_ns - kSlackNs);
  EXPECT_GT(copied.end_ns, copied.begin_ns);
  EXPECT_LE(copied.end_ns, end_ns + kSlackNs);
  const Op& recorded = log_.ops()[1];
  EXPECT_EQ(recorded.begin_ns, copied.end_ns) << "nothing lies between them on a copy stream";
  EXPECT_EQ(recorded.end_ns, copied.end_ns);
  const Op& waited = log_.ops()[2];
  EXPECT_LE(waited.begin_ns, opened_ns - kHeldMs * kNsPerMs + kSlackNs);
  EXPECT_GE(waited.end_ns - waited.begin_ns, kHeldMs * kNsPerMs - kSlackNs) << "the stall";
  EXPECT_GE(waited.end_ns, copied.end_ns - kTickNs);
  for (const std::size_t index : {3U, 4U}) {
    EXPECT_EQ(log_.ops()[index].begin_ns, log_.ops()[index].end_ns);
    EXPECT_GE(log_.ops()[index].begin_ns, log_.ops()[index - 1].end_ns - kTickNs);
  }
  const Op& synchronized = log_.ops()[5];
  EXPECT_EQ(synchronized.begin_ns, synchronized.host_time_ns);
  EXPECT_GE(synchronized.end_ns, waited.end_ns - kSlackNs);
  EXPECT_LE(synchronized.end_ns, end_ns);
  EXPECT_EQ(log_.stream_names().at(copies), "copies");
}

TEST_F(CudaTimesTest, CopyOfManyBytesTakesMostOfTheHostsWait) {
  constexpr std::size_t kSize = 512 * kMiB;
  const StreamId copies = stream("copies", StreamRole::kCopy);
  const auto arena = sealed_arena(kSize, std::byte{1});
  void* const place = device_->allocate(kSize);
  copy(copies, place, arena->piece_memory(0), kSize);  // the first one pays for more
  device_->synchronize(copies);
  device_->attach_log(&log_, /*with_times=*/true);
  const std::int64_t begin_ns = now_ns();
  copy(copies, place, arena->piece_memory(0), kSize);
  device_->synchronize(copies);
  const std::int64_t took_ns = now_ns() - begin_ns;
  device_->attach_log(nullptr);
  device_->free(place);
  const Op& copied = log_.ops().at(0);
  EXPECT_GE(copied.end_ns - copied.begin_ns, took_ns / 2);
  EXPECT_LE(copied.end_ns - copied.begin_ns, took_ns);
}

TEST_F(CudaTimesTest, CopyBeginsWhereTheLastOneEndedOrWhenItWasSubmitted) {
  constexpr std::int64_t kPauseMs = 20;
  const StreamId copies = stream("copies", StreamRole::kCopy);
  const auto arena = sealed_arena(kMiB, std::byte{1});
  void* const place = device_->allocate(kMiB);
  device_->attach_log(&log_, /*with_times=*/true);
  {
    Gate gate(stream_of(copies));
    copy(copies, place, arena->piece_memory(0), kMiB);
    copy(copies, place, arena->piece_memory(0), kMiB);
  }
  device_->synchronize(copies);
  spend_ms(kPauseMs);
  copy(copies, place, arena->piece_memory(0), kMiB);
  device_->attach_log(nullptr);
  device_->free(place);
  const std::vector<Op>& ops = log_.ops();
  ASSERT_EQ(ops.size(), 4U);
  EXPECT_EQ(ops[1].begin_ns, ops[0].end_ns);
  EXPECT_GE(ops[3].begin_ns, ops[3].host_time_ns);
  EXPECT_GE(ops[3].begin_ns - ops[1].end_ns, kPauseMs * kNsPerMs - kSlackNs);
}

/// Marks are measured from a mark a second back, and one on another stream may lie before that.
TEST_F(CudaTimesTest, LongLogsKeepTheirPrecisionOnEveryStream) {
  const StreamId held = stream("held", StreamRole::kCompute);
  const StreamId free = stream("free", StreamRole::kCompute);
  device_->attach_log(&log_, /*with_times=*/true);
  std::vector<std::int64_t> opened_ns;
  std::vector<std::int64_t> free_ns;
  for (int round = 0; round < 3; ++round) {
    Gate gate(stream_of(held));
    read(held);
    free_ns.push_back(now_ns());
    read(free);
    spend_ms(1200);
    opened_ns.push_back(now_ns());
    gate.open();
  }
  device_->attach_log(nullptr);
  ASSERT_EQ(log_.ops().size(), 12U);
  for (std::size_t round = 0; round < 3; ++round) {
    EXPECT_NEAR(log_.ops()[4 * round].end_ns, opened_ns[round], kSlackNs);
    EXPECT_NEAR(log_.ops()[4 * round + 2].end_ns, free_ns[round], kSlackNs);
  }
}

TEST_F(CudaTimesTest, MoreMarksThanThePoolKeepsAreStillInOrder) {
  constexpr int kRounds = 30;
  constexpr int kReads = 500;
  const StreamId compute = stream("compute", StreamRole::kCompute);
  for (int attempt = 0; attempt < 2; ++attempt) {
    log_.clear();
    device_->attach_log(&log_, /*with_times=*/true);
    const std::int64_t begin_ns = now_ns();
    for (int round = 0; round < kRounds; ++round) {
      for (int index = 0; index < kReads; ++index) {
        read(compute);
      }
      device_->synchronize(compute);
    }
    const std::int64_t end_ns = now_ns();
    device_->attach_log(nullptr);
    ASSERT_EQ(log_.ops().size(), static_cast<std::size_t>(kRounds * (2 * kReads + 1)));
    std::int64_t last_ns = begin_ns - kSlackNs;
    for (const Op& op : log_.ops()) {
      if (op.kind != OpKind::kSynchronize) {
        ASSERT_GE(op.end_ns, last_ns - kTickNs);
        last_ns = op.end_ns;
      }
    }
    EXPECT_LE(last_ns, end_ns + kSlackNs);
  }
}

TEST_F(CudaTimesTest, LogWithoutTimesMarksNothing) {
  device_->attach_log(&log_);
  read(caller_);
  device_->synchronize(caller_);
  device_->attach_log(nullptr);
  EXPECT_FALSE(log_.has_times());
  for (const Op& op : log_.ops()) {
    EXPECT_EQ(op.begin_ns, kUnknownTime);
    EXPECT_EQ(op.end_ns, kUnknownTime);
  }
}

/// Not a test: prints what marks cost. Run it by name with --gtest_also_run_disabled_tests.
TEST_F(CudaTimesTest, DISABLED_PrintsCostOfAMark) {
  constexpr int kReads = 2000;
  const StreamId compute = stream("compute", StreamRole::kCompute);
  for (const bool with_times : {false, true, true}) {
    log_.clear();
    device_->attach_log(&log_, with_times);
    const std::int64_t begin_ns = now_ns();
    for (int index = 0; index < kReads; ++index) {
      read(compute);
    }
    const std::int64_t submitted_ns = now_ns();
    device_->synchronize(compute);
    const std::int64_t done_ns = now_ns();
    device_->attach_log(nullptr);
    std::printf("times %d: %5lld ns an op to submit, %5lld ns until done, detached in %lld us\n",
                static_cast<int>(with_times),
                static_cast<long long>((submitted_ns - begin_ns) / (2 * kReads)),
                static_cast<long long>((done_ns - begin_ns) / (2 * kReads)),
                static_cast<long long>((now_ns() - done_ns) / 1000));
  }
}

}  // namespace
}  // namespace torch_offload
