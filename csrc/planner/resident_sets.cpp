#include "planner/resident_sets.h"

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

namespace torch_offload {

namespace {

using Group = std::vector<UnitIndex>;

// Sets of units are tried in steps of this part of all bytes.
constexpr std::size_t kShareSteps = 128;

// Beside whole layers, so many units of one sort at most: more of them make a layer.
constexpr std::size_t kMostBesideLayers = 8;

/// Whether item `index` of `count` is one of the `chosen` that are spread evenly over them.
bool is_spread(std::size_t index, std::size_t count, std::size_t chosen) {
  return (index + 1) * chosen / count > index * chosen / count;
}

class Builder {
 public:
  explicit Builder(const std::vector<Unit>& units) : units_(units) {}

  /// The set of all units in these groups that `stays` says yes to.
  template <typename Stays>
  ResidentSet set_of(const std::vector<Group>& groups, Stays stays) const {
    ResidentSet set;
    set.resident.assign(units_.size(), false);
    for (std::size_t i = 0; i < groups.size(); ++i) {
      if (stays(i)) {
        add(set, groups[i]);
      }
    }
    return set;
  }

  void add(ResidentSet& set, const Group& group) const {
    for (const UnitIndex unit : group) {
      if (!set.resident[unit]) {
        set.resident[unit] = true;
        set.size_bytes += units_[unit].size_bytes;
      }
    }
  }

 private:
  const std::vector<Unit>& units_;
};

/// The units of each layer, in the order of the layers' first units.
std::vector<Group> layers_of(const std::vector<Unit>& units) {
  std::vector<Group> layers;
  std::map<std::uint32_t, std::size_t> position;
  for (UnitIndex unit = 0; unit < units.size(); ++unit) {
    const auto [found, is_new] = position.emplace(units[unit].layer_index, layers.size());
    if (is_new) {
      layers.emplace_back();
    }
    layers[found->second].push_back(unit);
  }
  return layers;
}

/// Units of one kind and size each, which are the same part of different layers: the most first.
std::vector<Group> sorts_of(const std::vector<Unit>& units) {
  std::map<std::pair<UnitKind, std::size_t>, Group> by_sort;
  for (UnitIndex unit = 0; unit < units.size(); ++unit) {
    by_sort[{units[unit].kind, units[unit].size_bytes}].push_back(unit);
  }
  std::vector<Group> sorts;
  sorts.reserve(by_sort.size());
  for (auto& [key, group] : by_sort) {
    sorts.push_back(std::move(group));
  }
  std::sort(sorts.begin(), sorts.end(), [](const Group& a, const Group& b) {
    return std::make_pair(b.size(), a.front()) < std::make_pair(a.size(), b.front());
  });
  return sorts;
}

std::vector<Group> singly(const Group& units) {
  std::vector<Group> groups;
  groups.reserve(units.size());
  for (const UnitIndex unit : units) {
    groups.push_back({unit});
  }
  return groups;
}

Group all_of(const std::vector<Unit>& units) {
  Group all(units.size());
  for (UnitIndex unit = 0; unit < units.size(); ++unit) {
    all[unit] = unit;
  }
  return all;
}

/// Whole layers, spread evenly; then with up to so many units of one sort beside them.
void add_layers(std::vector<ResidentFamily>& families, const Builder& builder,
                const std::vector<Group>& layers, const std::vector<Group>& sorts) {
  const auto chosen = [&](std::size_t count) {
    return builder.set_of(layers,
                          [&](std::size_t i) { return is_spread(i, layers.size(), count); });
  };
  ResidentFamily whole{"whole layers, spread evenly", {}, /*packs_finely=*/true};
  for (std::size_t count = 0; count <= layers.size(); ++count) {
    whole.sets.push_back(chosen(count));
  }
  families.push_back(std::move(whole));
  // Odd sizes, such as a head's, are a sort of their own: one unit each.
  constexpr std::size_t kMostSorts = 8;
  for (std::size_t sort = 0; sort < std::min(sorts.size(), kMostSorts); ++sort) {
    ResidentFamily beside{"whole layers, spread evenly, and single units beside them", {}};
    for (std::size_t count = 0; count < layers.size(); ++count) {
      const ResidentSet base = chosen(count);
      Group streamed;
      for (const UnitIndex unit : sorts[sort]) {
        if (!base.resident[unit]) {
          streamed.push_back(unit);
        }
      }
      const std::size_t most = std::min(kMostBesideLayers, streamed.size());
      for (std::size_t more = 1; more <= most; ++more) {
        ResidentSet set = base;
        for (std::size_t i = 0; i < streamed.size(); ++i) {
          if (is_spread(i, streamed.size(), more)) {
            builder.add(set, {streamed[i]});
          }
        }
        beside.sets.push_back(std::move(set));
      }
    }
    families.push_back(std::move(beside));
  }
}

/// Units one by one, each staying when its share of the bytes has been earned.
ResidentFamily shares_of(const std::vector<Unit>& units, const Builder& builder) {
  ResidentFamily family{"units, spread evenly by their bytes", {}};
  const std::vector<Group> all = singly(all_of(units));
  for (std::size_t part = 1; part < kShareSteps; ++part) {
    double earned = 0;
    family.sets.push_back(builder.set_of(all, [&](std::size_t i) {
      const auto size = static_cast<double>(units[i].size_bytes);
      earned += size * static_cast<double>(part) / static_cast<double>(kShareSteps);
      const bool stays = earned >= size;
      earned -= stays ? size : 0;
      return stays;
    }));
  }
  return family;
}

/// Units of one kind, spread evenly; where they all stay, some of the other kind as well.
ResidentFamily kind_first(const std::vector<Unit>& units, const Builder& builder, UnitKind kind,
                          const char* rule) {
  Group first;
  Group second;
  for (UnitIndex unit = 0; unit < units.size(); ++unit) {
    (units[unit].kind == kind ? first : second).push_back(unit);
  }
  ResidentFamily family{rule, {}};
  for (std::size_t count = 1; count <= first.size(); ++count) {
    family.sets.push_back(builder.set_of(
        singly(first), [&](std::size_t i) { return is_spread(i, first.size(), count); }));
  }
  for (std::size_t count = 1; !first.empty() && count <= second.size(); ++count) {
    ResidentSet set = builder.set_of(
        singly(second), [&](std::size_t i) { return is_spread(i, second.size(), count); });
    builder.add(set, first);
    family.sets.push_back(std::move(set));
  }
  return family;
}

ResidentFamily at_one_end(const std::vector<Unit>& units, const Builder& builder, bool at_front) {
  ResidentFamily family{at_front ? "the first units" : "the last units", {}};
  const std::vector<Group> all = singly(all_of(units));
  for (std::size_t count = 1; count < units.size(); ++count) {
    family.sets.push_back(builder.set_of(
        all, [&](std::size_t i) { return at_front ? i < count : i + count >= units.size(); }));
  }
  return family;
}

}  // namespace

std::vector<ResidentFamily> resident_families(const std::vector<Unit>& units) {
  const Builder builder(units);
  std::vector<ResidentFamily> families;
  add_layers(families, builder, layers_of(units), sorts_of(units));
  families.push_back(shares_of(units, builder));
  families.push_back(
      kind_first(units, builder, UnitKind::kMha, "attention before FFN, spread evenly"));
  families.push_back(
      kind_first(units, builder, UnitKind::kFfn, "FFN before attention, spread evenly"));
  families.push_back(at_one_end(units, builder, /*at_front=*/true));
  families.push_back(at_one_end(units, builder, /*at_front=*/false));
  for (ResidentFamily& family : families) {
    std::sort(family.sets.begin(), family.sets.end(),
              [](const ResidentSet& a, const ResidentSet& b) {
                return std::tie(a.size_bytes, a.resident) < std::tie(b.size_bytes, b.resident);
              });
  }
  return families;
}

}  // namespace torch_offload
