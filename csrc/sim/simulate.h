#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/op_log.h"
#include "core/pipeline.h"
#include "core/plan.h"
#include "core/stats.h"
#include "sim/sim_costs.h"

namespace torch_offload {

struct SimRequest {
  Plan plan;
  PipelineOptions options;
  SimCosts costs;
  /// Packed size of each unit that the plan packs; of the others it says nothing. Empty: none is.
  std::vector<std::size_t> packed_bytes;
  /// The forwards: which units each of them uses, in order.
  std::vector<std::vector<UnitIndex>> passes;
  /// Whether the caller waits for the result of each pass before the next, as who reads it does.
  bool synchronize_passes = false;
  bool keep_log = true;
};

/// All times are in nanoseconds since the host began the first pass.
struct SimResult {
  OpLog log;  ///< With times; empty unless asked for.
  Stats stats;
  DeviceCounters counters;  ///< Copies, bytes and waits: without what came before the first pass.
  std::vector<std::int64_t> pass_begin_ns;  ///< When the host began each pass.
  std::vector<std::int64_t> host_end_ns;    ///< When it came back from the pass.
  std::vector<std::int64_t> pass_end_ns;    ///< When the last of the pass's own work was done.
  std::int64_t host_blocked_ns = 0;         ///< In `synchronize`, its own cost not counted.
  std::int64_t elapsed_ns = 0;  ///< Until host and device were done with the last pass; copies for
                                ///< a pass that does not come are not waited for.
};

/// Drives the pipeline on a SimDevice through the passes, and tells when what happened.
///
/// A resident unit computes without being acquired; its compute is in the log as a read of no bytes
/// and generation 0. The same request gives the same result, to the last op.
///
/// Throws: ValueError if costs cannot be, or do not say what every unit takes, for a packed unit
///         without a size, and for `sync` with `split`; IndexError for a unit that the plan does
///         not have.
SimResult simulate(const SimRequest& request);

}  // namespace torch_offload
