#include "planner/layouts.h"

#include <algorithm>
#include <cstdint>
#include <map>

namespace torch_offload {

namespace {

// How far ahead copies may run, in parts of the largest unit that is copied and of its layer.
constexpr double kUnitsAhead[] = {0, 0.5, 1, 1.5, 2, 2.5, 3, 4};
constexpr double kLayersAhead[] = {1, 1.5, 2};

}  // namespace

Layouts::Layouts(const PlannerRequest& request, const Packer& packer)
    : request_(request), packer_(packer) {}

/// The roomiest first.
std::vector<Passage> Layouts::passages_of(const Homes& homes) const {
  const HeldBytes held = packer_.held_by(homes);
  std::vector<Passage> passages{{}};
  if (held.slot != 0) {
    passages.push_back({false, 1});
  }
  if (held.largest_copied != 0 && held.largest_decoded != 0) {
    for (std::size_t i = 0, count = passages.size(); i < count; ++i) {
      passages.push_back({true, passages[i].staging_slots});
    }
  }
  return passages;
}

std::vector<Layout> Layouts::of(const Homes& homes) const {
  std::size_t largest = 0;
  std::size_t total = 0;
  std::map<std::uint32_t, std::size_t> layers;
  for (UnitIndex unit = 0; unit < request_.units.size(); ++unit) {
    if (homes.is_copied(unit)) {
      const Unit& copied = request_.units[unit];
      largest = std::max(largest, copied.size_bytes);
      total += copied.size_bytes;
      layers[copied.layer_index] += copied.size_bytes;
    }
  }
  std::vector<std::size_t> layer_sizes;
  layer_sizes.reserve(layers.size());
  for (const auto& [layer, size_bytes] : layers) {
    layer_sizes.push_back(size_bytes);
  }
  // The usual one: a head or a single unit that lost its layer says little about the others.
  std::sort(layer_sizes.begin(), layer_sizes.end());
  const std::size_t layer = layer_sizes.empty() ? 0 : layer_sizes[layer_sizes.size() / 2];
  const auto part_of = [](std::size_t size_bytes, double part) {
    return static_cast<std::size_t>(static_cast<double>(size_bytes) * part);
  };
  std::vector<std::size_t> depths;
  if (request_.depth_bytes) {
    depths.push_back(*request_.depth_bytes);
  }
  for (const double part : kUnitsAhead) {
    depths.push_back(part_of(largest, part));
  }
  for (const double part : kLayersAhead) {
    depths.push_back(part_of(layer, part));
  }
  std::sort(depths.begin(), depths.end());
  depths.erase(std::unique(depths.begin(), depths.end()), depths.end());
  std::vector<Layout> layouts;
  for (const Passage& passage : passages_of(homes)) {
    layouts.push_back({passage, true, 0});
    for (const std::size_t depth : depths) {
      const bool is_asked_for = depth <= request_.depth_bytes.value_or(SIZE_MAX);
      if (is_asked_for && (depth < total || depth == 0)) {
        layouts.push_back({passage, false, depth});
      }
    }
  }
  return layouts;
}

std::optional<Plan> Layouts::lay_out(const Homes& homes, const Layout& layout,
                                     std::size_t budget_bytes) const {
  const HeldBytes held = packer_.held_by(homes);
  const auto [one_ring, staging_slots] = layout.passage;
  const std::size_t held_bytes = held.total(staging_slots);
  const std::size_t room = budget_bytes - std::min(budget_bytes, held_bytes);
  std::size_t num_placed = 0;
  std::size_t num_copied = 0;
  for (UnitIndex unit = 0; unit < request_.units.size(); ++unit) {
    num_placed += homes.resident[unit] ? 0U : 1U;
    num_copied += homes.is_copied(unit) ? 1U : 0U;
  }
  const std::size_t ahead =
      layout.is_single || num_copied < 2 ? 0 : std::min(layout.depth_bytes, held.largest_copied);
  const std::size_t least = one_ring ? std::max(held.largest_copied + ahead, held.largest_decoded)
                                     : held.largest_copied + ahead + held.largest_decoded;
  if (held_bytes > budget_bytes || least > room) {
    return std::nullopt;
  }
  PlanRequest planned;
  planned.units = request_.units;
  planned.resident = homes.resident;
  planned.transports = homes.transports;
  planned.depth_bytes = layout.depth_bytes;
  planned.one_ring = one_ring;
  planned.staging_slots = staging_slots;
  if (layout.is_single) {
    planned.window_bytes = single_window_bytes(homes, held, one_ring);
    if (*planned.window_bytes > room) {
      return std::nullopt;
    }
  }
  std::optional<Plan> plan = try_make_plan(planned, room);
  if (!plan) {
    return std::nullopt;
  }
  for (UnitIndex unit = 0; unit < plan->units.size(); ++unit) {
    const std::size_t num_decoded = num_placed - num_copied;
    const std::size_t num_in_ring =
        one_ring ? num_placed : (homes.is_copied(unit) ? num_copied : num_decoded);
    if (!plan->is_resident(unit) && plan->overlaps[unit].empty() && num_in_ring > 1) {
      return std::nullopt;
    }
  }
  return plan;
}

/// The window for one unit at a time; beside it, in a ring of their own, those that stay packed are
/// decoded while a kernel runs.
std::size_t Layouts::single_window_bytes(const Homes& homes, const HeldBytes& held,
                                         bool one_ring) const {
  if (one_ring || held.largest_copied == 0 || held.largest_decoded == 0) {
    return std::max(held.largest_copied, held.largest_decoded);
  }
  PlanRequest decoded;
  decoded.units = request_.units;
  decoded.transports = homes.transports;
  decoded.resident.resize(homes.resident.size());
  for (UnitIndex unit = 0; unit < homes.resident.size(); ++unit) {
    const bool is_decoded = homes.transport(unit) == Transport::kPackedResident;
    decoded.resident[unit] = !is_decoded;
    decoded.transports[unit] = is_decoded ? Transport::kPackedResident : Transport::kRaw;
  }
  return held.largest_copied + make_plan(decoded).window_bytes;
}

}  // namespace torch_offload
