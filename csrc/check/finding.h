#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/op_log.h"
#include "core/unit.h"

namespace torch_offload {

/// What can be wrong with the order of the ops in a log.
enum class FindingKind : std::uint8_t {
  kUnordered,          ///< Two streams touch the same bytes, one writes, and nothing orders them.
  kRecordedTooEarly,   ///< As above; a wait was taken, but its event was recorded before the work.
  kWaitUnrecorded,     ///< A wait on an event that was never recorded: on a GPU it does nothing.
  kOverwrittenInUse,   ///< A write submitted while a unit whose place it meets was in use.
  kStale,              ///< A read of bytes that are ordered well, but are not those of the unit.
  kFreedInFlight,      ///< Memory freed or unregistered that a stream may still touch.
  kReusedInFlight,     ///< Memory touched that work of its former owner may still touch.
  kUsedAfterFree,      ///< Memory touched that was freed or unregistered before.
  kHostReadInFlight,   ///< The host reads bytes that a stream may still be writing.
  kHostWriteInFlight,  ///< The host writes bytes that a stream may still read or write.
  kHandedOverEarly,    ///< Kernels go on on another stream that does not wait for those before.
  kNotReturned,        ///< The caller's kernels were sent to a stream of ours and left there.
};

/// "unordered", "recorded too early", ...
const char* name_of(FindingKind kind);

constexpr std::size_t kNoOp = SIZE_MAX;

/// Two ops of a log, and the edge that is missing between them.
struct Finding {
  FindingKind kind = FindingKind::kUnordered;
  std::size_t first = kNoOp;   ///< Index of the op that `second` had to come after, if any.
  std::size_t second = kNoOp;  ///< Index of the op that came too early.
  OpKind first_kind = OpKind::kCopy;
  OpKind second_kind = OpKind::kCopy;
  UnitIndex first_unit = kNoUnit;
  UnitIndex second_unit = kNoUnit;
  AddressRange memory;  ///< The bytes that both touch; empty where no memory is concerned.
  std::string message;  ///< One sentence: both ops, the bytes, and what to do.
};

/// Makes findings of one log, sentence included. Streams and units without a name in it go by their
/// number.
class FindingWriter {
 public:
  explicit FindingWriter(const OpLog& log) : log_(log), ops_(log.ops()) {}

  /// `first` may be kNoOp.
  Finding make(FindingKind kind, std::size_t first, std::size_t second, AddressRange memory) const;

 private:
  std::string describe(std::size_t index) const;
  std::string stream_name(StreamId stream) const;
  std::string unit_name(UnitIndex unit) const;
  std::string bytes(const AddressRange& memory) const;
  std::string missing_edge(std::size_t first, std::size_t second) const;
  std::string sentence(const Finding& finding) const;
  FindingKind refined(FindingKind kind, std::size_t first, std::size_t second) const;
  std::size_t record_behind(std::size_t first, std::size_t second) const;
  std::size_t wait_for_older_record(std::size_t first, std::size_t second) const;
  std::size_t record_before(std::size_t wait) const;

  const OpLog& log_;
  const std::vector<Op>& ops_;
};

}  // namespace torch_offload
