#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <unordered_set>
#include <vector>

#include "check/hazard_checker.h"
#include "core/op_log.h"

namespace torch_offload {

/// How many faults a report gives as examples.
constexpr std::size_t kMaxExamples = 5;

/// What a lane has tried: schedules of the real pipeline, each with its log checked.
struct LaneReport {
  std::uint64_t num_schedules = 0;
  std::uint64_t num_distinct = 0;  ///< By the hash of their logs; 0 where each is so by its making.
  std::uint64_t num_ops = 0;
  std::uint64_t num_runs = 0;    ///< Of the pipeline. Fewer where schedules were merged, ...
  std::uint64_t num_states = 0;  ///< ... in so many states.
  std::uint64_t digest = 0;      ///< The sum of theirs, of small schedules.
  std::uint64_t num_bad = 0;     ///< Schedules with a finding, or that did not end as they must.
  std::vector<std::string> examples;  ///< The first few of those, in words.
};

/// Everything of a log but the host's times.
std::uint64_t hash_of(const OpLog& log);

/// A hash of the ops from `begin` on that does not depend on how often units were copied before.
std::uint64_t digest_of(const OpLog& log, std::size_t begin);

/// The log without the waits of streams and host from one of them on: which one depends on the log.
/// The planted control of lanes.
OpLog without_waits(const OpLog& log);

/// Checks logs for a lane and keeps its report.
class LaneJudge {
 public:
  /// `leaves_out_waits`: the planted control.
  explicit LaneJudge(bool leaves_out_waits) : leaves_out_waits_(leaves_out_waits) {}

  /// `what` is called for a log that is bad, to say which schedule it was.
  template <typename What>
  void judge(const OpLog& log, const What& what) {
    note_run();
    note(1, log.ops().size(), 0);
    if (const Finding* finding = first_finding(log)) {
      add_bad(what() + ": " + finding->message);
    }
  }
  /// Schedules that are bad, whatever their logs say.
  void add_bad(const std::string& example, std::uint64_t num_schedules = 1);

  // The parts of it, where one run stands for several schedules.

  /// The log's first finding, or nullptr; valid until the next one is asked for.
  const Finding* first_finding(const OpLog& log) {
    const std::vector<Finding>& findings =
        leaves_out_waits_ ? checker_.check(without_waits(log)) : checker_.check(log);
    return findings.empty() ? nullptr : &findings.front();
  }
  void note(std::uint64_t num_schedules, std::uint64_t num_ops, std::uint64_t digest) {
    report_.num_schedules += num_schedules;
    report_.num_ops += num_ops;
    report_.digest += digest;
  }
  void note_run() { ++report_.num_runs; }
  void note_states(std::uint64_t num_states) { report_.num_states += num_states; }
  /// What is left to be said of ops behind this log, which was judged last.
  void append_state(const OpLog& log, const StateScope& scope, StateWords& words);
  void note_distinct(const OpLog& log) { hashes_.insert(hash_of(log)); }

  const LaneReport& report() {
    report_.num_distinct = hashes_.size();
    return report_;
  }
  const std::unordered_set<std::uint64_t>& hashes() const { return hashes_; }

 private:
  const bool leaves_out_waits_;
  HazardChecker checker_;
  LaneReport report_;
  std::unordered_set<std::uint64_t> hashes_;
};

/// The reports of several judges as one.
LaneReport sum_of(std::vector<LaneJudge>& judges);

/// Lets each judge work on a thread of its own. Blocking: until all are done.
void work_in_parallel(std::vector<LaneJudge>& judges,
                      const std::function<void(LaneJudge&, std::size_t)>& work);

}  // namespace torch_offload
