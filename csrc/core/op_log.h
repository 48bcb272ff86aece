#pragma once

#include <cstddef>
#include <cstdint>
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

/// One word each: "copy", "read_end", ...
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

/// One call to a Device, in the order of submission. Fields that do not apply keep their defaults.
struct Op {
  OpKind kind = OpKind::kCopy;
  StreamId stream = kNoStream;
  EventId event = kNoEvent;
  bool is_done = false;  ///< Of a query.
  UnitIndex unit = kNoUnit;
  std::uint64_t generation = 0;   ///< Which onload of the unit, counted from 1.
  AddressRange memory;            ///< Written by a copy or fill, else read or written.
  AddressRange source;            ///< Of a copy.
  std::int64_t host_time_ns = 0;  ///< Monotonic clock of the host at submission.
};

/// Everything submitted to one Device while the log was attached.
///
/// Threads: appended to by the thread that submits; read it when nothing is being submitted.
class OpLog {
 public:
  void append(const Op& op) { ops_.push_back(op); }
  const std::vector<Op>& ops() const { return ops_; }
  void clear() { ops_.clear(); }

  /// Which events were recorded before the first op: what those records cover is not in the log.
  void set_recorded_before(std::vector<bool> events) { recorded_before_ = std::move(events); }
  bool was_recorded_before(EventId event) const {
    return event < recorded_before_.size() && recorded_before_[event];
  }

 private:
  std::vector<Op> ops_;
  std::vector<bool> recorded_before_;  // by EventId
};

}  // namespace torch_offload
