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
  std::uint64_t num_bad = 0;  ///< Schedules with a finding, or that did not end as they must.
  std::vector<std::string> examples;  ///< The first few of those, in words.
};

/// Everything of a log but the host's times.
std::uint64_t hash_of(const OpLog& log);

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
    const std::vector<Finding>& findings =
        leaves_out_waits_ ? checker_.check(without_waits(log)) : checker_.check(log);
    ++report_.num_schedules;
    report_.num_ops += log.ops().size();
    if (!findings.empty()) {
      add_bad(what() + ": " + findings.front().message);
    }
  }
  /// A schedule that is bad whatever its log says.
  void add_bad(const std::string& example);
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
