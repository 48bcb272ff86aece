#include "planner/unit_costs.h"

#include <algorithm>
#include <cstddef>

namespace torch_offload {

UnitCosts::UnitCosts(const PlannerRequest& request)
    : request_(request),
      sequence_(request.sequence),
      raw_ns_(request.units.size(), 0),
      packed_ns_(request.units.size(), 0),
      decode_ns_(request.units.size(), 0) {
  if (sequence_.empty()) {
    for (UnitIndex unit = 0; unit < request_.units.size(); ++unit) {
      sequence_.push_back(unit);
    }
  }
  compute_ns_.assign(request_.forwards.size(), 0);
  for (const UnitIndex unit : sequence_) {
    raw_ns_[unit] += static_cast<double>(raw_copy_ns(unit));
    if (request_.packed_bytes_of(unit) > 0) {
      packed_ns_[unit] += static_cast<double>(packed_copy_ns(unit));
      decode_ns_[unit] += static_cast<double>(request_.units[unit].size_bytes) * 1e9 /
                          request_.decode_bytes_per_second;
    }
    launch_ns_ += request_.launch_ns.empty() ? 0.0 : static_cast<double>(request_.launch_ns[unit]);
    for (std::size_t i = 0; i < request_.forwards.size(); ++i) {
      compute_ns_[i] += static_cast<double>(request_.forwards[i].compute_ns[unit]);
    }
  }
}

std::int64_t UnitCosts::raw_copy_ns(UnitIndex unit) const {
  if (request_.copy_ns) {
    return request_.copy_ns->at(unit);
  }
  return request_.copy_latency_ns +
         static_cast<std::int64_t>(static_cast<double>(request_.units[unit].size_bytes) * 1e9 /
                                   request_.link_bytes_per_second);
}

std::int64_t UnitCosts::packed_copy_ns(UnitIndex unit) const {
  const auto packed = static_cast<double>(request_.packed_bytes_of(unit));
  if (request_.copy_ns) {
    const double part = packed / static_cast<double>(request_.units[unit].size_bytes);
    return static_cast<std::int64_t>(static_cast<double>(request_.copy_ns->at(unit)) * part);
  }
  return request_.copy_latency_ns +
         static_cast<std::int64_t>(packed * 1e9 / request_.link_bytes_per_second);
}

double UnitCosts::least_ns(const Homes& homes, std::size_t staging_slots) const {
  double copies_ns = 0;
  double decodes_ns = 0;
  double slot_ns = 0;  // of the one slot: filled, decoded, filled ...
  for (UnitIndex unit = 0; unit < homes.resident.size(); ++unit) {
    switch (homes.transport(unit)) {
      case Transport::kRaw:
        copies_ns += homes.resident[unit] ? 0.0 : raw_ns_[unit];
        break;
      case Transport::kPacked:
        copies_ns += packed_ns_[unit];
        decodes_ns += decode_ns_[unit];
        slot_ns += packed_ns_[unit] + decode_ns_[unit];
        break;
      case Transport::kPackedResident:
        decodes_ns += decode_ns_[unit];
        break;
    }
  }
  const double link_ns = staging_slots == 1 ? std::max(copies_ns, slot_ns) : copies_ns;
  double sum_ns = 0;
  for (std::size_t i = 0; i < compute_ns_.size(); ++i) {
    sum_ns +=
        request_.forwards[i].weight * std::max({link_ns, compute_ns_[i] + decodes_ns, launch_ns_});
  }
  return sum_ns;
}

std::optional<std::vector<std::int64_t>> UnitCosts::copy_ns(const Homes& homes) const {
  if (!request_.copy_ns) {
    return std::nullopt;
  }
  std::vector<std::int64_t> times_ns;
  times_ns.reserve(homes.resident.size());
  for (UnitIndex unit = 0; unit < homes.resident.size(); ++unit) {
    times_ns.push_back(homes.transport(unit) == Transport::kPacked ? packed_copy_ns(unit)
                                                                   : raw_copy_ns(unit));
  }
  return times_ns;
}

}  // namespace torch_offload
