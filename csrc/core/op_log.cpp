#include "core/op_log.h"

#include <algorithm>

// Note [Times in the log]
// The host knows when it submitted a call, not when the device carried it out. A log with times has
// the device mark points of its streams: where a copy or a wait begins and ends, where a unit's
// kernels may begin and where they have ended. What a mark is, is the device's affair: an event
// with a timestamp, a clock read by a worker, virtual time. Marks become times when the log is
// detached.
//   copy, fill   the transfer itself; decode likewise.
//   wait         begin: the stream came to the wait; end: it went on. The difference is the stall.
//   read         both: the stream has come to where the kernels of a unit begin, and
//   read_end     both: to where the last of them has ended. In between lies the unit's compute.
//   record       both: the stream has reached it. Unknown where only a further mark could tell.
//   synchronize  the call itself, by the host's clock: its length is how long the host was blocked.
// An op never begins before the host has made the call: on a copy stream the end of the last op may
// serve as the beginning of the next one, which was submitted later.

namespace torch_offload {

const char* name_of(OpKind kind) {
  switch (kind) {
    case OpKind::kCopy:
      return "copy";
    case OpKind::kDecode:
      return "decode";
    case OpKind::kFill:
      return "fill";
    case OpKind::kRead:
      return "read";
    case OpKind::kReadEnd:
      return "read_end";
    case OpKind::kLeave:
      return "leave";
    case OpKind::kEnter:
      return "enter";
    case OpKind::kReturn:
      return "return";
    case OpKind::kRecord:
      return "record";
    case OpKind::kWait:
      return "wait";
    case OpKind::kQuery:
      return "query";
    case OpKind::kSynchronize:
      return "synchronize";
    case OpKind::kAllocate:
      return "allocate";
    case OpKind::kFree:
      return "free";
    case OpKind::kRegister:
      return "register";
    case OpKind::kUnregister:
      return "unregister";
    case OpKind::kHostRead:
      return "host_read";
    case OpKind::kHostWrite:
      return "host_write";
  }
  return "?";
}

void OpLog::append(const Op& op, OpMarks marks) {
  if (marks.begin != kNoMark || marks.end != kNoMark) {
    unresolved_.push_back({ops_.size(), marks});
  }
  ops_.push_back(op);
}

void OpLog::begin(std::vector<bool> recorded) {
  beginnings_.push_back({ops_.size(), std::move(recorded)});
}

void OpLog::clear() {
  if (!beginnings_.empty()) {
    // Whoever still writes goes on: what it has recorded by now, it has recorded.
    Beginning last = std::move(beginnings_.back());
    for (; last.op_index < ops_.size(); ++last.op_index) {
      const Op& op = ops_[last.op_index];
      if (op.kind == OpKind::kRecord) {
        last.recorded.resize(std::max<std::size_t>(last.recorded.size(), op.event + 1U), false);
        last.recorded[op.event] = true;
      }
    }
    beginnings_ = {{0, std::move(last.recorded)}};
  }
  ops_.clear();
  unresolved_.clear();
  has_times_ = false;
}

void OpLog::resolve(const std::vector<std::int64_t>& times_ns) {
  for (const auto& [op_index, marks] : unresolved_) {
    Op& op = ops_[op_index];
    if (marks.begin != kNoMark) {
      op.begin_ns = std::max(times_ns.at(marks.begin), op.host_time_ns);
    }
    if (marks.end != kNoMark) {
      op.end_ns = std::max(times_ns.at(marks.end), op.begin_ns);
    }
  }
  unresolved_.clear();
  has_times_ = true;
}

}  // namespace torch_offload
