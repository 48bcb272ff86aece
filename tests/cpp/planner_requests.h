#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "planner/planner.h"
#include "sim/simulate.h"

namespace torch_offload {

constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr double kLink = 55.2e9;

inline std::size_t total_bytes(const std::vector<Unit>& units) {
  std::size_t total = 0;
  for (const Unit& unit : units) {
    total += unit.size_bytes;
  }
  return total;
}

inline std::int64_t copy_ns(const Unit& unit) {
  return static_cast<std::int64_t>(static_cast<double>(unit.size_bytes) / kLink * 1e9);
}

/// Llama-70B's layers: attention of 302 MB, FFN of 1.41 GB.
inline std::vector<Unit> llama_layers(std::uint32_t num_layers) {
  std::vector<Unit> units;
  for (std::uint32_t layer = 0; layer < num_layers; ++layer) {
    const std::string name = "layers." + std::to_string(layer);
    units.push_back({name + ".self_attn", 288 * kMiB, layer, UnitKind::kMha});
    units.push_back({name + ".mlp", 1344 * kMiB, layer, UnitKind::kFfn});
  }
  return units;
}

inline std::vector<Unit> llama_leaves(std::uint32_t num_layers) {
  std::vector<Unit> units;
  for (std::uint32_t layer = 0; layer < num_layers; ++layer) {
    for (const std::size_t size : {128U, 16U, 16U, 128U, 448U, 448U, 448U}) {
      units.push_back({"leaf" + std::to_string(units.size()), size * kMiB, layer,
                       size > 200 ? UnitKind::kFfn : UnitKind::kMha});
    }
  }
  return units;
}

/// A forward whose kernels take `ratio` times as long as the copies of everything.
inline ExpectedForward forward_of(const std::vector<Unit>& units, double ratio) {
  ExpectedForward forward;
  for (const Unit& unit : units) {
    forward.compute_ns.push_back(
        static_cast<std::int64_t>(ratio * static_cast<double>(copy_ns(unit))));
  }
  return forward;
}

inline PlannerRequest request_of(std::vector<Unit> units, const std::vector<double>& ratios) {
  PlannerRequest request;
  for (const double ratio : ratios) {
    request.forwards.push_back(forward_of(units, ratio));
  }
  request.units = std::move(units);
  request.link_bytes_per_second = kLink;
  return request;
}

inline PlannerRequest random_request(std::mt19937& random, std::uint32_t most_layers = 8) {
  std::vector<Unit> units;
  const std::uint32_t num_layers = 2 + random() % (most_layers - 1);
  const std::size_t mha = (1 + random() % 20) * kMiB;
  const std::size_t ffn = (1 + random() % 40) * kMiB;
  for (std::uint32_t layer = 0; layer < num_layers; ++layer) {
    const bool is_odd = random() % 8 == 0;
    units.push_back({"a", is_odd ? mha * 2 : mha, layer, UnitKind::kMha});
    units.push_back({"f", ffn, layer, UnitKind::kFfn});
  }
  if (random() % 3 == 0) {
    units.push_back({"head", (1 + random() % 60) * kMiB, num_layers, UnitKind::kFfn});
  }
  PlannerRequest request = request_of(std::move(units), {});
  for (std::size_t i = 0; i <= random() % 2; ++i) {
    ExpectedForward forward = forward_of(request.units, 0.02 + 0.01 * (random() % 250));
    for (std::int64_t& time_ns : forward.compute_ns) {
      time_ns = time_ns * static_cast<std::int64_t>(50 + random() % 100) / 100;
    }
    request.forwards.push_back(std::move(forward));
  }
  return request;
}

inline std::size_t least_budget_of(const std::vector<Unit>& units) {
  PlannerRequest request;
  request.units = units;
  return least_budget_bytes(request);
}

inline std::size_t random_budget(std::mt19937& random, const std::vector<Unit>& units) {
  const std::size_t least = least_budget_of(units);
  return least + (random() % 1000) * (total_bytes(units) - least) / 999;
}

inline std::vector<UnitIndex> in_order(std::size_t count) {
  std::vector<UnitIndex> sequence(count);
  for (std::size_t i = 0; i < count; ++i) {
    sequence[i] = static_cast<UnitIndex>(i);
  }
  return sequence;
}

/// What a plan takes, run by itself.
inline double simulated_ns(const PlannerRequest& request, const Plan& plan) {
  double sum_ns = 0;
  for (const ExpectedForward& forward : request.forwards) {
    SimRequest run;
    run.plan = plan;
    run.packed_bytes = request.packed_bytes;
    run.costs.compute_ns = forward.compute_ns;
    run.costs.copy_bytes_per_second = kLink;
    run.passes.assign(3, in_order(plan.units.size()));
    if (request.packing != PackingPolicy::kNever) {
      run.costs.decode_bytes_per_second = request.decode_bytes_per_second;
    }
    run.keep_log = false;
    const SimResult result = simulate(run);
    sum_ns += forward.weight * static_cast<double>(result.pass_end_ns[2] - result.pass_end_ns[1]);
  }
  return sum_ns;
}

}  // namespace torch_offload
