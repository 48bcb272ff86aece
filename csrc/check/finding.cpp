#include "check/finding.h"

#include <cstdio>
#include <set>

namespace torch_offload {

const char* name_of(FindingKind kind) {
  switch (kind) {
    case FindingKind::kUnordered:
      return "unordered";
    case FindingKind::kRecordedTooEarly:
      return "recorded too early";
    case FindingKind::kWaitUnrecorded:
      return "wait on an unrecorded event";
    case FindingKind::kOverwrittenInUse:
      return "overwritten in use";
    case FindingKind::kStale:
      return "stale";
    case FindingKind::kFreedInFlight:
      return "freed in flight";
    case FindingKind::kReusedInFlight:
      return "reused in flight";
    case FindingKind::kUsedAfterFree:
      return "used after free";
    case FindingKind::kHostReadInFlight:
      return "host read in flight";
    case FindingKind::kHostWriteInFlight:
      return "host write in flight";
    case FindingKind::kHandedOverEarly:
      return "handed over early";
    case FindingKind::kNotReturned:
      return "not returned";
  }
  return "?";
}

Finding FindingWriter::make(FindingKind kind, std::size_t first, std::size_t second,
                            AddressRange memory) const {
  Finding finding;
  finding.kind = kind == FindingKind::kUnordered ? refined(kind, first, second) : kind;
  finding.first = first;
  finding.second = second;
  if (first != kNoOp) {
    finding.first_kind = ops_[first].kind;
    finding.first_unit = ops_[first].unit;
  }
  finding.second_kind = ops_[second].kind;
  finding.second_unit = ops_[second].unit;
  finding.memory = memory;
  finding.message = sentence(finding);
  return finding;
}

// --- words -------------------------------------------------------------------------------------

std::string FindingWriter::stream_name(StreamId stream) const {
  return stream < log_.stream_names().size() ? "stream '" + log_.stream_names()[stream] + "'"
                                             : "stream " + std::to_string(stream);
}

std::string FindingWriter::unit_name(UnitIndex unit) const {
  return unit < log_.unit_names().size() ? "unit '" + log_.unit_names()[unit] + "'"
                                         : "unit " + std::to_string(unit);
}

std::string FindingWriter::bytes(const AddressRange& memory) const {
  char text[64];
  std::snprintf(text, sizeof text, "bytes [0x%llx, 0x%llx)",
                static_cast<unsigned long long>(memory.begin),
                static_cast<unsigned long long>(memory.end));
  return text;
}

std::string FindingWriter::describe(std::size_t index) const {
  const Op& op = ops_[index];
  std::string text = "op " + std::to_string(index) + " (" + name_of(op.kind);
  if (op.event != kNoEvent) {
    text += " event " + std::to_string(op.event);
  }
  if (op.unit != kNoUnit) {
    text += " of " + unit_name(op.unit);
    if (op.generation != 0) {
      text += ", onload " + std::to_string(op.generation);
    }
  }
  if (op.stream != kNoStream) {
    text += " on " + stream_name(op.stream);
  }
  return text + ")";
}

std::string FindingWriter::missing_edge(std::size_t first, std::size_t second) const {
  const StreamId earlier = ops_[first].stream;
  const StreamId later = ops_[second].stream;
  const std::string before = " before op " + std::to_string(second);
  const bool is_host = later == kNoStream;
  if (is_host) {
    return "synchronize " + stream_name(earlier) + before;
  }
  const std::size_t record = record_behind(first, second);
  if (record != kNoOp) {
    return "let " + stream_name(later) + " wait for event " + std::to_string(ops_[record].event) +
           ", recorded by op " + std::to_string(record) + "," + before;
  }
  return "record an event on " + stream_name(earlier) + " behind op " + std::to_string(first) +
         " and let " + stream_name(later) + " wait for it" + before;
}

std::string FindingWriter::sentence(const Finding& finding) const {
  const std::size_t first = finding.first;
  const std::size_t second = finding.second;
  const std::string later = describe(second);
  const std::string earlier = first == kNoOp ? "" : describe(first);
  const std::string where = bytes(finding.memory);
  switch (finding.kind) {
    case FindingKind::kUnordered:
      return later + " and " + earlier + " touch " + where +
             " in no order: " + missing_edge(first, second) + ".";
    case FindingKind::kRecordedTooEarly: {
      const std::size_t wait = wait_for_older_record(first, second);
      const std::size_t record = record_before(wait);
      return later + " and " + earlier + " touch " + where + " in no order, because op " +
             std::to_string(wait) + " waits for event " + std::to_string(ops_[wait].event) +
             " as op " + std::to_string(record) +
             " recorded it, before the work: record it behind op " + std::to_string(first) + ".";
    }
    case FindingKind::kWaitUnrecorded:
      return later + " waits for an event that was never recorded, which a GPU takes for done: " +
             (first == kNoOp ? "record it behind the work that it stands for, before the wait."
                             : "move " + earlier + " before the wait.");
    case FindingKind::kOverwrittenInUse:
      return later + " writes " + where + ", which kernels begun with " + earlier +
             " may go on to read: submit it after the use has ended, behind an event recorded "
             "there.";
    case FindingKind::kStale:
      return later + " reads " + where + ", which " + earlier +
             (finding.first_kind == OpKind::kAllocate ? " gave and nobody has written: copy"
                                                      : " has written last: copy") +
             " the unit into its place before op " + std::to_string(second) + ".";
    case FindingKind::kFreedInFlight:
      return later + " gives up " + where + ", which " + earlier + " may still touch: " +
             (finding.first_kind == OpKind::kRead
                  ? "end the use and synchronize " + stream_name(ops_[first].stream) +
                        " before op " + std::to_string(second)
                  : missing_edge(first, second)) +
             ".";
    case FindingKind::kReusedInFlight:
      return later + " touches " + where + ", which work of their former owner, up to " + earlier +
             ", may still touch: " + missing_edge(first, second) + ".";
    case FindingKind::kUsedAfterFree:
      return later + " touches " + where + ", which " + earlier +
             " had given up: give the memory up after op " + std::to_string(second) +
             ", once that is done.";
    case FindingKind::kHostReadInFlight:
      return later + " may read " + where + " before " + earlier +
             " has written them: " + missing_edge(first, second) + ".";
    case FindingKind::kHostWriteInFlight:
      return later + " may write " + where + " while " + earlier +
             " still uses them: " + missing_edge(first, second) + ".";
    case FindingKind::kHandedOverEarly:
      return later + " lets kernels run that need the work up to " + earlier +
             " and do not wait for it: " + missing_edge(first, second) + ".";
    case FindingKind::kNotReturned:
      return later +
             (finding.second_kind == OpKind::kEnter
                  ? " sent the caller's kernels away from the stream of " + earlier +
                        ", and no op sends them back"
                  : " sends the caller's kernels to another stream than " + earlier + " had left") +
             ": make " + stream_name(ops_[first].stream) +
             " current again when the use ends, whatever ended it.";
  }
  return "";
}

// --- which edge is missing ---------------------------------------------------------------------

FindingKind FindingWriter::refined(FindingKind kind, std::size_t first, std::size_t second) const {
  // An event recorded behind the work only lacks its wait; none, and a wait for an older record
  // was meant to cover it.
  return record_behind(first, second) == kNoOp && wait_for_older_record(first, second) != kNoOp
             ? FindingKind::kRecordedTooEarly
             : kind;
}

/// The first record on the stream of `first`, behind it and before `second`, that a wait taken just
/// before `second` would still mean: its event was not recorded again.
std::size_t FindingWriter::record_behind(std::size_t first, std::size_t second) const {
  std::size_t found = kNoOp;
  std::set<EventId> recorded_later;
  for (std::size_t i = second; i-- > first + 1;) {
    if (ops_[i].kind == OpKind::kRecord && recorded_later.insert(ops_[i].event).second &&
        ops_[i].stream == ops_[first].stream) {
      found = i;
    }
  }
  return found;
}

/// A wait of the stream of `second`, between both ops, for an event that the stream of `first`
/// recorded before `first`.
std::size_t FindingWriter::wait_for_older_record(std::size_t first, std::size_t second) const {
  for (std::size_t i = second; i-- > first + 1;) {
    if (ops_[i].kind == OpKind::kWait && ops_[i].stream == ops_[second].stream) {
      const std::size_t record = record_before(i);
      if (record < first && ops_[record].stream == ops_[first].stream) {
        return i;
      }
    }
  }
  return kNoOp;
}

/// The record that a wait means: the last one of its event before it.
std::size_t FindingWriter::record_before(std::size_t wait) const {
  for (std::size_t i = wait; i-- > 0;) {
    if (ops_[i].kind == OpKind::kRecord && ops_[i].event == ops_[wait].event) {
      return i;
    }
  }
  return kNoOp;
}

}  // namespace torch_offload
