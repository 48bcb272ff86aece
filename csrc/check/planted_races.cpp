#include "check/planted_races.h"

#include <array>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <utility>

namespace torch_offload::planted {

namespace {

constexpr std::size_t kPageBytes = 4096;
constexpr std::size_t kSlices = 4;

struct FreeHostMemory {
  void operator()(std::byte* memory) const { std::free(memory); }
};

/// What every race needs: three streams, two events, masters, and a window of four slices.
class Stage {
 public:
  explicit Stage(Device& device)
      : device_(device),
        host_(static_cast<std::byte*>(std::aligned_alloc(kPageBytes, 2 * kPageBytes))) {
    caller = device.current_stream();
    copies = device.create_stream({"copies", StreamRole::kCopy, 0});
    compute = device.create_stream({"compute", StreamRole::kCompute, 0});
    side = device.create_stream({"side", StreamRole::kCompute, 0});
    ready = device.create_event();
    free = device.create_event();
    device.register_host(host_.get(), 2 * kPageBytes);
    window_ = static_cast<std::byte*>(device.allocate(kSlices * kAlignmentBytes));
    device.synchronize(caller);
  }
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;
  ~Stage() {
    device_.set_current_stream(caller);
    for (const StreamId stream : {caller, copies, compute, side}) {
      device_.synchronize(stream);
    }
    free_window();
    unregister();
  }

  std::byte* place(std::size_t slice) const { return window_ + slice * kAlignmentBytes; }
  std::byte* master(std::size_t slice) const { return host_.get() + slice * kAlignmentBytes; }

  /// Onloads a unit from its master into a slice of the window.
  void onload(StreamId stream, UnitIndex unit, std::size_t slice, std::uint64_t generation = 1) {
    device_.copy(stream, {place(slice), master(unit), kAlignmentBytes, unit, generation});
  }
  void begin_use(StreamId stream, UnitIndex unit, std::size_t slice, std::uint64_t generation = 1) {
    device_.begin_read(stream, place(slice), kAlignmentBytes, unit, generation);
  }
  void end_use(StreamId stream, UnitIndex unit, std::size_t slice, std::uint64_t generation = 1) {
    device_.end_read(stream, place(slice), kAlignmentBytes, unit, generation);
  }
  void use(StreamId stream, UnitIndex unit, std::size_t slice, std::uint64_t generation = 1) {
    begin_use(stream, unit, slice, generation);
    end_use(stream, unit, slice, generation);
  }
  /// An onload and a use that is ordered behind it, as it ought to be.
  void onload_and_use(UnitIndex unit, std::size_t slice) {
    onload(copies, unit, slice);
    order(compute, copies);
    use(compute, unit, slice);
  }
  void order(StreamId later, StreamId earlier) {
    device_.record(ready, earlier);
    device_.wait(later, ready);
  }

  void free_window() {
    if (std::byte* window = std::exchange(window_, nullptr)) {
      device_.free(window);
    }
  }
  void unregister() {
    if (std::exchange(is_registered_, false)) {
      device_.unregister_host(host_.get());
    }
  }

  StreamId caller = kNoStream;
  StreamId copies = kNoStream;
  StreamId compute = kNoStream;
  StreamId side = kNoStream;
  EventId ready = kNoEvent;
  EventId free = kNoEvent;

 private:
  Device& device_;
  std::unique_ptr<std::byte, FreeHostMemory> host_;
  std::byte* window_ = nullptr;
  bool is_registered_ = true;
};

}  // namespace

void compute_without_waiting(Device& device, bool planted) {
  Stage stage(device);
  stage.onload(stage.copies, 0, 0);
  device.record(stage.ready, stage.copies);
  if (!planted) {
    device.wait(stage.compute, stage.ready);
  }
  stage.use(stage.compute, 0, 0);
}

void ask_for_the_stream_inside(Device& device, bool planted) {
  Stage stage(device);
  stage.onload_and_use(0, 0);
  device.set_current_stream(stage.compute);
  StreamId used_on = device.current_stream();
  device.set_current_stream(stage.copies);
  if (planted) {
    used_on = device.current_stream();
  }
  device.record(stage.free, used_on);
  device.wait(stage.copies, stage.free);
  stage.onload(stage.copies, 1, 0);
}

void free_while_kernels_read(Device& device, bool planted) {
  Stage stage(device);
  stage.onload(stage.copies, 0, 0);
  device.synchronize(stage.copies);
  stage.use(stage.compute, 0, 0);
  if (!planted) {
    device.synchronize(stage.compute);
  }
  stage.free_window();
}

void keep_the_stream(Device& device, bool planted) {
  Stage stage(device);
  const StreamId kept = stage.compute;
  stage.onload(stage.copies, 0, 0);
  device.record(stage.ready, stage.copies);
  device.set_current_stream(stage.side);
  device.wait(planted ? kept : device.current_stream(), stage.ready);
  stage.use(device.current_stream(), 0, 0);
}

void copy_after_the_wait(Device& device, bool planted) {
  Stage stage(device);
  stage.onload(stage.copies, 0, 0);
  if (planted) {
    stage.order(stage.compute, stage.copies);
  }
  stage.onload(stage.copies, 0, 1);  // the clone, which the kernels read
  if (!planted) {
    stage.order(stage.compute, stage.copies);
  }
  stage.use(stage.compute, 0, 1);
}

void record_on_a_fixed_stream(Device& device, bool planted) {
  Stage stage(device);
  stage.onload_and_use(0, 0);
  device.record(stage.free, planted ? stage.caller : stage.compute);
  device.wait(stage.copies, stage.free);
  stage.onload(stage.copies, 1, 0);
}

void free_on_its_own_stream(Device& device, bool planted) {
  Stage stage(device);
  void* memory = device.allocate(kAlignmentBytes);
  device.synchronize(stage.caller);
  device.copy(stage.copies, {memory, stage.master(0), kAlignmentBytes, 0, 1});
  device.synchronize(stage.copies);
  device.begin_read(stage.side, memory, kAlignmentBytes, 0, 1);
  device.end_read(stage.side, memory, kAlignmentBytes, 0, 1);
  device.synchronize(stage.caller);
  if (!planted) {
    device.synchronize(stage.side);
  }
  device.free(memory);
}

void read_before_the_copy_has_drained(Device& device, bool planted) {
  Stage stage(device);
  std::byte* destination = stage.master(8);
  device.copy(stage.copies, {destination, stage.master(0), kAlignmentBytes, 0, 1});
  if (!planted) {
    device.synchronize(stage.copies);
  }
  device.host_read(destination, kAlignmentBytes, 0);
}

void prefetch_for_a_second_owner(Device& device, bool planted) {
  Stage stage(device);
  stage.onload(stage.copies, 0, 0);
  stage.order(stage.compute, stage.copies);
  stage.begin_use(stage.compute, 0, 0);
  if (planted) {
    stage.onload(stage.copies, 1, 0);
  }
  stage.end_use(stage.compute, 0, 0);
  if (!planted) {
    device.record(stage.free, stage.compute);
    device.wait(stage.copies, stage.free);
    stage.onload(stage.copies, 1, 0);
  }
}

void give_up_the_source(Device& device, bool planted) {
  Stage stage(device);
  stage.onload(stage.copies, 0, 0);
  if (!planted) {
    device.synchronize(stage.copies);
  }
  stage.unregister();
}

void prefetch_faster_than_kernels(Device& device, bool planted) {
  Stage stage(device);
  const std::array<EventId, 2> ready{device.create_event(), device.create_event()};
  const std::array<EventId, 2> free{device.create_event(), device.create_event()};
  for (UnitIndex unit = 0; unit < 6; ++unit) {
    const std::size_t slice = unit % 2;
    if (unit >= 2 && !planted) {
      device.wait(stage.copies, free[slice]);
    }
    stage.onload(stage.copies, unit, slice);
    device.record(ready[slice], stage.copies);
    device.wait(stage.compute, ready[slice]);
    stage.use(stage.compute, unit, slice);
    device.record(free[slice], stage.compute);
  }
}

void wait_for_an_event_of_another_set(Device& device, bool planted) {
  Stage stage(device);
  const EventId before = device.create_event();
  const EventId inside = device.create_event();
  stage.onload(stage.copies, 0, 0);
  device.record(before, stage.copies);
  if (!planted) {
    device.record(inside, stage.copies);
  }
  device.wait(stage.compute, inside);
  stage.use(stage.compute, 0, 0);
}

void copy_on_the_default_stream(Device& device, bool planted) {
  Stage stage(device);
  stage.onload(stage.caller, 0, 0);
  if (!planted) {
    stage.order(stage.side, stage.caller);
  }
  stage.use(stage.side, 0, 0);
}

void use_what_was_not_copied(Device& device, bool planted) {
  Stage stage(device);
  stage.onload_and_use(1, 0);
  stage.onload(stage.copies, 0, 1);
  stage.order(stage.compute, stage.copies);
  if (!planted) {  // a miss
    stage.onload(stage.copies, 1, 1);
    stage.order(stage.compute, stage.copies);
  }
  stage.use(stage.compute, 1, 1);
}

void wait_for_the_other_place(Device& device, bool planted) {
  Stage stage(device);
  const std::array<EventId, 2> free{device.create_event(), device.create_event()};
  stage.onload_and_use(0, 0);
  device.record(free[0], stage.compute);
  stage.onload_and_use(1, 1);
  device.record(free[1], stage.compute);
  device.wait(stage.copies, free[0]);
  stage.onload_and_use(2, 0);
  device.record(free[0], stage.compute);
  device.wait(stage.copies, free[planted ? 1 : 0]);
  stage.onload(stage.copies, 0, 0, 2);
}

}  // namespace torch_offload::planted
