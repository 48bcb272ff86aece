// Each kind of fault, written by hand as the shortest log that has it, and its twin with the one
// edge that was missing.

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "check/hazard_checker.h"
#include "core/error.h"
#include "expect_findings.h"
#include "lanes/log_builder.h"

namespace torch_offload {
namespace {

using lanes::LogBuilder;
using lanes::masters;
using lanes::slices;
using testing::check;
using testing::expect_clean;
using testing::expect_fault;
using testing::kCompute;
using testing::kCopies;
using testing::kFree;
using testing::kReady;

TEST(HazardCheckerTest, ReadBeforeItsCopyIsDone) {
  for (const bool waits : {true, false}) {
    LogBuilder build;
    const std::size_t copy = build.copy(kCopies, slices(0, 2), masters(0, 2), 0, 1);
    const std::size_t record = build.record(kReady, kCopies);
    if (waits) {
      build.wait(kCompute, kReady);
    }
    const std::size_t read = build.read(kCompute, slices(0, 2), 0, 1);
    build.read_end(kCompute, slices(0, 2), 0, 1);
    if (waits) {
      expect_clean(build);
    } else {
      expect_fault(build, FindingKind::kUnordered, copy, read, slices(0, 2),
                   "let stream 'caller' wait for event 0, recorded by op " +
                       std::to_string(record) + ", before op " + std::to_string(read));
    }
  }
}

TEST(HazardCheckerTest, CopyBeforeTheLastReaderIsDone) {
  for (const bool waits : {true, false}) {
    LogBuilder build;
    build.read(kCompute, slices(0, 4), 0);
    const std::size_t end = build.read_end(kCompute, slices(0, 4), 0);
    if (waits) {
      build.record(kFree, kCompute);
      build.wait(kCopies, kFree);
    }
    const std::size_t copy = build.copy(kCopies, slices(2, 4), masters(0, 4), 1, 1);
    if (waits) {
      expect_clean(build);
    } else {
      expect_fault(build, FindingKind::kUnordered, end, copy, slices(2, 2),
                   "record an event on stream 'caller' behind op " + std::to_string(end) +
                       " and let stream 'weight_h2d' wait for it before op " +
                       std::to_string(copy));
    }
  }
}

TEST(HazardCheckerTest, TwoCopiesIntoTheSameBytes) {
  for (const bool waits : {true, false}) {
    LogBuilder build;
    const std::size_t first = build.copy(0, slices(0), masters(0), 0, 1);
    build.record(kReady, 0);
    if (waits) {
      build.wait(1, kReady);
    }
    const std::size_t second = build.copy(1, slices(0), masters(1), 1, 1);
    if (waits) {
      expect_clean(build);
    } else {
      expect_fault(build, FindingKind::kUnordered, first, second, slices(0), "wait for event 0");
    }
  }
}

TEST(HazardCheckerTest, BytesSideBySideAreNoConcern) {
  LogBuilder build;
  build.copy(0, slices(0), masters(0), 0, 1);
  build.copy(1, slices(1), masters(0), 1, 1);
  build.copy(2, slices(2, 0), masters(0, 0), 2, 1);
  expect_clean(build);
}

TEST(HazardCheckerTest, EventRecordedBeforeTheWork) {
  for (const bool in_time : {true, false}) {
    LogBuilder build;
    if (!in_time) {
      build.record(kReady, kCopies);
    }
    const std::size_t copy = build.copy(kCopies, slices(0), masters(0), 0, 1);
    if (in_time) {
      build.record(kReady, kCopies);
    }
    const std::size_t wait = build.wait(kCompute, kReady);
    const std::size_t read = build.read(kCompute, slices(0), 0, 1);
    if (in_time) {
      expect_clean(build);
    } else {
      expect_fault(build, FindingKind::kRecordedTooEarly, copy, read, slices(0),
                   "op " + std::to_string(wait) +
                       " waits for event 0 as op 0 recorded it, before "
                       "the work: record it behind op 1");
    }
  }
}

/// A wait means the record that came last before it, not one to come.
TEST(HazardCheckerTest, EventRecordedAnewAfterTheWait) {
  LogBuilder build;
  build.record(kReady, kCopies);
  const std::size_t copy = build.copy(kCopies, slices(0), masters(0), 0, 1);
  build.wait(kCompute, kReady);
  build.record(kReady, kCopies);
  const std::size_t read = build.read(kCompute, slices(0), 0, 1);
  expect_fault(build, FindingKind::kUnordered, copy, read, slices(0),
               "let stream 'caller' wait for event 0, recorded by op 3");
}

TEST(HazardCheckerTest, WaitOnAnEventNeverRecorded) {
  LogBuilder build;
  const std::size_t wait = build.wait(kCompute, kReady);
  expect_fault(build, FindingKind::kWaitUnrecorded, kNoOp, wait, {}, "record it behind the work");
  const std::size_t record = build.record(kReady, kCopies);
  expect_fault(build, FindingKind::kWaitUnrecorded, record, wait, {}, "before the wait");

  LogBuilder late;  // attached when the event had been recorded already
  late.log.begin({true});
  late.wait(kCompute, kReady);
  expect_clean(late);
}

/// Order goes through any number of streams, and through the host.
TEST(HazardCheckerTest, OrderIsTransitive) {
  for (const bool synchronizes : {true, false}) {
    LogBuilder build;
    build.copy(0, slices(0), masters(0), 0, 1);
    build.record(0, 0);
    build.wait(1, 0);
    build.record(1, 1);
    build.wait(2, 1);
    if (synchronizes) {
      build.synchronize(2);
    } else {
      build.record(2, 2);
      build.wait(3, 2);
    }
    build.read(3, slices(0), 0, 1);
    build.read_end(3, slices(0), 0, 1);
    expect_clean(build);
  }
}

TEST(HazardCheckerTest, SynchronizeOrdersOnlyWhatIsSubmittedLater) {
  for (const bool in_time : {true, false}) {
    LogBuilder build;
    const std::size_t copy = build.copy(kCopies, slices(0), masters(0), 0, 1);
    if (in_time) {
      build.synchronize(kCopies);
    }
    const std::size_t read = build.read(kCompute, slices(0), 0, 1);
    build.synchronize(kCopies);
    if (in_time) {
      expect_clean(build);
    } else {
      expect_fault(build, FindingKind::kUnordered, copy, read, slices(0), "record an event");
    }
  }
}

TEST(HazardCheckerTest, QueryOrdersOnlyIfTheAnswerWasYes) {
  for (const bool is_done : {true, false}) {
    LogBuilder build;
    const std::size_t copy = build.copy(kCopies, slices(0), masters(0), 0, 1);
    build.record(kReady, kCopies);
    build.query(kReady, is_done);
    const std::size_t read = build.host_read(slices(0));
    if (is_done) {
      expect_clean(build);
    } else {
      expect_fault(build, FindingKind::kHostReadInFlight, copy, read, slices(0),
                   "synchronize stream 'weight_h2d' before op 3");
    }
  }
}

/// Kernels may be submitted until the use ends: no event can stand for them before.
TEST(HazardCheckerTest, PlaceOverwrittenWhileItsUnitIsInUse) {
  LogBuilder build;
  const std::size_t read = build.read(kCompute, slices(0, 2), 0);
  build.record(kFree, kCompute);
  build.wait(kCopies, kFree);
  const std::size_t copy = build.copy(kCopies, slices(1, 2), masters(0, 2), 1, 1);
  build.read_end(kCompute, slices(0, 2), 0);
  build.record(kFree, kCompute);
  build.wait(kCopies, kFree);
  build.copy(kCopies, slices(0, 2), masters(0, 2), 1, 2);
  expect_fault(build, FindingKind::kOverwrittenInUse, read, copy, slices(1),
               "submit it after the use has ended");
}

/// A use that has come to a second stream ends where both have ended.
TEST(HazardCheckerTest, UseThatSpreadsToAnotherStream) {
  constexpr StreamId kSide = 2;
  for (const int way : {0, 1, 2, 3}) {
    LogBuilder build;
    build.read(kCompute, slices(0), 0);
    if (way >= 2) {
      build.read(kSide, slices(0), 0);
    }
    const std::size_t side_end =
        way == 3 ? 1 : build.read_end(kSide, slices(0), 0);  // 3: its end is not told
    if (way == 1) {
      build.record(2, kSide);
      build.wait(kCompute, 2);
    }
    build.read_end(kCompute, slices(0), 0);
    build.record(kFree, kCompute);
    build.wait(kCopies, kFree);
    const std::size_t copy = build.copy(kCopies, slices(0), masters(0), 1, 1);
    if (way == 1) {
      expect_clean(build);
    } else {
      expect_fault(build, FindingKind::kUnordered, side_end, copy, slices(0), "stream 2");
    }
  }
}

TEST(HazardCheckerTest, NestedReadsOfOneUseEndWithTheOuterOne) {
  LogBuilder build;
  build.read(kCompute, slices(0), 0);
  build.read(kCompute, slices(0), 0);
  build.read_end(kCompute, slices(0), 0);
  const std::size_t copy = build.copy(kCompute, slices(0), masters(0), 1, 1);
  build.read_end(kCompute, slices(0), 0);
  expect_fault(build, FindingKind::kOverwrittenInUse, 0, copy, slices(0), "after the use");
}

/// All is ordered, and yet the unit's bytes are no longer there.
TEST(HazardCheckerTest, BytesOfAnotherUnit) {
  for (const int way : {0, 1, 2, 3}) {
    LogBuilder build;
    if (way == 3) {
      build.allocate(0, slices(0, 2));
    } else {
      build.copy(0, slices(0, 2), masters(0, 2), 0, 1);
    }
    std::size_t last = 0;
    if (way == 1) {
      last = build.copy(0, slices(1, 2), masters(2, 2), 1, 1);
    } else if (way == 2) {
      last = build.fill(0, slices(1));
    }
    const std::size_t read = build.read(0, slices(0, 2), 0, 1);
    if (way == 0) {
      expect_clean(build);
    } else {
      expect_fault(build, FindingKind::kStale, last, read, way == 3 ? slices(0, 2) : slices(1),
                   "copy the unit into its place before op " + std::to_string(read));
    }
  }
}

/// A unit that stays packed: brought to the device once, and decoded from there again and again.
TEST(HazardCheckerTest, DecodersOfWhatStaysOnTheDevice) {
  enum class Way { kRight, kUnordered, kOfAnotherUnit, kOfAnotherCopy, kReplacedMeanwhile };
  const AddressRange packed = slices(8, 2);
  for (const Way way : {Way::kRight, Way::kUnordered, Way::kOfAnotherUnit, Way::kOfAnotherCopy,
                        Way::kReplacedMeanwhile}) {
    LogBuilder build;
    const std::size_t upload =
        build.copy(kCopies, packed, masters(0, 2), way == Way::kOfAnotherUnit ? 1 : 0,
                   way == Way::kOfAnotherCopy ? 7 : 0);
    if (way != Way::kUnordered) {
      build.synchronize(kCopies);
    }
    std::size_t decode = 0;
    for (const std::uint64_t generation : {1U, 2U}) {
      decode = build.decode(kCompute, slices(0, 3), packed, 0, generation);
      if (way != Way::kRight) {
        break;
      }
      build.read(kCompute, slices(0, 3), 0, generation);
      build.read_end(kCompute, slices(0, 3), 0, generation);
    }
    switch (way) {
      case Way::kRight:
        expect_clean(build);
        break;
      case Way::kUnordered:
        expect_fault(build, FindingKind::kUnordered, upload, decode, packed, "event");
        break;
      case Way::kOfAnotherUnit:
      case Way::kOfAnotherCopy:
        expect_fault(build, FindingKind::kStale, upload, decode, packed, "copy");
        break;
      case Way::kReplacedMeanwhile: {
        const std::size_t again = build.copy(kCopies, packed, masters(0, 2), 0, 0);
        expect_fault(build, FindingKind::kUnordered, decode, again, packed, "event");
        break;
      }
    }
  }
}

TEST(HazardCheckerTest, KernelsThatGoOnOnAStreamThatDoesNotWait) {
  for (const bool waits : {true, false}) {
    LogBuilder build;
    const std::size_t leave = build.leave(kCompute);
    if (waits) {
      build.record(0, kCompute);
      build.wait(2, 0);
    }
    const std::size_t enter = build.enter(2);
    build.leave(2);
    build.record(0, 2);
    build.wait(kCompute, 0);
    build.return_to(kCompute);
    if (waits) {
      expect_clean(build);
    } else {
      expect_fault(build, FindingKind::kHandedOverEarly, leave, enter, {},
                   "record an event on stream 'caller'");
    }
  }
}

TEST(HazardCheckerTest, CallerLeftOnAStreamOfOurs) {
  LogBuilder build;
  const std::size_t leave = build.leave(kCompute);
  build.record(0, kCompute);
  build.wait(2, 0);
  const std::size_t enter = build.enter(2);
  expect_fault(build, FindingKind::kNotReturned, leave, enter, {},
               "make stream 'caller' current again");
  build.read(2, slices(0), 0);
  expect_clean(build);  // the log ends while the unit is in use
}

TEST(HazardCheckerTest, CallerReturnedToAnotherStream) {
  for (const bool is_right : {true, false}) {
    LogBuilder build;
    const std::size_t leave = build.leave(kCompute);
    build.synchronize(kCompute);
    build.enter(2);
    const std::size_t returned = build.return_to(is_right ? kCompute : 3);
    if (is_right) {
      expect_clean(build);
    } else {
      expect_fault(build, FindingKind::kNotReturned, leave, returned, {}, "had left");
    }
  }
}

/// A unit that could not be acquired had no kernels: the caller goes on where it was.
TEST(HazardCheckerTest, ReturnWithoutKernelsNeedsNoOrder) {
  LogBuilder build;
  build.leave(kCompute);
  build.synchronize(kCompute);
  build.enter(2);
  build.leave(3);  // a unit called inside, by a caller who is elsewhere by now
  build.synchronize(3);
  build.enter(4);
  build.leave(4);
  build.synchronize(4);
  build.return_to(3);
  build.return_to(kCompute);
  expect_clean(build);
}

/// A unit may call another, and itself, any number of times.
TEST(HazardCheckerTest, StaysOnStreamsOfOursNest) {
  LogBuilder build;
  for (const int depth : {0, 1, 2, 3}) {
    build.leave(depth == 0 ? kCompute : 2);
    build.synchronize(depth == 0 ? kCompute : 2);
    build.enter(2);
  }
  for (const int depth : {3, 2, 1, 0}) {
    build.leave(2);
    build.synchronize(2);
    build.return_to(depth == 0 ? kCompute : 2);
  }
  expect_clean(build);
}

TEST(HazardCheckerTest, LogThatBeginsInTheMiddleIsJudgedFromThereOn) {
  LogBuilder build;
  build.log.begin({true, true});
  build.read_end(kCompute, slices(0), 0, 7);
  build.return_to(kCompute);
  build.wait(kCompute, kReady);
  build.read(kCompute, slices(1), 1, 4);
  build.read_end(kCompute, slices(1), 1, 4);
  expect_clean(build);
  build.copy(kCopies, slices(0), masters(0), 1, 5);
  EXPECT_EQ(check(build.log).size(), 1U);
}

/// What happened while the log was detached is not known: nothing is concluded across the gap.
TEST(HazardCheckerTest, PartsOfALogAreJudgedApart) {
  for (const bool has_gap : {true, false}) {
    LogBuilder build;
    build.log.begin({});
    const std::size_t copy = build.copy(kCopies, slices(0), masters(0), 0, 1);
    build.record(kReady, kCopies);
    if (has_gap) {
      build.log.begin({true});
    }
    const std::size_t read = build.read(kCompute, slices(0), 0, 1);
    build.wait(kCompute, kReady);
    if (has_gap) {
      expect_clean(build);
    } else {
      expect_fault(build, FindingKind::kUnordered, copy, read, slices(0), "wait for event 0");
    }
  }
}

TEST(HazardCheckerTest, StopsCountingAtItsLimit) {
  LogBuilder build;
  for (StreamId stream = 0; stream < 10; ++stream) {
    build.copy(stream, slices(0), masters(0), 0, 1);
  }
  EXPECT_EQ(HazardChecker().check(build.log).size(), 45U);
  EXPECT_EQ(HazardChecker(7).check(build.log).size(), 7U);
}

TEST(HazardCheckerTest, OpWithoutTheStreamOrEventItNeedsIsRefused) {
  for (const OpKind kind : {OpKind::kCopy, OpKind::kRead, OpKind::kWait, OpKind::kSynchronize,
                            OpKind::kAllocate, OpKind::kEnter}) {
    OpLog log;
    Op op;
    op.kind = kind;
    op.event = 0;
    log.append(op);
    EXPECT_THROW(HazardChecker().check(log), ValueError) << name_of(kind);
  }
  for (const OpKind kind : {OpKind::kRecord, OpKind::kWait, OpKind::kQuery}) {
    for (const EventId event : {kNoEvent, 1U << 30U}) {
      OpLog log;
      Op op;
      op.kind = kind;
      op.stream = 0;
      op.event = event;
      log.append(op);
      EXPECT_THROW(HazardChecker().check(log), ValueError) << name_of(kind);
    }
  }
}

TEST(HazardCheckerTest, EveryKindHasAName) {
  for (int kind = 0; kind <= static_cast<int>(FindingKind::kNotReturned); ++kind) {
    EXPECT_STRNE(name_of(static_cast<FindingKind>(kind)), "?") << kind;
  }
  for (int kind = 0; kind <= static_cast<int>(OpKind::kHostWrite); ++kind) {
    EXPECT_STRNE(name_of(static_cast<OpKind>(kind)), "?") << kind;
  }
}

}  // namespace
}  // namespace torch_offload
