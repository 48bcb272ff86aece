#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/unit.h"

namespace torch_offload {

/// Numbers a stream of one Device; small, dense, never reused.
using StreamId = std::uint32_t;
/// Numbers an event of one Device; small, dense, never reused.
using EventId = std::uint32_t;

constexpr StreamId kNoStream = UINT32_MAX;
constexpr EventId kNoEvent = UINT32_MAX;

enum class OpKind : std::uint8_t {
  kCopy,         ///< `stream` copies `source` into `memory`.
  kDecode,       ///< `stream` decodes the packed unit in `source` into `memory`.
  kFill,         ///< `stream` overwrites `memory` with poison.
  kRead,         ///< Work submitted to `stream` from here on may read `memory`.
  kReadEnd,      ///< No later work on `stream` reads `memory`.
  kLeave,        ///< The caller's kernels went to `stream` so far, and are about to go elsewhere.
  kEnter,        ///< From here on they go to `stream`; they need what those before have done.
  kReturn,       ///< Likewise, to the stream that was left for the one entered last.
  kRecord,       ///< `event` is recorded on `stream`.
  kWait,         ///< `stream` waits for `event`.
  kQuery,        ///< The host asked whether `event` is done; `is_done` is the answer.
  kSynchronize,  ///< The host waited for `stream`.
  kAllocate,     ///< Device memory, which work submitted to `stream` so far may still use.
  kFree,
  kRegister,  ///< Host memory, page-locked.
  kUnregister,
  kHostRead,  ///< The host itself reads or writes `memory`.
  kHostWrite,
};

/// Whether such an op brings a unit's bytes somewhere.
constexpr bool is_onload(OpKind kind) { return kind == OpKind::kCopy || kind == OpKind::kDecode; }

/// The name of a kind in Python and in traces, such as "read_end".
const char* name_of(OpKind kind);

/// A range of addresses [begin, end), on the device or on the host.
struct AddressRange {
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;

  static AddressRange of(const void* address, std::size_t size_bytes) {
    const auto begin = reinterpret_cast<std::uintptr_t>(address);
    return {begin, begin + size_bytes};
  }
  std::size_t size_bytes() const { return end - begin; }
  bool overlaps(const AddressRange& other) const { return begin < other.end && other.begin < end; }
};

constexpr std::int64_t kUnknownTime = -1;

/// One call to a Device, in the order of submission. Fields that do not apply keep their defaults.
struct Op {
  OpKind kind = OpKind::kCopy;
  StreamId stream = kNoStream;
  EventId event = kNoEvent;
  bool is_done = false;  ///< Of a query.
  UnitIndex unit = kNoUnit;
  std::uint64_t generation = 0;   ///< Which onload of the unit, counted from 1; 0: of none.
  AddressRange memory;            ///< Written by a copy, decode or fill, else read or written.
  AddressRange source;            ///< Of a copy or decode.
  std::int64_t host_time_ns = 0;  ///< Monotonic clock of the host when it made the call.

  // When the device carried it out, by the clock of `host_time_ns`; see Note [Times in the log].
  std::int64_t begin_ns = kUnknownTime;
  std::int64_t end_ns = kUnknownTime;
};

/// Numbers a point of a stream whose time a Device was asked to keep; see Note [Times in the log].
using MarkId = std::uint32_t;

constexpr MarkId kNoMark = UINT32_MAX;

/// The marks whose times will be the begin and the end of an op.
struct OpMarks {
  MarkId begin = kNoMark;
  MarkId end = kNoMark;
};

/// Everything submitted to one Device while the log was attached.
///
/// Threads: appended to by the thread that submits; read it when nothing is being submitted.
class OpLog {
 public:
  void append(const Op& op, OpMarks marks = {});
  const std::vector<Op>& ops() const { return ops_; }
  /// Forgets the ops; names stay.
  void clear();

  /// Turns the marks of all ops into times. `times_ns` is indexed by MarkId.
  void resolve(const std::vector<std::int64_t>& times_ns);
  /// Whether ops in here know their times.
  bool has_times() const { return has_times_; }

  /// Names of the device's streams by StreamId; empty until the log is detached.
  const std::vector<std::string>& stream_names() const { return stream_names_; }
  void set_stream_names(std::vector<std::string> names) { stream_names_ = std::move(names); }
  /// Names of the units that the ops speak of, by UnitIndex.
  const std::vector<std::string>& unit_names() const { return unit_names_; }
  void set_unit_names(std::vector<std::string> names) { unit_names_ = std::move(names); }

  /// Where a device began to write, and which events it had recorded by then: what those records
  /// cover is not in the log, nor what came between two such places.
  struct Beginning {
    std::size_t op_index = 0;
    std::vector<bool> recorded;  ///< By EventId.
  };
  void begin(std::vector<bool> recorded);
  /// In the order of the ops; none in a log that was written by hand.
  const std::vector<Beginning>& beginnings() const { return beginnings_; }

 private:
  struct Unresolved {
    std::size_t op_index;
    OpMarks marks;
  };

  std::vector<Op> ops_;
  std::vector<Beginning> beginnings_;
  std::vector<Unresolved> unresolved_;  // ops whose times are still marks
  std::vector<std::string> stream_names_;
  std::vector<std::string> unit_names_;
  bool has_times_ = false;
};

}  // namespace torch_offload
