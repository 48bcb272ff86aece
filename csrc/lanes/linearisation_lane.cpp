#include "lanes/linearisation_lane.h"

#include <algorithm>
#include <cstddef>

#include "lanes/brute_force.h"
#include "lanes/lane.h"
#include "lanes/linearisations.h"
#include "lanes/random_log.h"

namespace torch_offload {

namespace {

constexpr std::uint64_t kMostOrdersOfALog = 20'000;

/// The log with the `seed`-th of its waits turned into a question that orders nothing: all ops keep
/// their index.
OpLog without_one_wait(const OpLog& log, std::uint32_t seed) {
  const auto is_wait = [](const Op& op) { return op.kind == OpKind::kWait; };
  const auto num_waits = std::count_if(log.ops().begin(), log.ops().end(), is_wait);
  OpLog without;
  std::ptrdiff_t left = num_waits == 0 ? 0 : static_cast<std::ptrdiff_t>(seed) % num_waits;
  for (Op op : log.ops()) {
    if (is_wait(op) && left-- == 0) {
      op.kind = OpKind::kQuery;
    }
    without.append(op);
  }
  return without;
}

}  // namespace

void LinearisationLane::advance(std::uint64_t num_orders) {
  const std::uint64_t wanted = report_.num_orders + num_orders;
  while (report_.num_orders < wanted) {
    compare(next_seed_++);
  }
}

void LinearisationLane::compare(std::uint32_t seed) {
  const OpLog log = lanes::RandomLog(seed).build.log;
  const lanes::Linearisations orders(log, kMostOrdersOfALog);
  if (!orders.is_complete()) {
    ++report_.num_too_large;
    return;
  }
  const lanes::Answer answer(checker_.check(is_control_ ? without_one_wait(log, seed) : log));
  const std::string disagreement = disagreements(answer, log, orders);
  if (!disagreement.empty()) {
    ++report_.num_disagreements;
    if (report_.examples.size() < kMaxExamples) {
      report_.examples.push_back("seed " + std::to_string(seed) + ": " + disagreement +
                                 lanes::text_of(log));
    }
  }
  report_.num_orders += orders.count();
  ++report_.num_logs;
  report_.num_unordered += answer.unordered.empty() ? 0U : 1U;
  report_.num_stale += answer.unordered.empty() && !answer.stale.empty() ? 1U : 0U;
  report_.num_clean += answer.unordered.empty() && answer.stale.empty() ? 1U : 0U;
}

}  // namespace torch_offload
