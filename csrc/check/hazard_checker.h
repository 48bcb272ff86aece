#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "check/clocks.h"
#include "check/finding.h"
#include "check/shadow_memory.h"
#include "check/state_words.h"
#include "core/op_log.h"

namespace torch_offload {

/// Decides from an op log alone whether its order can go wrong on any device, however fast or slow.
///
/// Happens-before, and nothing else: ops of one stream in the order of submission; a record before
/// the waits that mean it; what a stream was given before the host's synchronize of it; what the
/// host did before all that it submits later. Two accesses to a byte, one of them a write, that
/// this does not order are a fault, whether or not they met this time. See docs/correctness.md.
///
/// Reads of a unit lie anywhere between its kRead and its kReadEnd: they come after what the first
/// comes after, and are over when the second is. Ops of the log are in the order of submission, so
/// a write submitted between the two is never ordered with them.
///
/// Exact: without a finding, every execution that the log's order allows reads what the host meant.
/// Of an op that is unordered with several others, the findings name the latest of these; an
/// earlier one that is not named is ordered before one that is.
/// Not judged: what lies before the log's first op, or between the parts of one that was attached
/// several times; and memory that the log does not name.
///
/// Threads: one caller at a time; a checker may be used again and again, and saves memory so.
class HazardChecker {
 public:
  static constexpr std::size_t kMaxFindings = 100;

  explicit HazardChecker(std::size_t max_findings = kMaxFindings) : max_findings_(max_findings) {}

  /// Returns the findings as they come to light, at most `max_findings` of them; valid until the
  /// next check.
  /// Throws: ValueError if an op lacks the stream or event that its kind needs, or has a wild one.
  const std::vector<Finding>& check(const OpLog& log) &;
  /// Likewise of a checker for once, whose findings outlive it.
  std::vector<Finding> check(const OpLog& log) && {
    check(log);  // *this is an lvalue in here
    return std::move(findings_);
  }

  /// Appends what the last check has left to be said of later ops, for a log that goes on. Equal
  /// words: what comes behind one log is judged as behind the other.
  ///
  /// No query may follow: the host learns of streams by waiting for them.
  /// Throws: InternalError in the midst of a use, or where memory was given up.
  void append_state(const StateScope& scope, StateWords& words) const;

 private:
  using OpIndex = ShadowMemory::OpIndex;
  using StreamIndex = Clocks::StreamIndex;

  /// Reads of a unit that were begun and not ended yet, on one stream.
  struct OpenRead {
    OpIndex op = ShadowMemory::kNone;
    UnitIndex unit = kNoUnit;
    std::uint64_t generation = 0;
    AddressRange memory;
    StreamIndex stream = 0;
    bool is_first = true;  // of this use: the other streams' reads end with it, at the latest

    bool is_use_of(const Op& other) const {
      return unit == other.unit && generation == other.generation &&
             memory.begin == other.memory.begin && memory.end == other.memory.end;
    }
  };

  /// A kLeave.
  struct Departure {
    OpIndex op = ShadowMemory::kNone;
    StreamIndex stream = 0;
    Epoch epoch = 0;
  };

  /// From a kEnter to its kReturn.
  struct Stay {
    Departure left;
    OpIndex entered = ShadowMemory::kNone;
  };

  void index_ids(const OpLog& log);
  void begin_part();
  void visit(OpIndex index, const Op& op);
  void read(OpIndex index, const AddressRange& memory, StreamIndex stream, Epoch epoch);
  void write(OpIndex index, const AddressRange& memory, StreamIndex stream, Epoch epoch);
  void begin_read(OpIndex index, const Op& op, StreamIndex stream);
  void end_read(OpIndex index, const Op& op, StreamIndex stream, Epoch epoch);
  void add_reads(const AddressRange& memory, OpIndex begun_by, const ShadowMemory::Access& last);
  void allocate(OpIndex index, const Op& op);
  void give_up(OpIndex index, const AddressRange& memory);
  void host_read(OpIndex index, const AddressRange& memory);
  void host_write(OpIndex index, const AddressRange& memory);
  void wait(OpIndex index, const Op& op, StreamIndex stream);
  void go_on(OpIndex index, OpKind kind, StreamIndex stream);
  void expect_returned();
  void expect_not_open(FindingKind kind, OpIndex index, const AddressRange& memory);
  void expect_fresh_source(OpIndex index, const Op& op);
  void expect_fresh(OpIndex index, const Op& op, const ShadowMemory::Cell& cell);
  void compare(FindingKind kind, OpIndex index, const ShadowMemory::Cell& cell, bool writes,
               const Epoch* clock);
  void report(FindingKind kind, std::size_t first, OpIndex second, AddressRange memory);
  StreamIndex stream_of(const Op& op) const { return stream_index_[op.stream]; }

  const std::size_t max_findings_;
  std::vector<Finding> findings_;
  const OpLog* log_ = nullptr;                   // of the running check
  const OpLog::Beginning* beginning_ = nullptr;  // of its part

  std::vector<StreamIndex> stream_index_;  // by StreamId
  StreamIndex num_streams_ = 0;
  std::vector<OpIndex> recorded_by_;  // by EventId: the last record
  Clocks clocks_;
  ShadowMemory memory_;
  std::vector<OpenRead> open_reads_;

  Departure left_;          // the last kLeave, until the caller has gone on
  std::vector<Stay> away_;  // those that have not ended, the outermost first
};

}  // namespace torch_offload
