#pragma once

#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAStream.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "core/op_log.h"

namespace torch_offload {

/// Marked points of streams of one GPU: timing events from a pool, and their times by the host's
/// clock.
///
/// CUDA tells only how long it took from one event to another. So an *anchor*, an event whose time
/// by the host's clock is known to a few microseconds, is recorded at the start; every mark is
/// measured from it, or, later on, from a mark measured before: a float of milliseconds is exact to
/// a microsecond only within some seconds.
///
/// Blocking:  `start` and `take` block the host, `mark` does not.
/// Threads:   one caller at a time.
class CudaMarks {
 public:
  /// Prepares the pool and measures the anchor on `idle`, a stream with little or nothing to do.
  void start(const at::cuda::CUDAStream& idle, std::int64_t (*host_time_ns)());
  MarkId mark(const at::cuda::CUDAStream& stream);
  /// Times of all marks since the start, by MarkId; forgets them. The pool stays.
  std::vector<std::int64_t> take();

 private:
  using EventIndex = std::uint32_t;

  EventIndex free_event();
  void resolve_next();
  void recycle_done();

  std::deque<at::cuda::CUDAEvent> events_;  // a deque: an event of PyTorch's cannot be copied
  std::vector<EventIndex> free_;            // of events_
  std::deque<EventIndex> pending_;          // events of the marks whose times are not known yet
  std::vector<std::int64_t> times_ns_;      // by MarkId, of the marks before those
  std::size_t recycle_at_ = 0;              // as many events as are worth looking for done ones
  EventIndex base_ = 0;                     // what marks are measured from
  std::int64_t base_ns_ = 0;
};

}  // namespace torch_offload
