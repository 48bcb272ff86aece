// What the checker will say of ops that are still to come, from all that it has seen. See
// Note [Merged states] in lanes/merged_passes.cpp.

#include <algorithm>
#include <cstddef>

#include "check/hazard_checker.h"
#include "core/error.h"

namespace torch_offload {

namespace {

constexpr std::uint64_t kNone = UINT64_MAX;

/// Numbers for the epochs of one stream that keep nothing but which clock covers which access.
///
/// A clock is only ever joined with others and compared with accesses, and an access yet to come is
/// beyond every clock but its own stream's. So two values with no access between them are one, and
/// so are two accesses with no value between them.
class EpochRanks {
 public:
  void add_value(Epoch value) { values_.push_back(value); }
  void add_access(Epoch epoch) { accesses_.push_back(epoch); }

  void rank() {
    std::sort(accesses_.begin(), accesses_.end());
    accesses_.erase(std::unique(accesses_.begin(), accesses_.end()), accesses_.end());
    for (Epoch& value : values_) {
      value = num_covered(value);
    }
    std::sort(values_.begin(), values_.end());
    values_.erase(std::unique(values_.begin(), values_.end()), values_.end());
  }
  std::uint64_t of_value(Epoch value) const { return num_below(num_covered(value)); }
  /// Covered by exactly the values whose number is not less.
  std::uint64_t of_access(Epoch epoch) const { return num_below(num_covered(epoch)); }

 private:
  Epoch num_covered(Epoch value) const {
    return static_cast<Epoch>(std::upper_bound(accesses_.begin(), accesses_.end(), value) -
                              accesses_.begin());
  }
  std::uint64_t num_below(Epoch covered) const {
    return static_cast<std::uint64_t>(std::lower_bound(values_.begin(), values_.end(), covered) -
                                      values_.begin());
  }

  std::vector<Epoch> values_;
  std::vector<Epoch> accesses_;
};

}  // namespace

void HazardChecker::append_state(const StateScope& scope, StateWords& words) const {
  check_internal(open_reads_.empty() && away_.empty() && left_.op == ShadowMemory::kNone,
                 "a state in the midst of a use");
  const std::size_t width = scope.streams.size();
  std::vector<StreamIndex> indices;
  std::vector<std::size_t> positions(num_streams_, width);  // by StreamIndex
  for (const StreamId stream : scope.streams) {
    const bool is_known = stream < stream_index_.size();
    indices.push_back(is_known ? stream_index_[stream] : ShadowMemory::kNone);
    if (indices.back() != ShadowMemory::kNone) {
      positions[indices.back()] = indices.size() - 1;
    }
  }
  check_internal(std::count(positions.begin(), positions.end(), width) == 0,
                 "a state of other streams than those that the log names");

  // A stream learns what the host knows before its next op.
  const auto at = [&](const Epoch* clock, std::size_t of) {
    return indices[of] == ShadowMemory::kNone ? 0 : clock[indices[of]];
  };
  std::vector<Epoch> clocks(width * width);
  std::vector<Epoch> known_to_all(width, UINT32_MAX);
  for (std::size_t i = 0; i < width; ++i) {
    for (std::size_t of = 0; of < width; ++of) {
      Epoch& value = clocks[i * width + of];
      value = at(clocks_.of_host(), of);
      if (indices[i] != ShadowMemory::kNone) {
        value = std::max(value, at(clocks_.of_stream(indices[i]), of));
      }
      known_to_all[of] = std::min(known_to_all[of], value);
    }
  }
  const auto is_dropped = [&](const ShadowMemory::Access& access, std::size_t of) {
    return access.epoch <= std::min(known_to_all[of], at(clocks_.of_host(), of));
  };

  std::vector<EpochRanks> ranks(width);
  const auto is_recorded = [&](EventId event) {
    return event < recorded_by_.size() && recorded_by_[event] != ShadowMemory::kNone;
  };
  // Whoever waits for what all streams know learns nothing.
  const auto of_event = [&](EventId event, std::size_t of) {
    return is_recorded(event) ? std::max(known_to_all[of], at(clocks_.of_event(event), of))
                              : known_to_all[of];
  };
  for (std::size_t of = 0; of < width; ++of) {
    for (std::size_t i = 0; i < width; ++i) {
      ranks[of].add_value(clocks[i * width + of]);
    }
    ranks[of].add_value(at(clocks_.of_host(), of));
    for (const EventId event : scope.events) {
      ranks[of].add_value(of_event(event, of));
    }
  }
  memory_.visit_cells([&](const ShadowMemory::Cell& cell) {
    memory_.visit_accesses(cell, [&](const ShadowMemory::Access& access) {
      if (const std::size_t of = positions[access.stream]; !is_dropped(access, of)) {
        ranks[of].add_access(access.epoch);
      }
    });
  });
  for (EpochRanks& one : ranks) {
    one.rank();
  }

  for (std::size_t of = 0; of < width; ++of) {
    for (std::size_t i = 0; i < width; ++i) {
      words.push_back(ranks[of].of_value(clocks[i * width + of]));
    }
    words.push_back(ranks[of].of_value(at(clocks_.of_host(), of)));
  }
  for (const EventId event : scope.events) {
    words.push_back(event << 1U | (is_recorded(event) ? 1U : 0U));
    for (std::size_t of = 0; of < width; ++of) {
      words.push_back(ranks[of].of_value(of_event(event, of)));
    }
  }
  words.push_back(kNone);  // no event
  for (const std::uint64_t generation : scope.generations) {
    words.push_back(generation == 0 ? 0 : 1);  // reads of bytes that were never copied go unjudged
  }
  memory_.visit_cells([&](const ShadowMemory::Cell& cell) {
    check_internal(cell.given_up_by == ShadowMemory::kNone, "a state behind the end of memory");
    words.insert(words.end(), {cell.begin, cell.end});
    if (cell.last_write == ShadowMemory::kNone) {
      words.push_back(kNone);
    } else {
      const Op& op = log_->ops()[cell.last_write];
      words.push_back(std::uint64_t{op.unit} << 8U | static_cast<std::uint64_t>(op.kind));
      words.push_back(is_onload(op.kind) ? scope.generations.at(op.unit) - op.generation : 0);
    }
    words.push_back(0);
    const std::size_t first = words.size();
    memory_.visit_accesses(cell, [&](const ShadowMemory::Access& access) {
      const std::size_t of = positions[access.stream];
      if (is_dropped(access, of)) {
        return;
      }
      const bool is_allocation = log_->ops()[access.op].kind == OpKind::kAllocate;
      words.push_back(of << 40U | ranks[of].of_access(access.epoch) << 2U |
                      (access.writes ? 2U : 0U) | (is_allocation ? 1U : 0U));
    });
    std::sort(words.begin() + static_cast<std::ptrdiff_t>(first), words.end());
    words[first - 1] = words.size() - first;
  });
}

}  // namespace torch_offload
