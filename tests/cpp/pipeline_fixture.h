#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/loader.h"
#include "core/pipeline.h"
#include "core/plan.h"
#include "host/host_device.h"

namespace torch_offload::testing {

/// Holds a worker stream where it is until it is opened: how an order is proved without sleeping.
class Gate {
 public:
  Gate() : opened_(promise_.get_future().share()) {}
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;
  ~Gate() { open(); }

  void hold(HostDevice& device, StreamId stream) {
    device.run(stream, [opened = opened_] { opened.wait(); });
  }
  void open() {
    if (!std::exchange(is_open_, true)) {
      promise_.set_value();
    }
  }

 private:
  std::promise<void> promise_;
  std::shared_future<void> opened_;
  bool is_open_ = false;
};

class InjectedFault : public std::runtime_error {
 public:
  InjectedFault() : std::runtime_error("injected fault") {}
};

/// A HostDevice that tells where its streams are, and fails or forgets on request.
class TestDevice : public HostDevice {
 public:
  using HostDevice::HostDevice;
  /// What is still queued tells its steps to the members below: it must run before they go.
  ~TestDevice() override {
    if (!in_forked_child()) {
      for (const StreamId stream : streams_) {
        HostDevice::do_synchronize(stream);
      }
    }
  }

  /// The `call`-th submission from now on throws, once; 0: none does.
  void fail_at(int call) { calls_until_fault_ = call; }
  /// Whether the fault has been thrown, or none was asked for.
  bool fault_is_over() const { return calls_until_fault_ <= 0; }
  /// Waits for which this holds are not submitted: a planted fault.
  std::function<bool(StreamId, EventId)> forgets_wait;
  /// Whether the host goes on without having waited: a planted fault.
  bool forgets_synchronize = false;

  /// Blocks the host until `condition` holds; it is evaluated at each step of any stream.
  void await(const std::function<bool()>& condition) {
    std::unique_lock<std::mutex> lock(mutex_);
    one_more_step_.wait(lock, condition);
  }
  /// The event that keeps `stream` from going on, or kNoEvent. Only inside `await`.
  EventId blocked_on(StreamId stream) const {
    const auto found = blocked_on_.find(stream);
    return found == blocked_on_.end() ? kNoEvent : found->second;
  }
  /// How many copies of `unit` have run. Only inside `await`.
  int copies_run(UnitIndex unit) const {
    const auto found = copies_run_.find(unit);
    return found == copies_run_.end() ? 0 : found->second;
  }
  void step(const std::function<void()>& change) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      change();
    }
    one_more_step_.notify_all();
  }

 protected:
  StreamId do_create_stream(const StreamOptions& options) override {
    count_down();
    streams_.push_back(HostDevice::do_create_stream(options));
    return streams_.back();
  }
  void do_set_current_stream(StreamId stream) override {
    count_down();
    HostDevice::do_set_current_stream(stream);
  }
  EventId do_create_event() override {
    count_down();
    return HostDevice::do_create_event();
  }
  void do_record(EventId event, StreamId stream) override {
    count_down();
    HostDevice::do_record(event, stream);
  }
  void do_wait(StreamId stream, EventId event) override {
    count_down();
    if (forgets_wait && forgets_wait(stream, event)) {
      return;
    }
    run(stream, [this, stream, event] {
      if (!HostDevice::do_is_done(event)) {
        step([&] { blocked_on_[stream] = event; });
      }
    });
    HostDevice::do_wait(stream, event);
    run(stream, [this, stream] { step([&] { blocked_on_.erase(stream); }); });
  }
  void do_synchronize(StreamId stream) override {
    count_down();
    if (!forgets_synchronize) {
      HostDevice::do_synchronize(stream);
    }
  }
  void do_copy(StreamId stream, const Copy& copy) override {
    count_down();
    HostDevice::do_copy(stream, copy);
    run(stream, [this, unit = copy.unit] { step([&] { ++copies_run_[unit]; }); });
  }
  void do_fill(StreamId stream, void* memory, std::size_t size_bytes, std::uint8_t value) override {
    count_down();
    HostDevice::do_fill(stream, memory, size_bytes, value);
  }
  void* do_allocate(std::size_t size_bytes) override {
    count_down();
    void* memory = HostDevice::do_allocate(size_bytes);
    std::memset(memory, 0xEE, size_bytes);  // or a reader could find right bytes of an earlier test
    return memory;
  }

 private:
  void count_down() {
    if (calls_until_fault_ > 0 && --calls_until_fault_ == 0) {
      throw InjectedFault();
    }
  }

  int calls_until_fault_ = 0;
  std::vector<StreamId> streams_;
  std::mutex mutex_;
  std::condition_variable one_more_step_;
  std::map<StreamId, EventId> blocked_on_;  // guarded by mutex_
  std::map<UnitIndex, int> copies_run_;     // guarded by mutex_
};

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
    device_.copy(copy_stream,
                 {place, masters_.of(unit), masters_.expected(unit)->size(), unit, generation});
    return copy_stream;
  }

 private:
  Device& device_;
  const Masters& masters_;
};

/// A pipeline on a TestDevice, with readers that check the bytes of a place when they run.
class Rig {
 public:
  explicit Rig(Plan plan, const PipelineOptions& options = {},
               HostDevice::ComputeStreams compute = HostDevice::ComputeStreams::kWorker)
      : device(compute), masters(device, plan.units), loader(device, masters) {
    // Callers have streams of their own: HostDevice's caller stream would block this thread.
    for (const char* name : {"caller", "other_caller"}) {
      callers.push_back(device.create_stream({name, StreamRole::kCompute, 0}));
    }
    device.set_current_stream(callers[0]);
    pipeline.emplace(device, loader, std::move(plan), options);
    device.attach_log(&log);
  }
  ~Rig() {
    device.fail_at(0);
    device.attach_log(nullptr);
    if (pipeline) {
      pipeline.reset();
      drain();
    }
  }

  /// Queues a reader of the unit's place on the current stream, as a kernel would be.
  void read(UnitIndex unit, const std::byte* place) {
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
    bool armed = false;
    for (const Op& op : log.ops()) {
      if (op.kind == kind && op.unit == unit) {
        armed = true;
      } else if (op.kind == OpKind::kRecord && armed) {
        event = op.event;
        armed = false;
      }
    }
    return event;
  }
};

/// Units of layers of attention and FFN, in KiB/4 (one alignment) each.
inline std::vector<Unit> layers_of(std::size_t num_layers, std::size_t mha_slices,
                                   std::size_t ffn_slices) {
  std::vector<Unit> units;
  for (std::size_t layer = 0; layer < num_layers; ++layer) {
    const std::string name = "layers." + std::to_string(layer);
    const auto index = static_cast<std::uint32_t>(layer);
    units.push_back({name + ".mha", mha_slices * kAlignmentBytes, index, UnitKind::kMha});
    units.push_back({name + ".ffn", ffn_slices * kAlignmentBytes, index, UnitKind::kFfn});
  }
  return units;
}

inline std::vector<UnitIndex> sequence_of(std::size_t num_units) {
  std::vector<UnitIndex> sequence(num_units);
  for (std::size_t i = 0; i < num_units; ++i) {
    sequence[i] = static_cast<UnitIndex>(i);
  }
  return sequence;
}

inline Plan plan_of(std::vector<Unit> units, std::optional<std::size_t> depth_bytes = {}) {
  PlanRequest request;
  request.units = std::move(units);
  request.depth_bytes = depth_bytes;
  return make_plan(request);
}

/// A plan whose units all lie where the test says; overlaps follow from that.
inline Plan plan_with_places(std::vector<Unit> units, const std::vector<ByteRange>& places,
                             std::size_t depth_bytes) {
  Plan plan;
  plan.units = std::move(units);
  plan.overlaps.resize(places.size());
  plan.depth_bytes = depth_bytes;
  for (std::size_t i = 0; i < places.size(); ++i) {
    plan.places.emplace_back(places[i]);
    plan.window_bytes = std::max(plan.window_bytes, places[i].end);
    for (std::size_t j = 0; j < places.size(); ++j) {
      if (i != j && places[i].begin < places[j].end && places[j].begin < places[i].end) {
        plan.overlaps[i].push_back(static_cast<UnitIndex>(j));
      }
    }
  }
  return plan;
}

/// How many copies a sequence of uses costs if each unit is copied when it is asked for and not
/// whole: computed from the bytes of the window alone, not from the plan's overlap sets.
inline std::uint64_t demand_onloads(const Plan& plan, const std::vector<UnitIndex>& uses) {
  std::vector<UnitIndex> owner(plan.window_bytes / kAlignmentBytes, kNoUnit);
  std::uint64_t onloads = 0;
  for (const UnitIndex unit : uses) {
    const std::size_t begin = plan.places[unit]->begin / kAlignmentBytes;
    const std::size_t end = plan.places[unit]->end / kAlignmentBytes;
    bool whole = true;
    for (std::size_t slice = begin; slice < end; ++slice) {
      whole = whole && owner[slice] == unit;
    }
    if (!whole) {
      ++onloads;
      // A unit that has lost one slice is lost: nobody may find the others.
      std::set<UnitIndex> lost(owner.begin() + static_cast<std::ptrdiff_t>(begin),
                               owner.begin() + static_cast<std::ptrdiff_t>(end));
      for (UnitIndex& slice_owner : owner) {
        slice_owner = lost.count(slice_owner) > 0 ? kNoUnit : slice_owner;
      }
      for (std::size_t slice = begin; slice < end; ++slice) {
        owner[slice] = unit;
      }
    }
  }
  return onloads;
}

/// How many units of `next_pass` may be copied ahead of it: as far as the depth, at least one, and
/// no further than the first that would overwrite one copied ahead before it.
inline std::size_t num_units_ahead(const Plan& plan, const std::vector<UnitIndex>& next_pass) {
  std::size_t ahead_bytes = 0;
  std::size_t count = 0;
  for (; count < next_pass.size(); ++count) {
    const UnitIndex unit = next_pass[count];
    ahead_bytes += plan.units[unit].size_bytes;
    if (count > 0 && ahead_bytes > plan.depth_bytes) {
      break;
    }
    for (std::size_t before = 0; before < count; ++before) {
      if (next_pass[before] != unit &&
          plan.places[unit]->overlaps(*plan.places[next_pass[before]])) {
        return count;
      }
    }
  }
  return count;
}

}  // namespace torch_offload::testing
