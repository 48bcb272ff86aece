#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <vector>

#include "core/device.h"
#include "core/error.h"
#include "host/host_device.h"

namespace torch_offload {
namespace {

constexpr std::size_t kPageBytes = 4096;

/// The half of Device that all devices share, seen through the simplest one.
class DeviceTest : public ::testing::Test {
 protected:
  alignas(kPageBytes) std::array<std::byte, 4 * kPageBytes> host_{};
  std::array<std::byte, 2 * kPageBytes> place_{};
  OpLog log_;
  HostDevice device_;
  StreamId stream_ = device_.create_stream({"copies", StreamRole::kCopy, -1});

  ~DeviceTest() override { device_.synchronize(stream_); }

  void copy(std::size_t begin, std::size_t size_bytes) {
    device_.copy(stream_, {place_.data(), host_.data() + begin, size_bytes, 7, 3});
  }
};

TEST_F(DeviceTest, WaitAndQueryOfAnEventNeverRecordedThrow) {
  const EventId event = device_.create_event();
  EXPECT_THROW(device_.wait(stream_, event), InternalError);
  EXPECT_THROW(device_.is_done(event), InternalError);
  EXPECT_THROW(device_.wait(stream_, event + 1), InternalError);
  EXPECT_EQ(device_.counters().waits, 0U);
  device_.record(event, stream_);
  EXPECT_NO_THROW(device_.wait(stream_, event));
}

TEST_F(DeviceTest, CopyFromMemoryThatIsNotRegisteredThrows) {
  EXPECT_THROW(copy(0, 1), ValueError);
  device_.register_host(host_.data(), kPageBytes);
  EXPECT_NO_THROW(copy(0, kPageBytes));
  EXPECT_NO_THROW(copy(kPageBytes - 1, 1));
  EXPECT_THROW(copy(kPageBytes - 1, 2), ValueError) << "ends outside";
  EXPECT_THROW(copy(kPageBytes, 1), ValueError) << "begins where the registration ends";
  device_.synchronize(stream_);
  device_.unregister_host(host_.data());
  EXPECT_THROW(copy(0, 1), ValueError) << "not registered any more";
  EXPECT_EQ(device_.counters().copies, 2U);
}

TEST_F(DeviceTest, CopyThatCrossesFromOneRegistrationIntoAnotherThrows) {
  device_.register_host(host_.data(), kPageBytes);
  device_.register_host(host_.data() + kPageBytes, kPageBytes);
  EXPECT_NO_THROW(copy(0, kPageBytes));
  EXPECT_NO_THROW(copy(kPageBytes, kPageBytes));
  EXPECT_THROW(copy(kPageBytes / 2, kPageBytes), ValueError);
  device_.synchronize(stream_);
  device_.unregister_host(host_.data());
  device_.unregister_host(host_.data() + kPageBytes);
}

TEST_F(DeviceTest, RegisteringAByteTwiceThrowsAndChangesNothing) {
  device_.register_host(host_.data() + kPageBytes, kPageBytes);
  for (const auto& [begin_page, num_pages] : {std::pair{1U, 1U}, {0U, 2U}, {0U, 4U}, {1U, 2U}}) {
    EXPECT_THROW(
        device_.register_host(host_.data() + begin_page * kPageBytes, num_pages * kPageBytes),
        InternalError);
  }
  EXPECT_EQ(device_.counters().registrations, 1U);
  EXPECT_EQ(device_.counters().registered_bytes, kPageBytes);
  device_.register_host(host_.data(), kPageBytes);
  device_.register_host(host_.data() + 2 * kPageBytes, kPageBytes);
  for (const std::size_t page : {0U, 1U, 2U}) {
    device_.unregister_host(host_.data() + page * kPageBytes);
  }
  EXPECT_EQ(device_.counters().registrations, 0U);
  EXPECT_EQ(device_.counters().registered_bytes, 0U);
}

TEST_F(DeviceTest, ReadOnlyRangesAreRegisteredAllOrNone) {
  std::vector<AddressRange> ranges;
  for (std::size_t page = 0; page < 4; ++page) {
    ranges.push_back(AddressRange::of(host_.data() + page * kPageBytes, kPageBytes));
  }
  std::atomic<int> prepared{0};
  const auto refuse_the_third = [&](const AddressRange& range) {
    if (range.begin == ranges[2].begin) {
      throw StateError("cannot be read");
    }
    ++prepared;
  };
  EXPECT_THROW(device_.register_read_only(ranges, refuse_the_third), StateError);
  EXPECT_EQ(device_.counters().registrations, 0U);
  EXPECT_THROW(copy(0, 1), ValueError);
  prepared = 0;
  device_.register_read_only(ranges, [&](const AddressRange&) { ++prepared; });
  EXPECT_EQ(prepared, 4);
  EXPECT_EQ(device_.counters().registrations, 4U);
  EXPECT_EQ(device_.counters().registered_bytes, 4 * kPageBytes);
  EXPECT_NO_THROW(copy(0, 1));
  EXPECT_THROW(copy(kPageBytes - 1, 2), ValueError) << "each is a registration of its own";
  EXPECT_THROW(device_.register_read_only({ranges[3]}, refuse_the_third), InternalError);
}

TEST_F(DeviceTest, UnregisterOrFreeOfUnknownMemoryThrows) {
  EXPECT_THROW(device_.unregister_host(host_.data()), InternalError);
  EXPECT_THROW(device_.free(host_.data()), InternalError);
}

TEST_F(DeviceTest, AllocationsAreAlignedAndCounted) {
  std::vector<void*> blocks;
  std::size_t bytes = 0;
  for (const std::size_t size_bytes : {1U, 255U, 256U, 1000U}) {
    blocks.push_back(device_.allocate(size_bytes));
    bytes += size_bytes;
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(blocks.back()) % kAlignmentBytes, 0U);
  }
  EXPECT_EQ(device_.counters().allocations, 4U);
  EXPECT_EQ(device_.counters().allocated_bytes, bytes);
  for (void* block : blocks) {
    device_.free(block);
  }
  EXPECT_EQ(device_.counters().allocated_bytes, 0U);
  EXPECT_EQ(device_.counters().allocations, 4U) << "allocations are counted, not those live";
}

TEST_F(DeviceTest, CountersCountWhatWasSubmitted) {
  const EventId event = device_.create_event();
  device_.register_host(host_.data(), kPageBytes);
  copy(0, 100);
  copy(100, 28);
  device_.record(event, stream_);
  device_.wait(HostDevice::kCallerStream, event);
  device_.synchronize(stream_);
  const DeviceCounters& counters = device_.counters();
  EXPECT_EQ(counters.copies, 2U);
  EXPECT_EQ(counters.bytes_copied, 128U);
  EXPECT_EQ(counters.records, 1U);
  EXPECT_EQ(counters.waits, 1U);
  EXPECT_EQ(counters.host_synchronizes, 1U);
  EXPECT_LE(counters.caller_waits, 1U);
  device_.unregister_host(host_.data());
}

TEST_F(DeviceTest, LogHoldsEveryCallWithItsRanges) {
  const EventId event = device_.create_event();
  device_.attach_log(&log_);
  device_.register_host(host_.data(), kPageBytes);
  void* block = device_.allocate(512);
  device_.copy(stream_, {block, host_.data() + 16, 512, 7, 3});
  device_.record(event, stream_);
  device_.wait(HostDevice::kCallerStream, event);
  device_.begin_read(HostDevice::kCallerStream, block, 512, 7, 3);
  device_.end_read(HostDevice::kCallerStream, block, 512, 7, 3);
  device_.leave_stream(HostDevice::kCallerStream);
  device_.enter_stream(stream_);
  device_.return_to_stream(HostDevice::kCallerStream);
  device_.synchronize(stream_);
  device_.is_done(event);
  device_.fill(stream_, block, 512, 0xFF, 7);
  device_.synchronize(stream_);
  device_.host_read(host_.data(), 8, 7);
  device_.host_write(host_.data(), 8, 7);
  device_.free(block);
  device_.unregister_host(host_.data());
  device_.attach_log(nullptr);
  device_.synchronize(stream_);

  std::vector<OpKind> kinds;
  std::int64_t last_ns = 0;
  for (const Op& op : log_.ops()) {
    kinds.push_back(op.kind);
    EXPECT_GE(op.host_time_ns, last_ns);
    last_ns = op.host_time_ns;
  }
  EXPECT_EQ(kinds,
            (std::vector<OpKind>{
                OpKind::kRegister, OpKind::kAllocate, OpKind::kCopy, OpKind::kRecord, OpKind::kWait,
                OpKind::kRead, OpKind::kReadEnd, OpKind::kLeave, OpKind::kEnter, OpKind::kReturn,
                OpKind::kSynchronize, OpKind::kQuery, OpKind::kFill, OpKind::kSynchronize,
                OpKind::kHostRead, OpKind::kHostWrite, OpKind::kFree, OpKind::kUnregister}));
  const Op& copy = log_.ops()[2];
  EXPECT_EQ(copy.stream, stream_);
  EXPECT_EQ(copy.unit, 7U);
  EXPECT_EQ(copy.generation, 3U);
  EXPECT_EQ(copy.memory.begin, reinterpret_cast<std::uintptr_t>(block));
  EXPECT_EQ(copy.memory.size_bytes(), 512U);
  EXPECT_EQ(copy.source.begin, reinterpret_cast<std::uintptr_t>(host_.data() + 16));
  EXPECT_EQ(copy.source.size_bytes(), 512U);
  EXPECT_EQ(log_.ops()[3].event, event);
  EXPECT_EQ(log_.ops()[4].stream, HostDevice::kCallerStream);
  EXPECT_EQ(log_.ops()[1].stream, HostDevice::kCallerStream) << "whose kernels may still use it";
  EXPECT_EQ(log_.ops()[8].stream, stream_);
  EXPECT_TRUE(log_.ops()[11].is_done);
}

TEST_F(DeviceTest, EnteringAndReturningChangeTheCurrentStream) {
  device_.leave_stream(device_.current_stream());
  EXPECT_EQ(device_.current_stream(), HostDevice::kCallerStream);
  device_.enter_stream(stream_);
  EXPECT_EQ(device_.current_stream(), stream_);
  device_.return_to_stream(HostDevice::kCallerStream);
  EXPECT_EQ(device_.current_stream(), HostDevice::kCallerStream);
}

TEST_F(DeviceTest, LogKnowsWhereItBeginsAndWhatWasRecordedBefore) {
  const EventId before = device_.create_event();
  device_.create_event();
  device_.record(before, stream_);
  device_.attach_log(&log_);
  device_.synchronize(stream_);
  device_.attach_log(nullptr);
  device_.attach_log(&log_);
  device_.attach_log(nullptr);
  ASSERT_EQ(log_.beginnings().size(), 2U);
  EXPECT_EQ(log_.beginnings()[0].op_index, 0U);
  EXPECT_EQ(log_.beginnings()[1].op_index, 1U);
  EXPECT_EQ(log_.beginnings()[1].recorded, (std::vector<bool>{true, false}));
}

TEST_F(DeviceTest, WhatWasRefusedIsNeitherCountedNorLogged) {
  device_.attach_log(&log_);
  EXPECT_THROW(copy(0, 1), ValueError);
  EXPECT_THROW(device_.wait(stream_, device_.create_event()), InternalError);
  EXPECT_TRUE(log_.ops().empty());
  EXPECT_EQ(device_.counters().copies + device_.counters().waits, 0U);
  device_.attach_log(nullptr);
}

}  // namespace
}  // namespace torch_offload
