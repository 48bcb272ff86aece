#include "core/plan.h"

#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <utility>

#include "core/error.h"

namespace torch_offload {

namespace {

// Leaves need less than a layer ahead: see docs/design.md, Note [How far ahead].
constexpr double kLeafDepth = 2.5;

// Candidate windows grow in steps of this part of the largest unit.
constexpr std::size_t kWindowSteps = 64;

// So many windows are tried in such steps, and about as many again in coarser ones.
constexpr std::size_t kFineTries = 256;

/// Units of a plan that share bytes in turn, in their order, and where each lies.
struct Ring {
  std::vector<UnitIndex> order;
  std::vector<std::size_t> sizes;
  std::vector<ByteRange> places;
  std::size_t window_bytes = 0;
};

void place(Ring& ring, std::size_t window_limit) {
  ring.places.clear();
  ring.window_bytes = 0;
  std::size_t cursor = 0;
  for (const std::size_t size : ring.sizes) {
    if (cursor + size > window_limit) {
      cursor = 0;
    }
    ring.places.push_back({cursor, cursor + size});
    cursor += size;
    ring.window_bytes = std::max(ring.window_bytes, cursor);
  }
}

/// Whether, while any unit is in use, copies may run `depth_bytes` ahead of it, and at least one
/// unit, across the seam from the last unit to the first as well.
///
/// Places follow each other upwards until the ring starts again at 0, so one sweep over two passes
/// finds for each unit the first later one that meets its bytes: time linear in the units.
bool runs_ahead(const Ring& ring, std::size_t depth_bytes) {
  struct Occupant {
    std::size_t step;           // of the sweep in which it was placed
    std::size_t bytes_through;  // of all placed up to and including it
  };
  const std::size_t count = ring.sizes.size();
  std::vector<Occupant> below;  // placed since the ring started again, by address
  std::deque<Occupant> above;   // placed before and not met since, by address
  std::size_t bytes_before = 0;
  for (std::size_t step = 0; step < 2 * count; ++step) {
    const ByteRange& place = ring.places[step % count];
    if (place.begin == 0) {
      above.insert(above.begin(), below.begin(), below.end());
      below.clear();
    }
    while (!above.empty() && ring.places[above.front().step % count].begin < place.end) {
      const Occupant met = above.front();
      above.pop_front();
      const std::size_t distance = step - met.step;
      const bool is_ahead = distance == 1 || bytes_before - met.bytes_through < depth_bytes;
      if (distance < count && is_ahead) {
        return false;
      }
    }
    bytes_before += ring.sizes[step % count];
    below.push_back({step, bytes_before});
  }
  return true;
}

/// The units that have places, not placed yet: of the ring of those that stay packed, or of the
/// others.
Ring ring_of(const PlanRequest& request, bool stays_packed) {
  Ring ring;
  for (std::size_t i = 0; i < request.units.size(); ++i) {
    const bool is_resident = !request.resident.empty() && request.resident[i];
    const bool is_in_second = !request.one_ring && !request.transports.empty() &&
                              request.transports[i] == Transport::kPackedResident;
    if (!is_resident && is_in_second == stays_packed) {
      ring.order.push_back(static_cast<UnitIndex>(i));
      ring.sizes.push_back(request.units[i].size_bytes);
    }
  }
  return ring;
}

/// No smaller window lets copies run ahead as asked: beside each unit in use, those that may start
/// meanwhile need room, the last of which starts within the depth.
std::size_t least_window_bytes(const std::vector<std::size_t>& sizes, std::size_t depth_bytes) {
  const std::size_t count = sizes.size();
  std::size_t least = 0;
  std::size_t end = 0;     // the units [begin, end) lie side by side, counted on from pass to pass
  std::size_t beside = 0;  // their bytes
  for (std::size_t begin = 0; begin < count; ++begin) {
    if (end == begin) {
      beside += sizes[end++ % count];
    }
    // Whether one more may start: the next always may, others within the depth.
    while (end - begin < count && (end - begin == 1 || beside - sizes[begin] < depth_bytes)) {
      beside += sizes[end++ % count];
    }
    least = std::max(least, beside);
    beside -= sizes[begin];
  }
  return least;
}

/// Finds the smallest window that lets copies run ahead as asked, or one above `most_bytes` if none
/// below does. Ends at the latest where every unit has bytes of its own.
Ring smallest_ring(Ring ring, std::size_t depth_bytes, std::size_t most_bytes) {
  std::size_t total = 0;
  std::size_t largest = 0;
  for (const std::size_t size_bytes : ring.sizes) {
    total += size_bytes;
    largest = std::max(largest, size_bytes);
  }
  const std::size_t step = std::max(aligned_size(largest / kWindowSteps), kAlignmentBytes);
  // While the largest unit is in use, the bytes ahead of it need room beside it.
  std::size_t window = largest + std::min(depth_bytes, total - largest);
  const std::size_t least = least_window_bytes(ring.sizes, depth_bytes);
  for (std::size_t tries = 1; window < total && window <= most_bytes; ++tries) {
    if (window >= least) {
      place(ring, window);
      if (runs_ahead(ring, depth_bytes)) {
        return ring;
      }
    }
    // Past the first rounds the search need not be fine any more, only short.
    window += tries < kFineTries ? step : std::max(step, total / kFineTries);
  }
  place(ring, total);
  return ring;
}

/// The ring in a window that is there, however far ahead copies can run in it.
Ring ring_within(const std::vector<Unit>& units, Ring ring, std::size_t window_bytes) {
  for (std::size_t i = 0; i < ring.sizes.size(); ++i) {
    if (ring.sizes[i] > window_bytes) {
      throw ValueError("expected a window of at least " + std::to_string(ring.sizes[i]) +
                       " bytes for unit '" + units[ring.order[i]].name + "', got " +
                       std::to_string(window_bytes) + "; raise gpu_budget or depth");
    }
  }
  place(ring, window_bytes);
  ring.window_bytes = window_bytes;
  return ring;
}

Plan plan_from(const PlanRequest& request, const Ring& copied, const Ring& decoded) {
  Plan plan;
  plan.units = request.units;
  plan.transports = request.transports;
  plan.places.resize(plan.units.size());
  for (std::size_t i = 0; i < copied.order.size(); ++i) {
    plan.places[copied.order[i]] = copied.places[i];
  }
  for (std::size_t i = 0; i < decoded.order.size(); ++i) {
    const ByteRange& place = decoded.places[i];
    plan.places[decoded.order[i]] = {copied.window_bytes + place.begin,
                                     copied.window_bytes + place.end};
  }
  plan.window_bytes = copied.window_bytes + decoded.window_bytes;
  plan.overlaps = overlaps_of(plan.places);
  for (UnitIndex unit = 0; unit < plan.units.size(); ++unit) {
    plan.resident_bytes += plan.is_resident(unit) ? plan.units[unit].size_bytes : 0;
  }
  return plan;
}

/// Throws: ValueError unless `given` is of as many answers as there are units, or of none.
void check_answers(const PlanRequest& request, std::size_t given, const char* what) {
  if (given != 0 && given != request.units.size()) {
    throw ValueError(std::string("expected ") + what + " of each of the " +
                     std::to_string(request.units.size()) + " units, got " + std::to_string(given) +
                     " answers");
  }
}

void check_request(const PlanRequest& request) {
  check_units(request.units);
  check_answers(request, request.resident.size(), "resident to say whether it stays");
  check_answers(request, request.transports.size(), "transports to say how it travels");
  if (request.staging_slots == 0) {
    throw ValueError("expected at least one staging slot for packed copies, got 0");
  }
  for (std::size_t i = 0; i < request.transports.size() && i < request.resident.size(); ++i) {
    if (request.resident[i] && request.transports[i] != Transport::kRaw) {
      throw ValueError("expected unit '" + request.units[i].name +
                       "', which stays on the device as it is, to have the transport 'raw', got '" +
                       name_of(request.transports[i]) + "'");
    }
  }
}

}  // namespace

const char* name_of(Transport transport) {
  switch (transport) {
    case Transport::kRaw:
      return "raw";
    case Transport::kPacked:
      return "packed";
    case Transport::kPackedResident:
      return "packed_resident";
  }
  return "?";
}

Transport parse_transport(const std::string& name) {
  for (const Transport transport :
       {Transport::kRaw, Transport::kPacked, Transport::kPackedResident}) {
    if (name == name_of(transport)) {
      return transport;
    }
  }
  throw ValueError("expected a transport of 'raw', 'packed' or 'packed_resident', got '" + name +
                   "'");
}

void check_units(const std::vector<Unit>& units) {
  for (const Unit& unit : units) {
    if (unit.size_bytes == 0 || unit.size_bytes % kAlignmentBytes != 0) {
      throw ValueError("expected the size of unit '" + unit.name +
                       "' to be a positive multiple of " + std::to_string(kAlignmentBytes) +
                       " bytes, got " + std::to_string(unit.size_bytes) + "; use aligned_size()");
    }
  }
}

std::size_t default_depth_bytes(const std::vector<Unit>& units) {
  std::map<std::uint32_t, std::size_t> layers;
  std::size_t largest = 0;
  for (const Unit& unit : units) {
    layers[unit.layer_index] += unit.size_bytes;
    largest = std::max(largest, unit.size_bytes);
  }
  std::size_t layer = 0;
  for (const auto& [index, size_bytes] : layers) {
    layer = std::max(layer, size_bytes);
  }
  return std::min(layer, static_cast<std::size_t>(kLeafDepth * static_cast<double>(largest)));
}

std::vector<std::vector<UnitIndex>> overlaps_of(
    const std::vector<std::optional<ByteRange>>& places) {
  std::vector<std::vector<UnitIndex>> overlaps(places.size());
  // By address: what meets a place begins before it ends.
  std::vector<std::pair<ByteRange, UnitIndex>> by_begin;
  for (UnitIndex unit = 0; unit < places.size(); ++unit) {
    if (const std::optional<ByteRange>& place = places[unit]) {
      by_begin.emplace_back(*place, unit);
    }
  }
  std::sort(by_begin.begin(), by_begin.end(), [](const auto& a, const auto& b) {
    return std::make_pair(a.first.begin, a.second) < std::make_pair(b.first.begin, b.second);
  });
  for (auto one = by_begin.begin(); one != by_begin.end(); ++one) {
    for (auto other = one + 1; other != by_begin.end() && other->first.begin < one->first.end;
         ++other) {
      overlaps[one->second].push_back(other->second);
      overlaps[other->second].push_back(one->second);
    }
  }
  for (std::vector<UnitIndex>& one : overlaps) {
    std::sort(one.begin(), one.end());
  }
  return overlaps;
}

Plan make_plan(const PlanRequest& request) {
  return try_make_plan(request, SIZE_MAX).value_or(Plan{});  // no window is above that
}

std::optional<Plan> try_make_plan(const PlanRequest& request, std::size_t most_window_bytes) {
  check_request(request);
  const std::vector<Unit>& units = request.units;
  const std::size_t depth_bytes = request.depth_bytes.value_or(default_depth_bytes(units));
  Ring decoded = ring_of(request, /*stays_packed=*/true);
  decoded = smallest_ring(std::move(decoded), request.decode_depth_bytes, most_window_bytes);
  if (!request.window_bytes && decoded.window_bytes > most_window_bytes) {
    return std::nullopt;
  }
  Ring copied = ring_of(request, /*stays_packed=*/false);
  if (request.window_bytes) {
    const std::size_t beside = std::min(decoded.window_bytes, *request.window_bytes);
    copied = ring_within(units, std::move(copied), *request.window_bytes - beside);
    if (beside < decoded.window_bytes) {
      decoded = ring_within(units, std::move(decoded), beside);
    }
  } else {
    copied =
        smallest_ring(std::move(copied), depth_bytes, most_window_bytes - decoded.window_bytes);
  }
  if (copied.window_bytes > most_window_bytes - decoded.window_bytes) {
    return std::nullopt;
  }
  Plan plan = plan_from(request, copied, decoded);
  plan.depth_bytes = depth_bytes;
  plan.decode_depth_bytes = request.decode_depth_bytes;
  plan.one_ring = request.one_ring;
  plan.staging_slots = request.staging_slots;
  return plan;
}

}  // namespace torch_offload
