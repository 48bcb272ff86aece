// Steps that are taken, but at the wrong moment: each record before what it is to cover, each wait
// behind what it is to hold back. Some make no difference, as another step keeps that order as
// well; which ones is decided by searching the log for a way from one op to the other.

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "check/hazard_checker.h"
#include "lanes/brute_force.h"
#include "lanes/log_builder.h"
#include "lanes/moved_steps.h"
#include "lanes/mutant_run.h"
#include "lanes/mutant_schedules.h"

namespace torch_offload {

namespace {

using lanes::all_schedules;
using lanes::Answer;
using lanes::Choice;
using lanes::disagreements;
using lanes::log_of;
using lanes::moved;
using lanes::Schedule;
using lanes::without_kernels;
using lanes::wrong_place;

/// What comes before what in a log, by following its edges one after the other.
class Reachability {
 public:
  explicit Reachability(const OpLog& log) : ops_(log.ops()) {
    for (std::size_t i = 0; i < ops_.size(); ++i) {
      std::vector<bool> before(ops_.size(), false);
      for (const std::size_t j : needs(i)) {
        before[j] = true;
        for (std::size_t k = 0; k < j; ++k) {
          before[k] = before[k] || before_[j][k];
        }
      }
      before_.push_back(before);
    }
  }

  bool always_before(std::size_t first, std::size_t second) const { return before_[second][first]; }

  /// Of logs without a race, in which all orders leave the same bytes.
  bool finds_other_bytes(std::size_t read) const {
    const Op& op = ops_[read];
    if ((op.kind != OpKind::kRead && op.kind != OpKind::kDecode) || op.generation == 0) {
      return false;
    }
    const AddressRange& memory = op.kind == OpKind::kRead ? op.memory : op.source;
    std::map<std::uintptr_t, const Op*> contents;
    for (std::size_t i = 0; i < read; ++i) {
      const OpKind kind = ops_[i].kind;
      if (is_onload(kind) || kind == OpKind::kFill || kind == OpKind::kAllocate) {
        for (std::uintptr_t at = ops_[i].memory.begin; at < ops_[i].memory.end;
             at += kAlignmentBytes) {
          contents[at] = &ops_[i];
        }
      }
    }
    for (std::uintptr_t at = memory.begin; at < memory.end; at += kAlignmentBytes) {
      const Op* writer = contents[at];
      // What stays packed on the device was copied for every generation.
      const bool stays =
          op.kind == OpKind::kDecode && writer->kind == OpKind::kCopy && writer->generation == 0;
      if (!is_onload(writer->kind) || writer->unit != op.unit ||
          (writer->generation != op.generation && !stays)) {
        return true;
      }
    }
    return false;
  }
  bool meets_given_up_memory(std::size_t /*op*/) const { return false; }  // only at the very end

 private:
  static bool is_of_stream(const Op& op) {
    return op.stream != kNoStream && op.kind != OpKind::kSynchronize;
  }

  std::vector<std::size_t> needs(std::size_t i) const {
    const Op& op = ops_[i];
    std::vector<std::size_t> needed;
    for (std::size_t j = 0; j < i; ++j) {
      const Op& earlier = ops_[j];
      const bool is_of_same_stream = is_of_stream(earlier) && earlier.stream == op.stream;
      if (!is_of_stream(earlier) || is_of_same_stream) {
        needed.push_back(j);
      }
    }
    for (std::size_t j = i; op.kind == OpKind::kWait && j-- > 0;) {
      if (ops_[j].kind == OpKind::kRecord && ops_[j].event == op.event) {
        needed.push_back(j);
        break;
      }
    }
    return needed;
  }

  const std::vector<Op>& ops_;
  std::vector<std::vector<bool>> before_;
};

TEST(MovedStepsTest, AreNoticedUnlessAnotherKeepsTheOrder) {
  HazardChecker checker(100'000);
  std::map<OpKind, int> num_moved;
  std::map<OpKind, int> num_noticed;
  for (const Schedule& schedule : all_schedules()) {
    if (!schedule.runs_in_turn || schedule.may_fail || schedule.files.are_used) {
      continue;  // uses of several streams, and pages given up: the brute force knows of neither
    }
    const std::vector<Op> ops = without_kernels(run(schedule, Choice{}).log.ops());
    ASSERT_TRUE(checker.check(log_of(ops)).empty());
    for (std::size_t i = 0; i < ops.size(); ++i) {
      const OpKind kind = ops[i].kind;
      if (kind != OpKind::kRecord && kind != OpKind::kWait && kind != OpKind::kSynchronize) {
        continue;
      }
      const OpLog log = log_of(moved(ops, i, wrong_place(ops, i)));
      const std::vector<Finding>& findings = checker.check(log);
      ASSERT_EQ(disagreements(Answer(findings), log, Reachability(log)), "")
          << schedule.name << ", op " << i << ", a " << name_of(kind);
      ++num_moved[kind];
      num_noticed[kind] += findings.empty() ? 0 : 1;
    }
  }
  for (const auto& [kind, count] : num_moved) {
    std::printf("%s: %d of %d noticed, the others are kept by another\n", name_of(kind),
                num_noticed[kind], count);
    EXPECT_GT(count, 50);
    EXPECT_GT(num_noticed[kind] * 4, count);
  }
  EXPECT_EQ(num_moved.size(), 3U);
}

}  // namespace
}  // namespace torch_offload
