#include "planner/packing.h"

#include <algorithm>
#include <functional>
#include <map>
#include <set>
#include <utility>

namespace torch_offload {

namespace {

// Parts of the layers that are tried, of those that stay and of those that stream.
constexpr std::uint32_t kQuarters = 4;
constexpr std::uint32_t kEighths = 8;

// Of sizes of a slot below that of the largest unit. Units come in few sizes: these are the ones of
// whole modules.
constexpr std::size_t kMostSmallerSlots = 2;

/// A row's layers, to be told one after the other whether they are among those chosen.
class Spread {
 public:
  Spread(std::uint32_t count, std::uint32_t chosen) : count_(count), chosen_(chosen) {}
  bool next() {
    ++index_;
    return index_ * chosen_ / count_ > (index_ - 1) * chosen_ / count_;
  }

 private:
  std::uint32_t index_ = 0;
  std::uint32_t count_;
  std::uint32_t chosen_;
};

}  // namespace

Packer::Packer(const std::vector<Unit>& units, std::vector<std::size_t> packed_bytes,
               PackingPolicy policy)
    : units_(units), packed_bytes_(std::move(packed_bytes)), policy_(policy) {
  packed_bytes_.resize(units.size(), 0);
  std::map<std::uint32_t, std::uint32_t> position;
  for (const Unit& unit : units) {
    layer_of_.push_back(position.emplace(unit.layer_index, position.size()).first->second);
  }
  num_layers_ = static_cast<std::uint32_t>(position.size());
}

/// Layers with a unit that stays, and layers with one that does not.
std::pair<std::uint32_t, std::uint32_t> Packer::count_layers(const ResidentSet& set) const {
  std::vector<bool> keeps(num_layers_, false);
  std::vector<bool> streams(num_layers_, false);
  for (UnitIndex unit = 0; unit < layer_of_.size(); ++unit) {
    (set.resident[unit] ? keeps : streams)[layer_of_[unit]] = true;
  }
  const auto count = [](const std::vector<bool>& layers) {
    return static_cast<std::uint32_t>(std::count(layers.begin(), layers.end(), true));
  };
  return {count(keeps), count(streams)};
}

/// Slots that hold some of the units that stream, but not the largest.
std::vector<std::size_t> Packer::smaller_slots(const ResidentSet& set) const {
  std::set<std::size_t, std::greater<>> sizes;
  for (UnitIndex unit = 0; unit < layer_of_.size(); ++unit) {
    if (!set.resident[unit] && packed_bytes_[unit] > 0) {
      sizes.insert(aligned_size(packed_bytes_[unit]));
    }
  }
  std::vector<std::size_t> slots(sizes.begin(), sizes.end());
  if (!slots.empty()) {
    slots.erase(slots.begin());
  }
  slots.resize(std::min(slots.size(), kMostSmallerSlots));
  return slots;
}

std::vector<Packing> Packer::packings_of(const ResidentFamily& family,
                                         const ResidentSet& set) const {
  const auto [kept, streamed] = count_layers(set);
  std::vector<std::uint32_t> plain{0, kept};
  if (family.packs_finely) {
    // Where everything stays, what does not fit as it is is packed: every layer counts.
    const std::uint32_t parts = streamed == 0 ? kept : kQuarters;
    for (std::uint32_t part = 1; part < parts; ++part) {
      plain.push_back(kept * part / parts);
    }
  }
  std::vector<std::uint32_t> packed{streamed};
  if (policy_ == PackingPolicy::kWherePays && streamed > 0) {
    const std::uint32_t parts = family.packs_finely ? kEighths : 1;
    for (std::uint32_t part = 0; part < parts; ++part) {
      packed.push_back(streamed * part / parts);
    }
  }
  for (std::vector<std::uint32_t>* counts : {&plain, &packed}) {
    std::sort(counts->begin(), counts->end());
    counts->erase(std::unique(counts->begin(), counts->end()), counts->end());
  }
  std::vector<Packing> packings;
  packings.reserve(plain.size() * packed.size());
  for (const std::uint32_t plain_layers : plain) {
    for (const std::uint32_t packed_layers : packed) {
      packings.push_back({kept, plain_layers, streamed, packed_layers});
    }
  }
  if (policy_ == PackingPolicy::kWherePays && streamed > 0) {
    for (const std::size_t slot_bytes : smaller_slots(set)) {
      packings.push_back({kept, /*plain_layers=*/0, streamed, streamed, slot_bytes});
    }
  }
  return packings;
}

void Packer::pack(const ResidentSet& set, const Packing& packing, Homes& homes) const {
  Spread plain(packing.kept_layers, packing.plain_layers);
  Spread packed(packing.streamed_layers, packing.packed_layers);
  // What was said of each layer when its first unit came.
  std::vector<std::int8_t> is_plain(num_layers_, -1);
  std::vector<std::int8_t> is_packed(num_layers_, -1);
  const auto ask = [](std::int8_t& answer, Spread& spread) {
    if (answer < 0) {
      answer = spread.next() ? 1 : 0;
    }
    return answer > 0;
  };
  homes.resident.resize(layer_of_.size());
  homes.transports.resize(layer_of_.size());
  for (UnitIndex unit = 0; unit < layer_of_.size(); ++unit) {
    const std::uint32_t layer = layer_of_[unit];
    const bool can_be_packed = packed_bytes_[unit] > 0;
    if (set.resident[unit]) {
      const bool stays_plain = ask(is_plain[layer], plain) || !can_be_packed;
      homes.resident[unit] = stays_plain;
      homes.transports[unit] = stays_plain ? Transport::kRaw : Transport::kPackedResident;
    } else {
      const bool has_slot = aligned_size(packed_bytes_[unit]) <= packing.most_slot_bytes;
      const bool travels_packed = ask(is_packed[layer], packed) && can_be_packed && has_slot;
      homes.resident[unit] = false;
      homes.transports[unit] = travels_packed ? Transport::kPacked : Transport::kRaw;
    }
  }
}

HeldBytes Packer::held_by(const Homes& homes) const {
  HeldBytes held;
  for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
    const std::size_t size_bytes = units_[unit].size_bytes;
    const std::size_t packed_bytes = aligned_size(packed_bytes_[unit]);
    switch (homes.transport(unit)) {
      case Transport::kRaw:
        if (homes.resident[unit]) {
          held.resident += size_bytes;
        } else {
          held.largest_copied = std::max(held.largest_copied, size_bytes);
        }
        break;
      case Transport::kPacked:
        held.slot = std::max(held.slot, packed_bytes);
        held.largest_copied = std::max(held.largest_copied, size_bytes);
        break;
      case Transport::kPackedResident:
        held.packed_resident += packed_bytes;
        held.largest_decoded = std::max(held.largest_decoded, size_bytes);
        break;
    }
  }
  return held;
}

std::string packing_rule(const Homes& homes) {
  std::size_t plain = 0;
  std::size_t kept = 0;
  std::size_t raw = 0;
  std::size_t packed = 0;
  for (UnitIndex unit = 0; unit < homes.resident.size(); ++unit) {
    switch (homes.transport(unit)) {
      case Transport::kRaw:
        ++(homes.resident[unit] ? plain : raw);
        break;
      case Transport::kPacked:
        ++packed;
        break;
      case Transport::kPackedResident:
        ++kept;
        break;
    }
  }
  std::string rule;
  if (kept > 0) {
    rule += plain > 0 ? ", some of them packed" : ", packed";
  }
  if (packed > 0) {
    rule += raw > 0 ? "; part of the rest travels packed" : "; the rest travels packed";
  }
  return rule;
}

}  // namespace torch_offload
