#include "check/hazard_checker.h"

#include <algorithm>
#include <string>

#include "core/error.h"

namespace torch_offload {

namespace {

// Ids are small and dense by contract; a log that was read from a file may hold anything.
constexpr std::uint32_t kMaxId = 1U << 20U;

bool needs_stream(OpKind kind) {
  switch (kind) {
    case OpKind::kCopy:
    case OpKind::kDecode:
    case OpKind::kFill:
    case OpKind::kRead:
    case OpKind::kReadEnd:
    case OpKind::kLeave:
    case OpKind::kEnter:
    case OpKind::kReturn:
    case OpKind::kRecord:
    case OpKind::kWait:
    case OpKind::kSynchronize:
    case OpKind::kAllocate:
      return true;
    default:
      return false;
  }
}

bool needs_event(OpKind kind) {
  return kind == OpKind::kRecord || kind == OpKind::kWait || kind == OpKind::kQuery;
}

}  // namespace

const std::vector<Finding>& HazardChecker::check(const OpLog& log) & {
  log_ = &log;
  findings_.clear();
  index_ids(log);
  beginning_ = nullptr;
  begin_part();
  auto next = log.beginnings().begin();
  OpIndex index = 0;
  for (const Op& op : log.ops()) {
    for (; next != log.beginnings().end() && next->op_index == index; ++next) {
      expect_returned();
      beginning_ = &*next;
      begin_part();
    }
    visit(index++, op);
  }
  expect_returned();
  return findings_;
}

void HazardChecker::begin_part() {
  memory_.reset();
  open_reads_.clear();
  left_ = {};
  away_.clear();
  std::fill(recorded_by_.begin(), recorded_by_.end(), ShadowMemory::kNone);
  clocks_.reset(num_streams_, recorded_by_.size());
}

void HazardChecker::index_ids(const OpLog& log) {
  stream_index_.clear();
  std::uint32_t num_events = 0;
  num_streams_ = 0;
  const auto check_id = [](const Op& op, std::uint32_t id, const char* what) {
    if (id >= kMaxId) {
      throw ValueError(std::string("expected a '") + name_of(op.kind) + "' op with a " + what +
                       " below " + std::to_string(kMaxId) + ", got " +
                       (id == kNoStream ? "none" : std::to_string(id)) +
                       "; check logs that a device has written");
    }
  };
  for (const Op& op : log.ops()) {
    if (needs_stream(op.kind)) {
      check_id(op, op.stream, "stream");
      if (op.stream >= stream_index_.size()) {
        stream_index_.resize(op.stream + 1, ShadowMemory::kNone);
      }
      StreamIndex& stream = stream_index_[op.stream];
      stream = stream == ShadowMemory::kNone ? num_streams_++ : stream;
    }
    if (needs_event(op.kind)) {
      check_id(op, op.event, "event");
      num_events = std::max(num_events, op.event + 1);
    }
  }
  recorded_by_.resize(num_events);
}

void HazardChecker::visit(OpIndex index, const Op& op) {
  StreamIndex stream = 0;
  Epoch epoch = 0;
  if (needs_stream(op.kind) && op.kind != OpKind::kSynchronize) {
    stream = stream_of(op);
    epoch = clocks_.submit(stream);
  }
  switch (op.kind) {
    case OpKind::kCopy:
      read(index, op.source, stream, epoch);
      write(index, op.memory, stream, epoch);
      break;
    case OpKind::kDecode:
      expect_fresh_source(index, op);
      read(index, op.source, stream, epoch);
      write(index, op.memory, stream, epoch);
      break;
    case OpKind::kFill:
      write(index, op.memory, stream, epoch);
      break;
    case OpKind::kRead:
      begin_read(index, op, stream);
      break;
    case OpKind::kReadEnd:
      end_read(index, op, stream, epoch);
      break;
    case OpKind::kLeave:
      left_ = {index, stream, epoch};
      break;
    case OpKind::kEnter:
    case OpKind::kReturn:
      go_on(index, op.kind, stream);
      break;
    case OpKind::kRecord:
      clocks_.record(op.event, stream);
      recorded_by_[op.event] = index;
      break;
    case OpKind::kWait:
      wait(index, op, stream);
      break;
    case OpKind::kQuery:
      if (op.is_done && recorded_by_[op.event] != ShadowMemory::kNone) {
        clocks_.host_waited_for_event(op.event);
      }
      break;
    case OpKind::kSynchronize:
      clocks_.host_waited_for_stream(stream_of(op));
      break;
    case OpKind::kAllocate:
      allocate(index, op);
      break;
    case OpKind::kFree:
    case OpKind::kUnregister:
      give_up(index, op.memory);
      break;
    case OpKind::kRegister:
      memory_.for_each_cell(op.memory, [](ShadowMemory::Cell& cell) { cell.is_given_up = false; });
      break;
    case OpKind::kHostRead:
      host_read(index, op.memory);
      break;
    case OpKind::kHostWrite:
      host_write(index, op.memory);
      break;
  }
}

// --- accesses of streams -----------------------------------------------------------------------

void HazardChecker::read(OpIndex index, const AddressRange& memory, StreamIndex stream,
                         Epoch epoch) {
  const Epoch* clock = clocks_.of_stream(stream);
  memory_.for_each_cell(memory, [&](ShadowMemory::Cell& cell) {
    compare(FindingKind::kUnordered, index, cell, false, clock);
    memory_.add(cell, {stream, epoch, index, false}, clock);
  });
}

void HazardChecker::write(OpIndex index, const AddressRange& memory, StreamIndex stream,
                          Epoch epoch) {
  const Epoch* clock = clocks_.of_stream(stream);
  expect_not_open(FindingKind::kOverwrittenInUse, index, memory);
  memory_.for_each_cell(memory, [&](ShadowMemory::Cell& cell) {
    compare(FindingKind::kUnordered, index, cell, true, clock);
    memory_.add(cell, {stream, epoch, index, true}, clock);
  });
}

void HazardChecker::begin_read(OpIndex index, const Op& op, StreamIndex stream) {
  memory_.for_each_cell(op.memory, [&](ShadowMemory::Cell& cell) {
    compare(FindingKind::kUnordered, index, cell, false, clocks_.of_stream(stream));
    expect_fresh(index, op, cell);
  });
  const bool is_first = std::none_of(open_reads_.begin(), open_reads_.end(),
                                     [&](const OpenRead& open) { return open.is_use_of(op); });
  open_reads_.push_back({index, op.unit, op.generation, op.memory, stream, is_first});
}

/// The bytes that a unit's kernels read are those of its onload of that generation.
void HazardChecker::expect_fresh(OpIndex index, const Op& op, const ShadowMemory::Cell& cell) {
  if (op.generation == 0 || cell.last_write == ShadowMemory::kNone || cell.is_given_up) {
    return;
  }
  const Op& writer = log_->ops()[cell.last_write];
  if (!is_onload(writer.kind) || writer.unit != op.unit || writer.generation != op.generation) {
    report(FindingKind::kStale, cell.last_write, index, {cell.begin, cell.end});
  }
}

/// What is decoded was copied for just that, or to stay: a copy of no generation is good for all.
void HazardChecker::expect_fresh_source(OpIndex index, const Op& op) {
  const auto stays = [&](const ShadowMemory::Cell& cell) {
    const Op* writer =
        cell.last_write == ShadowMemory::kNone ? nullptr : &log_->ops()[cell.last_write];
    return writer != nullptr && writer->kind == OpKind::kCopy && writer->unit == op.unit &&
           writer->generation == 0;
  };
  memory_.for_each_cell(op.source, [&](ShadowMemory::Cell& cell) {
    if (!stays(cell)) {
      expect_fresh(index, op, cell);
    }
  });
}

/// Ends the reads on this stream. With those on the stream where the use began, all of it ends.
void HazardChecker::end_read(OpIndex index, const Op& op, StreamIndex stream, Epoch epoch) {
  const auto is_same_use = [&](const OpenRead& open) { return open.is_use_of(op); };
  const auto begun = std::find_if(open_reads_.begin(), open_reads_.end(), is_same_use);
  const OpIndex begun_by = begun == open_reads_.end() ? index : begun->op;
  add_reads(op.memory, begun_by, {stream, epoch, index, false});

  const auto last = std::find_if(
      open_reads_.rbegin(), open_reads_.rend(),
      [&](const OpenRead& open) { return is_same_use(open) && open.stream == stream; });
  if (last == open_reads_.rend()) {
    return;  // a stream that the use has come to in between, or one begun before the log
  }
  const bool is_all = last->is_first;
  open_reads_.erase(std::next(last).base());
  if (is_all) {
    for (const OpenRead& open : open_reads_) {
      if (is_same_use(open)) {
        const Epoch reached = clocks_.of_stream(open.stream)[open.stream];
        add_reads(op.memory, begun_by, {open.stream, reached, open.op, false});
      }
    }
    open_reads_.erase(std::remove_if(open_reads_.begin(), open_reads_.end(), is_same_use),
                      open_reads_.end());
  }
}

/// Adds the last of the reads begun by an op, where their memory was not given up since.
void HazardChecker::add_reads(const AddressRange& memory, OpIndex begun_by,
                              const ShadowMemory::Access& last) {
  memory_.for_each_cell(memory, [&](ShadowMemory::Cell& cell) {
    if (!cell.was_given_up_since(begun_by)) {
      memory_.add(cell, last, clocks_.of_stream(last.stream));
    }
  });
}

void HazardChecker::expect_not_open(FindingKind kind, OpIndex index, const AddressRange& memory) {
  for (const OpenRead& open : open_reads_) {
    if (!open.memory.overlaps(memory)) {
      continue;
    }
    const AddressRange both{std::max(open.memory.begin, memory.begin),
                            std::min(open.memory.end, memory.end)};
    memory_.for_each_cell(both, [&](const ShadowMemory::Cell& cell) {
      if (!cell.was_given_up_since(open.op)) {
        report(kind, open.op, index, {cell.begin, cell.end});
      }
    });
  }
}

/// Reports every access to the cell that somebody who knows `clock` is not ordered behind.
void HazardChecker::compare(FindingKind kind, OpIndex index, const ShadowMemory::Cell& cell,
                            bool writes, const Epoch* clock) {
  const AddressRange part{cell.begin, cell.end};
  if (cell.is_given_up) {
    report(FindingKind::kUsedAfterFree, cell.given_up_by, index, part);
  }
  memory_.compare(cell, writes, clock, [&](const ShadowMemory::Access& earlier) {
    // Memory just allocated belongs to work of the allocating stream until that is done.
    const bool is_new = log_->ops()[earlier.op].kind == OpKind::kAllocate;
    report(is_new ? FindingKind::kReusedInFlight : kind, earlier.op, index, part);
  });
}

// --- memory ------------------------------------------------------------------------------------

void HazardChecker::allocate(OpIndex index, const Op& op) {
  const StreamIndex stream = stream_of(op);
  const Epoch* clock = clocks_.of_stream(stream);
  expect_not_open(FindingKind::kReusedInFlight, index, op.memory);
  memory_.for_each_cell(op.memory, [&](ShadowMemory::Cell& cell) {
    cell.is_given_up = false;
    compare(FindingKind::kReusedInFlight, index, cell, true, clock);
    memory_.add(cell, {stream, clock[stream], index, true}, clock);
  });
}

void HazardChecker::give_up(OpIndex index, const AddressRange& memory) {
  expect_not_open(FindingKind::kFreedInFlight, index, memory);
  memory_.for_each_cell(memory, [&](ShadowMemory::Cell& cell) {
    memory_.compare(cell, true, clocks_.of_host(), [&](const ShadowMemory::Access& earlier) {
      if (log_->ops()[earlier.op].kind != OpKind::kAllocate) {
        report(FindingKind::kFreedInFlight, earlier.op, index, {cell.begin, cell.end});
      }
    });
    ShadowMemory::give_up(cell, index);
  });
}

// The host may take memory that another part of the process had given up: that is no concern of
// ours.

void HazardChecker::host_read(OpIndex index, const AddressRange& memory) {
  memory_.for_each_cell(memory, [&](ShadowMemory::Cell& cell) {
    cell.is_given_up = false;
    compare(FindingKind::kHostReadInFlight, index, cell, false, clocks_.of_host());
  });
}

void HazardChecker::host_write(OpIndex index, const AddressRange& memory) {
  expect_not_open(FindingKind::kHostWriteInFlight, index, memory);
  memory_.for_each_cell(memory, [&](ShadowMemory::Cell& cell) {
    cell.is_given_up = false;
    compare(FindingKind::kHostWriteInFlight, index, cell, true, clocks_.of_host());
    memory_.add_host_write(cell, index, clocks_.of_host());
  });
}

// --- events and the caller's stream ------------------------------------------------------------

void HazardChecker::wait(OpIndex index, const Op& op, StreamIndex stream) {
  if (recorded_by_[op.event] != ShadowMemory::kNone) {
    clocks_.wait(stream, op.event);
    return;
  }
  if (beginning_ != nullptr && op.event < beginning_->recorded.size() &&
      beginning_->recorded[op.event]) {
    return;
  }
  const std::vector<Op>& ops = log_->ops();
  const auto recorded = std::find_if(ops.begin() + index, ops.end(), [&](const Op& later) {
    return later.kind == OpKind::kRecord && later.event == op.event;
  });
  report(FindingKind::kWaitUnrecorded,
         recorded == ops.end() ? kNoOp : static_cast<std::size_t>(recorded - ops.begin()), index,
         {});
}

void HazardChecker::go_on(OpIndex index, OpKind kind, StreamIndex stream) {
  if (left_.op != ShadowMemory::kNone &&  // else there were no kernels, or the log begins here
      clocks_.of_stream(stream)[left_.stream] < left_.epoch) {
    report(FindingKind::kHandedOverEarly, left_.op, index, {});
  }
  if (kind == OpKind::kEnter) {
    away_.push_back({left_, index});
  } else if (!away_.empty()) {
    const Stay stay = away_.back();
    away_.pop_back();
    if (stay.left.op != ShadowMemory::kNone && stay.left.stream != stream) {
      report(FindingKind::kNotReturned, stay.left.op, index, {});
    }
  }
  left_ = {};
}

void HazardChecker::expect_returned() {
  for (const Stay& stay : away_) {
    if (stay.left.op != ShadowMemory::kNone && open_reads_.empty()) {
      report(FindingKind::kNotReturned, stay.left.op, stay.entered, {});
    }
  }
}

// -----------------------------------------------------------------------------------------------

void HazardChecker::report(FindingKind kind, std::size_t first, OpIndex second,
                           AddressRange memory) {
  const FindingWriter writer(*log_);
  for (auto last = findings_.rbegin(); last != findings_.rend() && last->second == second; ++last) {
    if (last->first == first && last->memory.end == memory.begin && memory.begin != 0) {
      *last = writer.make(kind, first, second, {last->memory.begin, memory.end});
      return;
    }
  }
  if (findings_.size() < max_findings_) {
    findings_.push_back(writer.make(kind, first, second, memory));
  }
}

}  // namespace torch_offload
