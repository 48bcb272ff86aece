#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "core/op_log.h"

namespace torch_offload::lanes {

/// Where a step does no good: a record before the op in front of it on its stream; a wait behind
/// the next record on its stream, and so behind all that it is to hold back; the host's behind the
/// next copy, decoding or fill, or the next memory that is given up. At the end if none of these
/// comes.
inline std::size_t wrong_place(const std::vector<Op>& ops, std::size_t step) {
  const Op& op = ops[step];
  if (op.kind == OpKind::kRecord) {
    for (std::size_t i = step; i-- > 0;) {
      if (ops[i].stream == op.stream && ops[i].kind != OpKind::kSynchronize) {
        return i;
      }
    }
    return step;
  }
  const auto is_held_back = [&](const Op& other) {
    return op.kind == OpKind::kSynchronize
               ? is_onload(other.kind) || other.kind == OpKind::kFill ||
                     other.kind == OpKind::kFree || other.kind == OpKind::kUnregister
               : other.kind == OpKind::kRecord && other.stream == op.stream;
  };
  for (std::size_t i = step + 1; i < ops.size(); ++i) {
    if (is_held_back(ops[i])) {
      return i;
    }
  }
  return ops.size() - 1;
}

inline std::vector<Op> moved(std::vector<Op> ops, std::size_t from, std::size_t to) {
  const Op op = ops[from];
  ops.erase(ops.begin() + static_cast<std::ptrdiff_t>(from));
  ops.insert(ops.begin() + static_cast<std::ptrdiff_t>(to), op);
  return ops;
}

inline OpLog log_of(const std::vector<Op>& ops) {
  OpLog log;
  for (const Op& op : ops) {
    log.append(op);
  }
  return log;
}

/// The log with some of its ops moved to where they do no good; `steps` are all of one kind, in the
/// order of the log.
inline OpLog with_moved(const OpLog& log, const std::vector<std::size_t>& steps) {
  if (steps.empty()) {
    return log;
  }
  std::vector<Op> ops = log.ops();
  const auto move = [&](std::size_t step) {
    const std::size_t place = wrong_place(ops, step);
    ops = moved(std::move(ops), step, place);
  };
  // So that none moves another one that is still to be moved.
  if (ops[steps.front()].kind == OpKind::kRecord) {
    for (const std::size_t step : steps) {
      move(step);
    }
  } else {
    for (std::size_t i = steps.size(); i-- > 0;) {
      move(steps[i]);
    }
  }
  return log_of(ops);
}

}  // namespace torch_offload::lanes
