#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "core/op_log.h"

namespace torch_offload::lanes {

/// Runs a small log in every order that streams, events and the host allow, by brute force.
///
/// Knows nothing of clocks: a stream runs its ops one after the other once they were submitted, a
/// wait stands until the record that it means has run, the host goes through its own ops in the
/// order of the log. What must hold for no order to go wrong is read off the orders themselves.
class Linearisations {
 public:
  using Mask = std::uint32_t;
  static constexpr std::size_t kMaxOps = 32;

  /// Gives up (`is_complete` is false) behind `limit` orders.
  Linearisations(const OpLog& log, std::uint64_t limit) : ops_(log.ops()), limit_(limit) {
    ran_before_.assign(ops_.size(), 0);
    for (std::size_t i = 0; i < ops_.size(); ++i) {
      needs_.push_back(needs(i));
    }
    run(0);
  }

  std::uint64_t count() const { return count_; }
  bool is_complete() const { return count_ < limit_; }

  /// Whether `first` ran before `second` in every order.
  bool always_before(std::size_t first, std::size_t second) const {
    return (ran_before_[first] >> second & 1U) == 0;
  }

  /// Whether in some order unit and generation of a read are not those of the bytes it finds.
  bool finds_other_bytes(std::size_t read) const { return stale_.count(read) > 0; }
  /// Whether in some order the op meets memory that was given up before it was submitted.
  bool meets_given_up_memory(std::size_t op) const { return after_free_.count(op) > 0; }

 private:
  static bool is_of_stream(const Op& op) {
    return op.stream != kNoStream && op.kind != OpKind::kSynchronize;
  }
  static Mask bit(std::size_t op) { return Mask{1} << op; }

  /// What must have run before op `i` can.
  Mask needs(std::size_t i) const {
    const Op& op = ops_[i];
    Mask mask = 0;
    for (std::size_t j = 0; j < i; ++j) {
      const Op& earlier = ops_[j];
      const bool is_host_before = !is_of_stream(earlier);  // before the host submitted or did `i`
      const bool is_stream_before = is_of_stream(op) && earlier.stream == op.stream;
      const bool is_waited_for =
          op.kind == OpKind::kSynchronize && earlier.stream == op.stream && is_of_stream(earlier);
      if (is_host_before || is_stream_before || is_waited_for) {
        mask |= bit(j);
      }
    }
    if (op.kind == OpKind::kWait || (op.kind == OpKind::kQuery && op.is_done)) {
      for (std::size_t j = i; j-- > 0;) {
        if (ops_[j].kind == OpKind::kRecord && ops_[j].event == op.event) {
          return mask | bit(j);
        }
      }
    }
    return mask;
  }

  void run(Mask done) {
    bool is_last = true;
    for (std::size_t i = 0; i < ops_.size() && is_complete(); ++i) {
      if ((done & bit(i)) != 0 || (needs_[i] & ~done) != 0) {
        continue;
      }
      is_last = false;
      ran_before_[i] |= done;
      const std::map<std::uintptr_t, const Op*> before = contents_;
      touch(i);
      run(done | bit(i));
      contents_ = before;
    }
    count_ += is_last ? 1U : 0U;
  }

  void touch(std::size_t i) {
    const Op& op = ops_[i];
    switch (op.kind) {
      case OpKind::kCopy:
        use(i, op.source);
        use(i, op.memory);
        put(op);
        break;
      case OpKind::kDecode:
        use(i, op.source, /*is_content=*/true);
        use(i, op.memory);
        put(op);
        break;
      case OpKind::kFill:
        use(i, op.memory);
        put(op);
        break;
      case OpKind::kRead:
        use(i, op.memory, /*is_content=*/true);
        break;
      case OpKind::kHostWrite:
      case OpKind::kAllocate:
      case OpKind::kFree:
      case OpKind::kUnregister:
        put(op);
        break;
      case OpKind::kRegister:
      case OpKind::kHostRead:  // whoever the memory belongs to now
        for_each_slice(op.memory, [&](std::uintptr_t at) {
          if (is_given_up(at)) {
            contents_.erase(at);
          }
        });
        break;
      default:
        break;
    }
  }

  template <typename Visit>
  static void for_each_slice(const AddressRange& memory, const Visit& visit) {
    for (std::uintptr_t at = memory.begin; at < memory.end; at += kAlignmentBytes) {
      visit(at);
    }
  }

  bool is_given_up(std::uintptr_t at) const {
    const auto found = contents_.find(at);
    return found != contents_.end() &&
           (found->second->kind == OpKind::kFree || found->second->kind == OpKind::kUnregister);
  }

  void put(const Op& op) {
    const bool takes_memory = !is_onload(op.kind) && op.kind != OpKind::kFill;
    for_each_slice(op.memory, [&](std::uintptr_t at) {
      if (takes_memory || !is_given_up(at)) {
        contents_[at] = &op;
      }
    });
  }

  /// Of what `is_content`, the bytes must be those of the op's unit and generation.
  void use(std::size_t i, const AddressRange& memory, bool is_content = false) {
    const Op& op = ops_[i];
    for_each_slice(memory, [&](std::uintptr_t at) {
      const auto found = contents_.find(at);
      if (is_given_up(at)) {
        if (found->second < &op) {  // else it was given up in flight
          after_free_.insert(i);
        }
      } else if (is_content && op.generation != 0 && found != contents_.end() &&
                 !is_meant(*found->second, op)) {
        stale_.insert(i);
      }
    });
  }

  /// Whether what `writer` has left is what `reader` is for. What stays packed on the device was
  /// copied for every generation.
  static bool is_meant(const Op& writer, const Op& reader) {
    const bool stays =
        reader.kind == OpKind::kDecode && writer.kind == OpKind::kCopy && writer.generation == 0;
    return is_onload(writer.kind) && writer.unit == reader.unit &&
           (writer.generation == reader.generation || stays);
  }

  const std::vector<Op>& ops_;
  const std::uint64_t limit_;
  std::uint64_t count_ = 0;
  std::vector<Mask> needs_;
  std::vector<Mask> ran_before_;                  // by op: all that ran before it in some order
  std::map<std::uintptr_t, const Op*> contents_;  // by slice: who wrote last in this order
  std::set<std::size_t> stale_;
  std::set<std::size_t> after_free_;
};

}  // namespace torch_offload::lanes
