// Faults of memory and of the host's own accesses, each with its clean twin; as
// test_hazard_checker.cpp.

#include <gtest/gtest.h>

#include "expect_findings.h"
#include "lanes/log_builder.h"

namespace torch_offload {
namespace {

using lanes::LogBuilder;
using lanes::masters;
using lanes::slices;
using testing::expect_clean;
using testing::expect_fault;
using testing::kCompute;
using testing::kCopies;
using testing::kFree;

TEST(HazardMemoryTest, HostReadsWhatACopyMayStillWrite) {
  for (const bool waits : {true, false}) {
    LogBuilder build;
    const std::size_t copy = build.copy(kCopies, masters(0), slices(0), 0, 1);
    if (waits) {
      build.synchronize(kCopies);
    }
    const std::size_t read = build.host_read(masters(0));
    if (waits) {
      expect_clean(build);
    } else {
      expect_fault(build, FindingKind::kHostReadInFlight, copy, read, masters(0), "synchronize");
    }
  }
}

TEST(HazardMemoryTest, HostWritesAMasterThatACopyMayStillRead) {
  for (const bool waits : {true, false}) {
    LogBuilder build;
    build.host_write(masters(0, 2));
    const std::size_t copy = build.copy(kCopies, slices(0, 2), masters(0, 2), 0, 1);
    if (waits) {
      build.synchronize(kCopies);
    }
    const std::size_t write = build.host_write(masters(1));
    if (waits) {
      expect_clean(build);
    } else {
      expect_fault(build, FindingKind::kHostWriteInFlight, copy, write, masters(1), "synchronize");
    }
  }
}

TEST(HazardMemoryTest, HostReadsAMasterBesideTheCopy) {
  LogBuilder build;
  build.copy(kCopies, slices(0), masters(0), 0, 1);
  build.host_read(masters(0));
  expect_clean(build);
}

TEST(HazardMemoryTest, MemoryGivenUpInFlight) {
  for (const bool waits : {true, false}) {
    LogBuilder build;
    const std::size_t copy = build.copy(kCopies, slices(0), masters(0), 0, 1);
    if (waits) {
      build.synchronize(kCopies);
    }
    const std::size_t give_up =
        waits ? build.free(slices(0, 3)) : build.unregister_host(masters(0, 3));
    if (waits) {
      expect_clean(build);
    } else {
      expect_fault(build, FindingKind::kFreedInFlight, copy, give_up, masters(0),
                   "synchronize stream 'weight_h2d'");
    }
  }
}

TEST(HazardMemoryTest, MemoryFreedWhileAUnitIsInUse) {
  LogBuilder build;
  const std::size_t read = build.read(kCompute, slices(0), 0);
  const std::size_t free = build.free(slices(0));
  build.read_end(kCompute, slices(0), 0);
  expect_fault(build, FindingKind::kFreedInFlight, read, free, slices(0),
               "end the use and synchronize stream 'caller'");
}

TEST(HazardMemoryTest, MemoryTouchedAfterItWasGivenUp) {
  for (const bool again : {true, false}) {
    LogBuilder build;
    build.allocate(kCopies, slices(0));
    const std::size_t free = build.free(slices(0));
    if (again) {
      build.allocate(kCopies, slices(0));
    }
    const std::size_t copy = build.copy(kCopies, slices(0), masters(0), 0, 1);
    if (again) {
      expect_clean(build);
    } else {
      expect_fault(build, FindingKind::kUsedAfterFree, free, copy, slices(0), "give the memory up");
    }
  }
  for (const bool again : {true, false}) {
    LogBuilder build;
    const std::size_t unregister = build.unregister_host(masters(0));
    if (again) {
      build.register_host(masters(0));
    }
    const std::size_t copy = build.copy(kCopies, slices(0), masters(0), 0, 1);
    if (again) {
      expect_clean(build);
    } else {
      expect_fault(build, FindingKind::kUsedAfterFree, unregister, copy, masters(0), "give the");
    }
  }
}

/// An allocator hands out memory behind the kernels of the stream that asked, and of no other.
TEST(HazardMemoryTest, MemoryOfTheAllocatorUsedOnAnotherStream) {
  for (const int way : {0, 1, 2}) {
    LogBuilder build;
    const std::size_t allocate = build.allocate(kCompute, slices(0));
    if (way == 1) {
      build.synchronize(kCompute);
    } else if (way == 2) {
      build.record(kFree, kCompute);
      build.wait(kCopies, kFree);
    }
    const std::size_t copy = build.copy(kCopies, slices(0), masters(0), 0, 1);
    if (way == 0) {
      expect_fault(build, FindingKind::kReusedInFlight, allocate, copy, slices(0),
                   "record an event on stream 'caller'");
    } else {
      expect_clean(build);
    }
  }
}

TEST(HazardMemoryTest, MemoryHandedOutAgainInFlight) {
  LogBuilder build;
  const std::size_t copy = build.copy(kCopies, slices(0), masters(0), 0, 1);
  const std::size_t allocate = build.allocate(kCompute, slices(0));
  expect_fault(build, FindingKind::kReusedInFlight, copy, allocate, slices(0), "record an event");
}

}  // namespace
}  // namespace torch_offload
