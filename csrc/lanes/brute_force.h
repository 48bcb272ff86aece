#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "check/finding.h"
#include "core/op_log.h"

namespace torch_offload::lanes {

using Pair = std::pair<std::size_t, std::size_t>;

/// What an op does to memory; an interval of reads is one access of its kRead, with its ends.
struct Access {
  std::size_t op = 0;
  AddressRange memory;
  bool writes = false;
  bool gives_up = false;
  std::vector<std::size_t> ends;  // of reads: the last op on each stream that may still read
  std::size_t closed_at = kNoOp;  // of reads: the op behind which no more are submitted
  bool is_interval = false;
};

inline std::vector<Access> accesses_of(const std::vector<Op>& ops) {
  std::vector<Access> accesses;
  for (std::size_t i = 0; i < ops.size(); ++i) {
    const Op& op = ops[i];
    Access access;
    access.op = i;
    access.memory = op.memory;
    switch (op.kind) {
      case OpKind::kCopy:
      case OpKind::kDecode: {
        Access source = access;
        source.memory = op.source;
        accesses.push_back(source);
        access.writes = true;
        break;
      }
      case OpKind::kFill:
      case OpKind::kHostWrite:
      case OpKind::kAllocate:
        access.writes = true;
        break;
      case OpKind::kFree:
      case OpKind::kUnregister:
        access.writes = access.gives_up = true;
        break;
      case OpKind::kHostRead:
        break;
      case OpKind::kRead:
        // The generator gives each use a unit of its own.
        access.is_interval = true;
        for (std::size_t j = i + 1; j < ops.size() && access.closed_at == kNoOp; ++j) {
          if (ops[j].kind == OpKind::kReadEnd && ops[j].unit == op.unit) {
            access.ends.push_back(j);
            access.closed_at = ops[j].stream == op.stream ? j : kNoOp;
          }
        }
        break;
      default:
        continue;
    }
    accesses.push_back(access);
  }
  return accesses;
}

/// The verdict that the orders give, in the words of the checker.
struct Verdict {
  std::set<Pair> unordered;  // both ops, the one submitted first in front
  std::set<Pair> handed_over;
};

///
/// `Orders` knows what comes before what: `always_before(first, second)`.
template <typename Orders>
class Judge {
 public:
  Judge(const std::vector<Op>& ops, const Orders& orders)
      : ops_(ops), orders_(orders), accesses_(accesses_of(ops)) {}

  Verdict verdict() const {
    Verdict verdict;
    for (const Access& first : accesses_) {
      for (const Access& second : accesses_) {
        // What comes after memory was given up must take it anew: not a matter of order.
        if (first.op < second.op && (first.writes || second.writes) && !first.gives_up) {
          judge(first, second, verdict.unordered);
        }
      }
    }
    std::size_t left = kNoOp;
    for (std::size_t i = 0; i < ops_.size(); ++i) {
      if (ops_[i].kind == OpKind::kLeave) {
        left = i;
      } else if (ops_[i].kind == OpKind::kEnter || ops_[i].kind == OpKind::kReturn) {
        if (left != kNoOp && !orders_.always_before(left, i)) {
          verdict.handed_over.insert({left, i});
        }
        left = kNoOp;
      }
    }
    return verdict;
  }

 private:
  void judge(const Access& first, const Access& second, std::set<Pair>& unordered) const {
    std::vector<std::size_t> last_steps{first.op};
    if (first.is_interval) {
      last_steps = first.ends;
      if (first.closed_at == kNoOp || second.op < first.closed_at) {
        if (share_bytes(first, kNoOp, second)) {
          unordered.insert({first.op, second.op});  // more reads may come
        }
      }
    }
    for (const std::size_t step : last_steps) {
      if (step < second.op && !orders_.always_before(step, second.op) &&
          share_bytes(first, step, second)) {
        unordered.insert({step, second.op});
      }
    }
  }

  /// Whether both touch a byte which had not changed hands since the last `step` of the first.
  bool share_bytes(const Access& first, std::size_t step, const Access& second) const {
    for (std::uintptr_t at = first.memory.begin; at < first.memory.end; at += kAlignmentBytes) {
      bool is_shared = second.memory.begin <= at && at < second.memory.end;
      if (is_shared && second.gives_up && ops_[first.op].kind == OpKind::kAllocate) {
        is_shared = false;  // given back unused
      }
      for (const Access& between : accesses_) {
        if (between.memory.begin <= at && at < between.memory.end && between.op < second.op) {
          const bool given_up = between.gives_up && first.op < between.op;
          // Whom the allocator handed the memory to has to do with its own accesses alone.
          const bool handed_on = second.gives_up && step < between.op &&
                                 ops_[between.op].kind == OpKind::kAllocate &&
                                 orders_.always_before(step, between.op);
          is_shared = is_shared && !given_up && !handed_on;
        }
      }
      if (is_shared) {
        return true;
      }
    }
    return false;
  }

  const std::vector<Op>& ops_;
  const Orders& orders_;
  const std::vector<Access> accesses_;
};

/// What the checker says of a log.
struct Answer {
  explicit Answer(const std::vector<Finding>& findings) {
    for (const Finding& finding : findings) {
      switch (finding.kind) {
        case FindingKind::kStale:
          stale.insert(finding.second);
          break;
        case FindingKind::kHandedOverEarly:
          handed_over.insert({finding.first, finding.second});
          break;
        case FindingKind::kUsedAfterFree:
          after_free.insert(finding.second);
          break;
        case FindingKind::kWaitUnrecorded:  // these two are matters of the log's text, not of order
        case FindingKind::kNotReturned:
          break;
        default:
          unordered.insert({finding.first, finding.second});
      }
    }
  }

  std::set<Pair> unordered;
  std::set<Pair> handed_over;
  std::set<std::size_t> stale;
  std::set<std::size_t> after_free;
};

inline std::string text_of(const Pair& pair) {
  return std::to_string(pair.first) + " and " + std::to_string(pair.second);
}

/// Where an answer and the orders of a log do not agree, in words.
template <typename Orders>
std::string disagreements(const Answer& answer, const OpLog& log, const Orders& orders) {
  const Verdict verdict = Judge(log.ops(), orders).verdict();
  std::string text;
  for (const Pair& pair : answer.unordered) {
    if (verdict.unordered.count(pair) == 0) {
      text += "ops " + text_of(pair) + " are ordered\n";
    }
  }
  for (const Pair& pair : verdict.unordered) {
    const bool is_named =
        std::any_of(answer.unordered.begin(), answer.unordered.end(), [&](const Pair& named) {
          return named.second == pair.second &&
                 (named.first == pair.first || orders.always_before(pair.first, named.first));
        });
    text += is_named ? "" : "ops " + text_of(pair) + " are not ordered\n";
  }
  if (answer.handed_over != verdict.handed_over) {
    text += "kernels are handed over otherwise\n";
  }
  if (verdict.unordered.empty()) {  // else the bytes depend on the order
    for (std::size_t i = 0; i < log.ops().size(); ++i) {
      if ((answer.stale.count(i) > 0) != orders.finds_other_bytes(i)) {
        text += "op " + std::to_string(i) + " finds other bytes\n";
      }
      if ((answer.after_free.count(i) > 0) != orders.meets_given_up_memory(i)) {
        text += "op " + std::to_string(i) + " meets other memory\n";
      }
    }
  }
  return text;
}

}  // namespace torch_offload::lanes
