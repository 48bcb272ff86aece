#include "check/shadow_memory.h"

namespace torch_offload {

namespace {

auto position(std::vector<ShadowMemory::Cell>& cells, std::size_t at) {
  return cells.begin() + static_cast<std::ptrdiff_t>(at);
}

}  // namespace

std::size_t ShadowMemory::cut(const AddressRange& range) {
  const auto found = std::partition_point(
      cells_.begin(), cells_.end(), [&](const Cell& cell) { return cell.end <= range.begin; });
  const std::size_t first = cut_at(range.begin, static_cast<std::size_t>(found - cells_.begin()));
  std::uintptr_t reached = range.begin;
  for (std::size_t at = first; reached < range.end; ++at) {
    if (at == cells_.size() || cells_[at].begin > reached) {
      Cell gap;
      gap.begin = reached;
      gap.end = at == cells_.size() ? range.end : std::min(range.end, cells_[at].begin);
      cells_.insert(position(cells_, at), gap);
    } else if (cells_[at].end > range.end) {
      cut_at(range.end, at);
    }
    reached = cells_[at].end;
  }
  return first;
}

/// Cuts the cell `at` in two at `address`, if that lies inside it. Returns the cell that begins at
/// or behind `address`.
std::size_t ShadowMemory::cut_at(std::uintptr_t address, std::size_t at) {
  if (at == cells_.size() || cells_[at].begin >= address) {
    return at;
  }
  Cell upper = cells_[at];
  upper.begin = address;
  upper.first_access = kNone;
  for (OpIndex node = cells_[at].first_access; node != kNone; node = nodes_[node].next) {
    push(upper, nodes_[node].access);
  }
  cells_[at].end = address;
  cells_.insert(position(cells_, at + 1), upper);
  return at + 1;
}

}  // namespace torch_offload
