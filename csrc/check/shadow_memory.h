#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "check/clocks.h"
#include "core/op_log.h"

namespace torch_offload {

/// For every byte that a log names: who has touched it and may still be at it.
///
/// Bytes that have always been touched together share a cell. A cell keeps the accesses that a
/// later one must be compared with. An access is dropped when a later one that is ordered behind it
/// makes every comparison for it: a write for all before it, a read for reads. So whoever is
/// unordered with a dropped access is unordered with one that was kept, too.
class ShadowMemory {
 public:
  using OpIndex = std::uint32_t;
  static constexpr OpIndex kNone = UINT32_MAX;

  struct Access {
    Clocks::StreamIndex stream = 0;
    Epoch epoch = 0;
    OpIndex op = kNone;
    bool writes = false;
  };

  struct Cell {
    std::uintptr_t begin = 0;
    std::uintptr_t end = 0;
    OpIndex first_access = kNone;  // of a list in accesses_
    OpIndex last_write = kNone;    // the op that wrote last, in the order of submission
    OpIndex given_up_by = kNone;   // the op that freed or unregistered the bytes last
    bool is_given_up = false;      // and nobody has taken them since

    bool was_given_up_since(OpIndex op) const { return given_up_by != kNone && given_up_by > op; }
  };

  void reset() {
    cells_.clear();
    nodes_.clear();
    first_unused_ = kNone;
  }

  /// Calls `visit` on the cells that make up `range`, from low addresses to high ones.
  template <typename Visit>
  void for_each_cell(const AddressRange& range, const Visit& visit) {
    if (range.begin >= range.end) {
      return;
    }
    std::size_t at = cut(range);
    do {
      visit(cells_[at]);
    } while (cells_[at++].end < range.end);
  }

  template <typename Visit>
  void visit_cells(const Visit& visit) const {
    std::for_each(cells_.begin(), cells_.end(), visit);
  }
  template <typename Visit>
  void visit_accesses(const Cell& cell, const Visit& visit) const {
    for (OpIndex at = cell.first_access; at != kNone; at = nodes_[at].next) {
      visit(nodes_[at].access);
    }
  }

  /// Calls `conflict(access)` on each access to the cell that somebody who knows `clock` cannot
  /// tell to be done; of reads only if he `writes`.
  template <typename Conflict>
  void compare(const Cell& cell, bool writes, const Epoch* clock, const Conflict& conflict) const {
    for (OpIndex at = cell.first_access; at != kNone; at = nodes_[at].next) {
      const Access& access = nodes_[at].access;
      if ((access.writes || writes) && clock[access.stream] < access.epoch) {
        conflict(access);
      }
    }
  }

  /// Adds an access, by somebody who knows `clock`.
  void add(Cell& cell, const Access& access, const Epoch* clock) {
    drop_ordered(cell, access.writes, clock);
    push(cell, access);
    if (access.writes) {
      cell.last_write = access.op;
    }
  }

  /// Notes a write by the host: whatever comes later comes after it.
  void add_host_write(Cell& cell, OpIndex op, const Epoch* clock) {
    drop_ordered(cell, true, clock);
    cell.last_write = op;
  }

  /// Notes that the bytes were given up: nobody is compared with their former users any more.
  static void give_up(Cell& cell, OpIndex op) {
    cell.first_access = cell.last_write = kNone;
    cell.given_up_by = op;
    cell.is_given_up = true;
  }

 private:
  struct Node {
    Access access;
    OpIndex next = kNone;
  };

  void drop_ordered(Cell& cell, bool writes, const Epoch* clock) {
    for (OpIndex* link = &cell.first_access; *link != kNone;) {
      Node& node = nodes_[*link];
      const bool is_covered = writes || !node.access.writes;
      if (is_covered && clock[node.access.stream] >= node.access.epoch) {
        const OpIndex dropped = *link;
        *link = node.next;
        node.next = first_unused_;
        first_unused_ = dropped;
      } else {
        link = &node.next;
      }
    }
  }

  void push(Cell& cell, Access access) {  // by value: it may lie in nodes_, which may grow
    OpIndex at = first_unused_;
    if (at == kNone) {
      at = static_cast<OpIndex>(nodes_.size());
      nodes_.emplace_back();
    } else {
      first_unused_ = nodes_[at].next;
    }
    nodes_[at] = {access, cell.first_access};
    cell.first_access = at;
  }

  /// Makes `range` begin and end where cells do, without a gap; returns its first cell.
  std::size_t cut(const AddressRange& range);
  std::size_t cut_at(std::uintptr_t address, std::size_t at);

  std::vector<Cell> cells_;  // disjoint, by address
  std::vector<Node> nodes_;
  OpIndex first_unused_ = kNone;  // of the nodes that were dropped
};

}  // namespace torch_offload
