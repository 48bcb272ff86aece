#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/device.h"

namespace torch_offload {

/// What the host spends in each kind of call, in nanoseconds.
struct SimCallCosts {
  std::int64_t copy_ns = 0;
  std::int64_t record_ns = 0;
  std::int64_t wait_ns = 0;
  std::int64_t synchronize_ns = 0;  ///< On top of the waiting, once it is over.
  std::int64_t launch_ns = 0;       ///< Of all kernels of one unit, unless that is said by unit.
};

/// What work takes in virtual time, and which limits of the hardware hold.
struct SimCosts {
  // A copy takes what `copy_ns` says of its unit; without it, latency and bytes over rate.
  std::optional<double> copy_bytes_per_second;
  std::int64_t copy_latency_ns = 0;
  std::optional<std::vector<std::int64_t>> copy_ns;  ///< By UnitIndex.

  /// Of decoded bytes. A decoder is a kernel: it takes its turn with those of the units. Without
  /// it, decoding takes no time.
  std::optional<double> decode_bytes_per_second;

  std::vector<std::int64_t> compute_ns;  ///< By UnitIndex.
  /// What the host spends launching each unit's kernels, by UnitIndex. Empty: `calls.launch_ns`
  /// each. See Note [Two lines of time].
  std::vector<std::int64_t> launch_ns;
  SimCallCosts calls;

  int num_copy_engines = 1;    ///< Each of them copies at the full rate.
  bool shared_compute = true;  ///< Kernels of two streams take turns; otherwise all run at once.
};

/// No single time may be longer, so that no sum overflows.
constexpr std::int64_t kLongestSimTimeNs = 3'600'000'000'000;

/// The cost of a call by its name in Python: "copy", "record", "wait", "synchronize" or "launch".
/// Throws: ValueError that lists the names there are.
std::int64_t& call_cost(SimCallCosts& calls, const std::string& name);

/// Throws: ValueError for a time below zero or above an hour, a rate that is not positive, no
/// engine, and where the duration of a copy is given in no way or in two.
void check_costs(const SimCosts& costs);

/// How long one copy takes.
/// Throws: ValueError if nothing is said of its unit, or if it takes too long.
std::int64_t copy_duration_ns(const SimCosts& costs, const Copy& copy);

/// How long the decoding of one unit takes.
/// Throws: ValueError if it takes too long.
std::int64_t decode_duration_ns(const SimCosts& costs, const Decode& decode);

}  // namespace torch_offload
