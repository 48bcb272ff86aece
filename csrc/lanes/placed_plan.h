#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/plan.h"
#include "core/unit.h"

namespace torch_offload::lanes {

/// Units of layers of attention and FFN; sizes in slices of one alignment each.
inline std::vector<Unit> layers_of(std::size_t num_layers, std::size_t mha_slices,
                                   std::size_t ffn_slices) {
  std::vector<Unit> units;
  for (std::size_t layer = 0; layer < num_layers; ++layer) {
    const std::string name = "layers." + std::to_string(layer);
    const auto index = static_cast<std::uint32_t>(layer);
    units.push_back({name + ".mha", mha_slices * kAlignmentBytes, index, UnitKind::kMha});
    units.push_back({name + ".ffn", ffn_slices * kAlignmentBytes, index, UnitKind::kFfn});
  }
  return units;
}

/// A plan whose units all lie where the caller says; overlaps follow from that.
inline Plan plan_with_places(std::vector<Unit> units, const std::vector<ByteRange>& places,
                             std::size_t depth_bytes) {
  Plan plan;
  plan.units = std::move(units);
  plan.overlaps.resize(places.size());
  plan.depth_bytes = depth_bytes;
  for (std::size_t i = 0; i < places.size(); ++i) {
    plan.places.emplace_back(places[i]);
    plan.window_bytes = std::max(plan.window_bytes, places[i].end);
    for (std::size_t j = 0; j < places.size(); ++j) {
      if (i != j && places[i].overlaps(places[j])) {
        plan.overlaps[i].push_back(static_cast<UnitIndex>(j));
      }
    }
  }
  return plan;
}

}  // namespace torch_offload::lanes
