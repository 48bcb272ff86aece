// What the checker keeps of a log, as words: two logs with equal words go on alike.

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdio>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "check/hazard_checker.h"
#include "core/error.h"
#include "lanes/log_builder.h"

namespace torch_offload {
namespace {

using lanes::LogBuilder;
using lanes::masters;
using lanes::slices;

constexpr StreamId kNumStreams = 3;
constexpr EventId kNumEvents = 3;
constexpr UnitIndex kNumUnits = 2;  // each in a slice of its own, and in one that they share

/// A few calls that a pipeline may make, whichever come.
class Calls {
 public:
  explicit Calls(std::uint32_t seed, int count) {
    std::mt19937 random(seed);
    for (int i = 0; i < count; ++i) {
      calls_.push_back({static_cast<int>(random() % 10),
                        static_cast<StreamId>(random()) % kNumStreams,
                        static_cast<EventId>(random()) % kNumEvents,
                        static_cast<UnitIndex>(random()) % kNumUnits, random() % 3});
    }
  }

  /// Behind what is there; units were copied so often before.
  void append_to(LogBuilder& build, std::vector<std::uint64_t>& generations) const {
    for (const Call& call : calls_) {
      const AddressRange place = slices(call.slice);
      switch (call.kind) {
        case 0:
        case 1:
          build.copy(call.stream, place, masters(call.unit), call.unit, ++generations[call.unit]);
          break;
        case 2:
        case 3:
          build.read(call.stream, place, call.unit, generations[call.unit]);
          build.read_end(call.stream, place, call.unit, generations[call.unit]);
          break;
        case 4:
          build.record(call.event, call.stream);
          break;
        case 5:
        case 6:
          build.wait(call.stream, call.event);
          break;
        case 7:
          build.host_write(masters(call.unit));
          break;
        case 8:
          build.host_read(place);
          break;
        default:
          build.synchronize(call.stream);
          break;
      }
    }
  }

 private:
  struct Call {
    int kind;
    StreamId stream;
    EventId event;
    UnitIndex unit;
    std::size_t slice;
  };
  std::vector<Call> calls_;
};

StateScope scope_of(const std::vector<std::uint64_t>& generations) {
  return {{0, 1, 2}, {0, 1, 2}, generations};
}

bool is_clean(const Calls& first, const Calls& second) {
  LogBuilder build;
  std::vector<std::uint64_t> generations(kNumUnits, 0);
  first.append_to(build, generations);
  second.append_to(build, generations);
  return HazardChecker(1).check(build.log).empty();
}

/// How many of some continuations are clean behind one of the beginnings only.
int num_told_apart(const Calls& one, const Calls& other, std::uint32_t seed) {
  int count = 0;
  for (std::uint32_t i = 0; i < 12; ++i) {
    const Calls rest(seed * 100 + i, 5);
    count += is_clean(one, rest) == is_clean(other, rest) ? 0 : 1;
  }
  return count;
}

TEST(CheckerStateTest, LogsWithEqualWordsGoOnAlike) {
  std::map<StateWords, std::uint32_t> first_with;
  int num_merged = 0;
  int num_different = 0;
  std::uint32_t last_seed = 0;
  for (std::uint32_t seed = 1; num_merged < 3000; ++seed) {
    const Calls calls(seed, 6);
    LogBuilder build;
    std::vector<std::uint64_t> generations(kNumUnits, 0);
    calls.append_to(build, generations);
    HazardChecker checker;
    if (!checker.check(build.log).empty()) {
      continue;
    }
    StateWords words;
    checker.append_state(scope_of(generations), words);
    const auto [found, is_new] = first_with.try_emplace(words, seed);
    if (!is_new) {
      ++num_merged;
      ASSERT_EQ(num_told_apart(Calls(found->second, 6), calls, seed), 0)
          << "beginnings " << found->second << " and " << seed;
    } else if (last_seed != 0) {
      num_different += num_told_apart(Calls(last_seed, 6), calls, seed) > 0 ? 1 : 0;
    }
    last_seed = seed;
  }
  // The control: most logs with other words are told apart by a few continuations.
  EXPECT_GT(static_cast<std::size_t>(num_different) * 2, first_with.size());
  std::printf("%d merged into %zu states\n", num_merged, first_with.size());
}

TEST(CheckerStateTest, WordsDoNotDependOnHowOftenItHasGoneThatWay) {
  std::vector<StateWords> states;
  for (const int rounds : {1, 2, 7}) {
    LogBuilder build;
    std::vector<std::uint64_t> generations(kNumUnits, 0);
    for (int i = 0; i < rounds; ++i) {
      build.copy(0, slices(0), masters(0), 0, ++generations[0]);
      build.record(0, 0);
      build.wait(1, 0);
      build.read(1, slices(0), 0, generations[0]);
      build.read_end(1, slices(0), 0, generations[0]);
      build.record(1, 1);
      build.wait(0, 1);
    }
    HazardChecker checker;
    ASSERT_TRUE(checker.check(build.log).empty());
    StateWords words;
    checker.append_state({{0, 1}, {0, 1}, generations}, words);
    states.push_back(words);
  }
  EXPECT_EQ(states[0], states[1]);
  EXPECT_EQ(states[0], states[2]);
}

TEST(CheckerStateTest, StateInTheMidstOfAUseOrOutOfScopeIsRefused) {
  LogBuilder build;
  build.read(1, slices(0), 0, 0);
  HazardChecker checker;
  StateWords words;
  checker.check(build.log);
  EXPECT_THROW(checker.append_state({{0, 1}, {}, {0}}, words), InternalError);
  build.read_end(1, slices(0), 0, 0);
  checker.check(build.log);
  EXPECT_THROW(checker.append_state({{0}, {}, {0}}, words), InternalError);
  EXPECT_NO_THROW(checker.append_state({{0, 1}, {}, {0}}, words));
  build.free(slices(0));
  checker.check(build.log);
  EXPECT_THROW(checker.append_state({{0, 1}, {}, {0}}, words), InternalError);
}

}  // namespace
}  // namespace torch_offload
