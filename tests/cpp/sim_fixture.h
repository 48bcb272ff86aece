#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "sim/sim_device.h"

namespace torch_offload::testing {

constexpr std::size_t kPageBytes = 4096;

using Interval = std::pair<std::int64_t, std::int64_t>;

/// Costs under which a copy of unit u takes u nanoseconds, and calls take none.
inline SimCosts costs_by_unit(std::size_t num_units = 1001) {
  SimCosts costs;
  costs.copy_ns.emplace();
  for (std::size_t unit = 0; unit < num_units; ++unit) {
    costs.copy_ns->push_back(static_cast<std::int64_t>(unit));
  }
  return costs;
}

/// A device with a log with times, and its ops once everything is over.
class SimBench {
 public:
  explicit SimBench(const SimCosts& costs = costs_by_unit()) : device(costs) {
    master_ = device.make_host_memory(kPageBytes);
    device.register_host(master_, kPageBytes);
    place_ = device.allocate(kPageBytes);
    device.attach_log(&log, /*with_times=*/true);
  }
  SimBench(const SimBench&) = delete;
  SimBench& operator=(const SimBench&) = delete;
  ~SimBench() { device.attach_log(nullptr); }

  StreamId copy_stream(int priority = 0) {
    return device.create_stream({"copies", StreamRole::kCopy, priority});
  }
  StreamId compute_stream(int priority = 0) {
    return device.create_stream({"compute", StreamRole::kCompute, priority});
  }
  void copy(StreamId stream, UnitIndex unit, std::size_t size_bytes = 256) {
    device.copy(stream, {place_, master_, size_bytes, unit, 1});
  }
  /// A unit's kernels, with their marks in the log.
  void compute(StreamId stream, UnitIndex unit, std::int64_t duration_ns) {
    device.begin_read(stream, place_, 256, unit, 1);
    device.run(stream, duration_ns);
    device.end_read(stream, place_, 256, unit, 1);
  }
  EventId record(StreamId stream) {
    const EventId event = device.create_event();
    device.record(event, stream);
    return event;
  }
  /// Makes `later` go on only behind all that `earlier` has been given so far.
  void order(StreamId later, StreamId earlier) { device.wait(later, record(earlier)); }

  const std::vector<Op>& finish() {
    device.attach_log(nullptr);
    return log.ops();
  }
  /// When the copy of the unit ran.
  Interval copied(UnitIndex unit) {
    for (const Op& op : finish()) {
      if (op.kind == OpKind::kCopy && op.unit == unit) {
        return {op.begin_ns, op.end_ns};
      }
    }
    return {kUnknownTime, kUnknownTime};
  }
  /// When the stream came to the unit's kernels, and when the last of them ended.
  Interval computed(UnitIndex unit) {
    Interval bar{kUnknownTime, kUnknownTime};
    for (const Op& op : finish()) {
      if (op.unit == unit && op.kind == OpKind::kRead) {
        bar.first = op.end_ns;
      } else if (op.unit == unit && op.kind == OpKind::kReadEnd) {
        bar.second = op.begin_ns;
      }
    }
    return bar;
  }

  OpLog log;
  SimDevice device;

 private:
  void* master_ = nullptr;
  void* place_ = nullptr;
};

}  // namespace torch_offload::testing
