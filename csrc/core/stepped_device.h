#pragma once

#include <cstdio>

#include "core/device.h"
#include "core/steps.h"

namespace torch_offload {

#ifdef TORCH_OFFLOAD_MUTANTS
inline namespace mutants {  // see steps.h
#endif

/// A device that is told of each call which step of the order it is, and does not make those that a
/// lane wants left out.
///
/// Lifetime: the device must outlive it.
class SteppedDevice {
 public:
  explicit SteppedDevice(Device& device) : device_(device) {}

  void record(EventId event, StreamId stream, Step step) {
    if (!is_left_out(step)) {
      device_.record(event, stream);
    }
  }
  void wait(StreamId stream, EventId event, Step step) {
    if (!is_left_out(step)) {
      device_.wait(stream, event);
    }
  }
  /// Blocks the host, as Device::synchronize.
  void synchronize(StreamId stream, Step step) {
    if (!is_left_out(step)) {
      device_.synchronize(stream);
    }
  }
  /// Likewise after a failure, whatever fails now: it is told on stderr.
  void quiesce(StreamId stream, Step step) noexcept {
    try {
      synchronize(stream, step);
    } catch (...) {
      // The device itself is failing, and the error that brought us here is about to say so.
      std::fprintf(stderr, "torch_offload: a stream could not be synchronized after a failure\n");
    }
  }

 private:
  Device& device_;
};

#ifdef TORCH_OFFLOAD_MUTANTS
}  // namespace mutants
#endif

}  // namespace torch_offload
