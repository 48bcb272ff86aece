#include "lanes/lane.h"

#include <thread>

namespace torch_offload {

namespace {

/// The finalizer of splitmix64: every bit of the input stirs every bit of the output.
std::uint64_t mixed(std::uint64_t value) {
  value = (value ^ (value >> 30U)) * 0xBF58476D1CE4E5B9U;
  value = (value ^ (value >> 27U)) * 0x94D049BB133111EBU;
  return value ^ (value >> 31U);
}

}  // namespace

void LaneJudge::add_bad(const std::string& example, std::uint64_t num_schedules) {
  report_.num_bad += num_schedules;
  if (report_.examples.size() < kMaxExamples) {
    report_.examples.push_back(example);
  }
}

void LaneJudge::append_state(const OpLog& log, const StateScope& scope, StateWords& words) {
  if (leaves_out_waits_) {
    checker_.check(log);  // the control judges another log than is run
  }
  checker_.append_state(scope, words);
}

std::uint64_t hash_of(const OpLog& log) {
  std::uint64_t hash = log.ops().size();
  for (const Op& op : log.ops()) {
    const std::uint64_t ids = (static_cast<std::uint64_t>(op.kind) << 56U) ^
                              (static_cast<std::uint64_t>(op.stream) << 36U) ^
                              (static_cast<std::uint64_t>(op.event) << 18U) ^ op.unit;
    hash = mixed(hash ^ ids);
    hash = mixed(hash ^ op.memory.begin ^ (op.memory.end << 20U) ^ (op.generation << 50U));
    hash = mixed(hash ^ op.source.begin);
  }
  return hash;
}

std::uint64_t digest_of(const OpLog& log, std::size_t begin) {
  std::uint64_t hash = 0;
  for (auto op = log.ops().begin() + static_cast<std::ptrdiff_t>(begin); op != log.ops().end();
       ++op) {
    hash = (hash ^ mixed(op->memory.begin + static_cast<std::uint64_t>(op->kind))) *
           0x9E3779B97F4A7C15U;
    hash = mixed(hash ^ (static_cast<std::uint64_t>(op->stream) << 32U) ^ op->event ^
                 (op->memory.size_bytes() << 16U) ^ (op->source.begin << 1U));
  }
  return hash;
}

LaneReport sum_of(std::vector<LaneJudge>& judges) {
  LaneReport sum;
  std::unordered_set<std::uint64_t> hashes;
  for (LaneJudge& judge : judges) {
    const LaneReport& report = judge.report();
    sum.num_schedules += report.num_schedules;
    sum.num_ops += report.num_ops;
    sum.num_runs += report.num_runs;
    sum.num_states += report.num_states;
    sum.digest += report.digest;
    sum.num_bad += report.num_bad;
    for (const std::string& example : report.examples) {
      if (sum.examples.size() < kMaxExamples) {
        sum.examples.push_back(example);
      }
    }
    hashes.insert(judge.hashes().begin(), judge.hashes().end());
  }
  sum.num_distinct = hashes.size();
  return sum;
}

void work_in_parallel(std::vector<LaneJudge>& judges,
                      const std::function<void(LaneJudge&, std::size_t)>& work) {
  std::vector<std::thread> threads;
  threads.reserve(judges.size());
  for (std::size_t i = 0; i < judges.size(); ++i) {
    threads.emplace_back([&, i] { work(judges[i], i); });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

OpLog without_waits(const OpLog& log) {
  const auto is_wait = [](const Op& op) {
    return op.kind == OpKind::kWait || op.kind == OpKind::kSynchronize;
  };
  std::uint64_t num_waits = 0;
  for (const Op& op : log.ops()) {
    num_waits += is_wait(op) ? 1U : 0U;
  }
  const std::uint64_t num_kept = num_waits == 0 ? 0 : hash_of(log) % num_waits;
  std::uint64_t num_seen = 0;
  OpLog shorter;
  for (const Op& op : log.ops()) {
    num_seen += is_wait(op) ? 1U : 0U;
    if (!is_wait(op) || num_seen <= num_kept) {
      shorter.append(op);
    }
  }
  return shorter;
}

}  // namespace torch_offload
