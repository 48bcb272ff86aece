#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "check/hazard_checker.h"
#include "core/loader.h"
#include "core/pipeline.h"
#include "gated_device.h"
#include "plans.h"

namespace torch_offload::testing {

/// Masters of all units in one registered buffer, each byte telling unit, edit and offset.
class Masters {
 public:
  using Bytes = std::vector<std::byte>;

  Masters(Device& device, const std::vector<Unit>& units) : device_(device) {
    std::size_t size_bytes = 0;
    for (const Unit& unit : units) {
      offsets_.push_back(size_bytes);
      size_bytes += unit.size_bytes;
      expected_.push_back(std::make_shared<Bytes>(unit.size_bytes));
    }
    constexpr std::size_t kPageBytes = 4096;
    size_bytes = (size_bytes / kPageBytes + 1) * kPageBytes;
    memory_ = static_cast<std::byte*>(std::aligned_alloc(kPageBytes, size_bytes));
    device_.register_host(memory_, size_bytes);
    for (UnitIndex unit = 0; unit < units.size(); ++unit) {
      edit(unit);
    }
  }
  Masters(const Masters&) = delete;
  Masters& operator=(const Masters&) = delete;
  ~Masters() {
    device_.unregister_host(memory_);
    std::free(memory_);
  }

  /// Gives the unit new bytes. No copy of it may be in flight.
  void edit(UnitIndex unit) {
    ++edits_;
    auto bytes = std::make_shared<Bytes>(expected_[unit]->size());
    std::uint32_t noise = unit * 7919U + edits_ * 104729U + 1U;
    for (std::byte& byte : *bytes) {
      noise = noise * 1664525U + 1013904223U;
      byte = static_cast<std::byte>(noise >> 24U);
    }
    device_.host_write(memory_ + offsets_[unit], bytes->size(), unit);
    std::memcpy(memory_ + offsets_[unit], bytes->data(), bytes->size());
    expected_[unit] = std::move(bytes);
  }
  const std::byte* of(UnitIndex unit) const { return memory_ + offsets_[unit]; }
  std::shared_ptr<const Bytes> expected(UnitIndex unit) const { return expected_[unit]; }

 private:
  Device& device_;
  std::byte* memory_ = nullptr;
  std::vector<std::size_t> offsets_;
  std::vector<std::shared_ptr<const Bytes>> expected_;
  std::uint32_t edits_ = 0;
};

/// Copies a master to its place as it is.
class RawLoader : public Loader {
 public:
  RawLoader(Device& device, const Masters& masters) : device_(device), masters_(masters) {}

  StreamId load(UnitIndex unit, std::byte* place, StreamId copy_stream,
                std::uint64_t generation) override {
    generations_[unit] = generation;
    device_.copy(copy_stream,
                 {place, masters_.of(unit), masters_.expected(unit)->size(), unit, generation});
    return copy_stream;
  }

  /// Of the last copy of the unit.
  std::uint64_t generation(UnitIndex unit) const { return generations_.at(unit); }

 private:
  Device& device_;
  const Masters& masters_;
  std::map<UnitIndex, std::uint64_t> generations_;
};

/// Logs all that a device is asked to do, and lets the checker judge it in the end.
class CheckedLog {
 public:
  CheckedLog(Device& device, OpLog& log) : device_(device), log_(log) { device_.attach_log(&log_); }
  CheckedLog(const CheckedLog&) = delete;
  CheckedLog& operator=(const CheckedLog&) = delete;
  ~CheckedLog() {
    device_.attach_log(nullptr);
    if (!expects_hazards) {
      for (const Finding& finding : findings()) {
        ADD_FAILURE() << name_of(finding.kind) << ": " << finding.message;
      }
    }
  }

  std::vector<Finding> findings() const { return HazardChecker().check(log_); }

  bool expects_hazards = false;  // set by tests that plant some

 private:
  Device& device_;
  OpLog& log_;
};

/// A pipeline on a TestDevice, with readers that check the bytes of a place when they run.
class Rig {
 public:
  explicit Rig(Plan plan, const PipelineOptions& options = {},
               HostDevice::ComputeStreams compute = HostDevice::ComputeStreams::kWorker)
      : device(compute),
        checked_log(device, log),
        masters(device, plan.units),
        loader(device, masters) {
    // Callers have streams of their own: HostDevice's caller stream would block this thread.
    for (const char* name : {"caller", "other_caller"}) {
      callers.push_back(device.create_stream({name, StreamRole::kCompute, 0}));
    }
    device.set_current_stream(callers[0]);
    pipeline.emplace(device, loader, std::move(plan), options);
  }
  ~Rig() {
    device.fail_at(0);
    if (pipeline) {
      pipeline.reset();
      drain();
    }
  }

  /// Queues a reader of the unit's place on the current stream, as a kernel would be. The log is
  /// told of it beside what the pipeline says of the use.
  void read(UnitIndex unit, const std::byte* place) {
    const StreamId stream = device.current_stream();
    const std::size_t size_bytes = masters.expected(unit)->size();
    device.begin_read(stream, place, size_bytes, unit, loader.generation(unit));
    device.end_read(stream, place, size_bytes, unit, loader.generation(unit));
    device.run(device.current_stream(), [this, unit, place, expected = masters.expected(unit)] {
      const bool equal = std::memcmp(place, expected->data(), expected->size()) == 0;
      device.step([&] {
        ++reads_run[unit];
        wrong_reads += equal ? 0 : 1;
      });
    });
    ++reads_queued;
  }

  /// One call of a unit, as the wrapper makes it: what was acquired is released.
  void use(UnitIndex unit) {
    acquire_marks.push_back({log.ops().size(), unit});
    const std::byte* place = pipeline->acquire(unit);
    try {
      read(unit, place);
    } catch (...) {
      pipeline->release(unit);
      throw;
    }
    pipeline->release(unit);
  }

  /// One forward: the pass is left on an exception as well.
  void pass(const std::vector<UnitIndex>& sequence) {
    pipeline->enter();
    try {
      for (const UnitIndex unit : sequence) {
        use(unit);
      }
    } catch (...) {
      pipeline->leave(false);
      throw;
    }
    pipeline->leave(true);
  }

  /// Waits until everything submitted has run.
  void drain() {
    if (pipeline) {
      pipeline->synchronize();
    }
    for (const StreamId stream : callers) {
      device.synchronize(stream);
    }
  }

  /// Nothing is held, and all that was read was right.
  void expect_at_rest_and_right() {
    drain();
    EXPECT_FALSE(pipeline->in_pass());
    for (UnitIndex unit = 0; unit < pipeline->plan().units.size(); ++unit) {
      EXPECT_FALSE(pipeline->is_acquired(unit)) << "unit " << unit;
    }
    device.await([&] { return true; });
    EXPECT_EQ(wrong_reads, 0);
    int reads = 0;
    for (const auto& [unit, count] : reads_run) {
      reads += count;
    }
    EXPECT_EQ(reads, reads_queued);
  }

  /// The event that was recorded behind the last copy of the unit.
  EventId ready_event(UnitIndex unit) const { return event_behind(OpKind::kCopy, unit); }
  /// The event that was recorded behind the last use of the unit.
  EventId free_event(UnitIndex unit) const { return event_behind(OpKind::kReadEnd, unit); }
  StreamId copy_stream(UnitIndex unit) const {
    const bool split = pipeline->options().layout == StreamLayout::kSplit;
    return pipeline
        ->streams()[split ? static_cast<std::size_t>(pipeline->plan().units[unit].kind) : 0];
  }

  struct AcquireMark {
    std::size_t op_index;  // the first op that this acquire submitted
    UnitIndex unit;
  };

  OpLog log;
  TestDevice device;
  CheckedLog checked_log;  // before what is given back while it still listens
  Masters masters;
  RawLoader loader;
  std::vector<StreamId> callers;
  std::optional<Pipeline> pipeline;
  std::vector<AcquireMark> acquire_marks;
  std::map<UnitIndex, int> reads_run;  // guarded by device.step() and device.await()
  int wrong_reads = 0;                 // guarded likewise
  int reads_queued = 0;

 private:
  EventId event_behind(OpKind kind, UnitIndex unit) const {
    EventId event = kNoEvent;
    StreamId stream = kNoStream;
    for (const Op& op : log.ops()) {
      if (op.kind == kind && op.unit == unit) {
        stream = op.stream;
      } else if (op.kind == OpKind::kRecord && op.stream == stream) {
        event = op.event;
        stream = kNoStream;
      }
    }
    return event;
  }
};

}  // namespace torch_offload::testing
