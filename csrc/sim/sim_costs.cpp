#include "sim/sim_costs.h"

#include <array>
#include <cmath>
#include <utility>

#include "core/error.h"

namespace torch_offload {

namespace {

void check_time(const std::string& what, std::int64_t time_ns) {
  if (time_ns < 0 || time_ns > kLongestSimTimeNs) {
    throw ValueError("expected " + what + " to be between 0 ns and one hour, got " +
                     std::to_string(time_ns) + " ns");
  }
}

void check_times(const char* what, const std::vector<std::int64_t>& times_ns) {
  for (std::size_t unit = 0; unit < times_ns.size(); ++unit) {
    check_time(std::string(what) + "[" + std::to_string(unit) + "]", times_ns[unit]);
  }
}

std::int64_t duration_ns(const std::string& what, std::size_t size_bytes, double bytes_per_second) {
  constexpr double kNsPerSecond = 1e9;
  const double time_ns = static_cast<double>(size_bytes) / bytes_per_second * kNsPerSecond;
  if (time_ns > static_cast<double>(kLongestSimTimeNs)) {
    throw ValueError("expected " + what + " to take at most one hour, got " +
                     std::to_string(size_bytes) + " bytes at " + std::to_string(bytes_per_second) +
                     " bytes a second");
  }
  return std::llround(time_ns);
}

}  // namespace

std::int64_t& call_cost(SimCallCosts& calls, const std::string& name) {
  const std::array<std::pair<const char*, std::int64_t*>, 5> costs{
      {{"copy", &calls.copy_ns},
       {"record", &calls.record_ns},
       {"wait", &calls.wait_ns},
       {"synchronize", &calls.synchronize_ns},
       {"launch", &calls.launch_ns}}};
  for (const auto& [known, cost] : costs) {
    if (name == known) {
      return *cost;
    }
  }
  throw ValueError(
      "expected call_ns to name 'copy', 'record', 'wait', 'synchronize' or 'launch', got '" + name +
      "'");
}

void check_costs(const SimCosts& costs) {
  if (costs.copy_bytes_per_second.has_value() == costs.copy_ns.has_value()) {
    throw ValueError(std::string("expected the time of copies as copy_bytes_per_second or, unit by "
                                 "unit, as copy_ns, got ") +
                     (costs.copy_ns ? "both" : "neither"));
  }
  if (costs.copy_bytes_per_second &&
      !(std::isfinite(*costs.copy_bytes_per_second) && *costs.copy_bytes_per_second > 0)) {
    throw ValueError("expected copy_bytes_per_second to be a positive number, got " +
                     std::to_string(*costs.copy_bytes_per_second));
  }
  if (costs.decode_bytes_per_second &&
      !(std::isfinite(*costs.decode_bytes_per_second) && *costs.decode_bytes_per_second > 0)) {
    throw ValueError("expected decode_bytes_per_second to be a positive number, got " +
                     std::to_string(*costs.decode_bytes_per_second));
  }
  if (costs.num_copy_engines < 1) {
    throw ValueError("expected num_copy_engines to be at least 1, got " +
                     std::to_string(costs.num_copy_engines));
  }
  check_time("copy_latency_ns", costs.copy_latency_ns);
  check_times("compute_ns", costs.compute_ns);
  check_times("launch_ns", costs.launch_ns);
  if (costs.copy_ns) {
    check_times("copy_ns", *costs.copy_ns);
  }
  check_time("call_ns['copy']", costs.calls.copy_ns);
  check_time("call_ns['record']", costs.calls.record_ns);
  check_time("call_ns['wait']", costs.calls.wait_ns);
  check_time("call_ns['synchronize']", costs.calls.synchronize_ns);
  check_time("call_ns['launch']", costs.calls.launch_ns);
}

std::int64_t copy_duration_ns(const SimCosts& costs, const Copy& copy) {
  if (costs.copy_ns) {
    if (copy.unit >= costs.copy_ns->size()) {
      throw ValueError("expected copy_ns to say how long a copy of unit " +
                       std::to_string(copy.unit) + " takes, got times of " +
                       std::to_string(costs.copy_ns->size()) + " units");
    }
    return (*costs.copy_ns)[copy.unit];
  }
  const double bytes_per_second = costs.copy_bytes_per_second.value_or(0);  // there is one
  return costs.copy_latency_ns + duration_ns("a copy", copy.size_bytes, bytes_per_second);
}

std::int64_t decode_duration_ns(const SimCosts& costs, const Decode& decode) {
  return costs.decode_bytes_per_second
             ? duration_ns("a decoder", decode.size_bytes, *costs.decode_bytes_per_second)
             : 0;
}

}  // namespace torch_offload
