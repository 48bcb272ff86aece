#include "planner/planner.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "core/error.h"
#include "planner/search.h"

namespace torch_offload {

namespace {

void check_request(const PlannerRequest& request) {
  check_units(request.units);
  if (request.forwards.empty()) {
    throw ValueError("expected at least one kind of forward to plan for, got none");
  }
  for (const ExpectedForward& forward : request.forwards) {
    if (forward.compute_ns.size() != request.units.size()) {
      throw ValueError("expected compute times of " + std::to_string(request.units.size()) +
                       " units, got " + std::to_string(forward.compute_ns.size()));
    }
    if (!(forward.weight > 0) || !std::isfinite(forward.weight)) {
      throw ValueError("expected the weight of a forward above 0, got " +
                       std::to_string(forward.weight));
    }
  }
  if (!request.copy_ns && !(request.link_bytes_per_second > 0)) {
    throw ValueError("expected a link rate above 0 bytes per second, got " +
                     std::to_string(request.link_bytes_per_second));
  }
  if (request.copy_ns && request.copy_ns->size() != request.units.size()) {
    throw ValueError("expected copy times of " + std::to_string(request.units.size()) +
                     " units, got " + std::to_string(request.copy_ns->size()));
  }
  if (!request.launch_ns.empty() && request.launch_ns.size() != request.units.size()) {
    throw ValueError("expected launch times of " + std::to_string(request.units.size()) +
                     " units, got " + std::to_string(request.launch_ns.size()));
  }
  if (!request.packed_bytes.empty() && request.packed_bytes.size() != request.units.size()) {
    throw ValueError("expected packed sizes of " + std::to_string(request.units.size()) +
                     " units, got " + std::to_string(request.packed_bytes.size()));
  }
  if (request.packing != PackingPolicy::kNever && !(request.decode_bytes_per_second > 0)) {
    throw ValueError("expected a rate of the decoder above 0 bytes per second, got " +
                     std::to_string(request.decode_bytes_per_second));
  }
  for (const UnitIndex unit : request.sequence) {
    if (unit >= request.units.size()) {
      throw IndexError("expected a sequence of the " + std::to_string(request.units.size()) +
                       " units, counted from 0, got unit " + std::to_string(unit));
    }
  }
}

}  // namespace

PackingPolicy parse_packing_policy(const std::string& name) {
  const std::pair<const char*, PackingPolicy> policies[] = {{"raw", PackingPolicy::kNever},
                                                            {"auto", PackingPolicy::kWherePays},
                                                            {"packed", PackingPolicy::kAlways}};
  for (const auto& [known, policy] : policies) {
    if (name == known) {
      return policy;
    }
  }
  throw ValueError("expected the transport to be 'raw', 'auto' or 'packed', got '" + name + "'");
}

Choice choose_plan(const PlannerRequest& request, std::size_t budget_bytes) {
  check_request(request);
  return Search(request).with_budget(budget_bytes);
}

Choice choose_transports(const PlannerRequest& request, const Plan& plan) {
  check_request(request);
  if (plan.units.size() != request.units.size()) {
    throw ValueError("expected a plan of " + std::to_string(request.units.size()) +
                     " units, got one of " + std::to_string(plan.units.size()));
  }
  return Search(request).in_places(plan);
}

std::size_t least_budget_bytes(const PlannerRequest& request) {
  check_units(request.units);
  std::size_t window = 0;
  std::size_t packed = 0;
  std::size_t all = 0;
  for (UnitIndex unit = 0; unit < request.units.size(); ++unit) {
    window = std::max(window, request.units[unit].size_bytes);
    packed = std::max(packed, aligned_size(request.packed_bytes_of(unit)));
    all += request.units[unit].size_bytes;
  }
  if (request.packing != PackingPolicy::kAlways) {
    return window;
  }
  return std::min(all, window + packed);
}

}  // namespace torch_offload
