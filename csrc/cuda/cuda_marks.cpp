#include "cuda/cuda_marks.h"

#include <cmath>
#include <limits>
#include <utility>

namespace torch_offload {

namespace {

// Made before they are needed, so that marking does not make them: some forwards' worth.
constexpr std::size_t kFirstEvents = 1024;

// From so many on, marks that are done give their events back while others are still being made.
constexpr std::size_t kManyEvents = 16384;

constexpr int kAnchorTries = 8;

// A mark this far from what it is measured from is measured from next.
constexpr float kFarMs = 1000;

constexpr double kNsPerMs = 1e6;

}  // namespace

void CudaMarks::start(const at::cuda::CUDAStream& idle, std::int64_t (*host_time_ns)()) {
  // Whatever an attempt that failed has left.
  pending_.clear();
  times_ns_.clear();
  free_.clear();
  while (events_.size() < kFirstEvents) {
    events_.emplace_back(cudaEventDefault);  // with timing
    events_.back().record(idle);             // CUDA makes its half only now
  }
  for (EventIndex index = 0; index < events_.size(); ++index) {
    free_.push_back(index);
  }
  recycle_at_ = kManyEvents;

  // The event lies between two looks at the clock; the closest such pair is the best.
  base_ = free_event();
  EventIndex tried = free_event();
  std::int64_t least_ns = std::numeric_limits<std::int64_t>::max();
  idle.synchronize();
  for (int i = 0; i < kAnchorTries; ++i) {
    const std::int64_t before_ns = host_time_ns();
    events_[tried].record(idle);
    events_[tried].synchronize();
    const std::int64_t took_ns = host_time_ns() - before_ns;
    if (took_ns < least_ns) {
      least_ns = took_ns;
      base_ns_ = before_ns + took_ns / 2;
      std::swap(base_, tried);
    }
  }
  free_.push_back(tried);
}

CudaMarks::EventIndex CudaMarks::free_event() {
  if (free_.empty() && events_.size() >= recycle_at_) {
    recycle_done();
  }
  if (free_.empty()) {
    events_.emplace_back(cudaEventDefault);
    return static_cast<EventIndex>(events_.size() - 1);
  }
  const EventIndex index = free_.back();
  free_.pop_back();
  return index;
}

MarkId CudaMarks::mark(const at::cuda::CUDAStream& stream) {
  const EventIndex index = free_event();
  events_[index].record(stream);
  pending_.push_back(index);
  return static_cast<MarkId>(times_ns_.size() + pending_.size() - 1);
}

/// Finds the time of the oldest mark without one, which must be done, and frees its event.
void CudaMarks::resolve_next() {
  EventIndex index = pending_.front();
  pending_.pop_front();
  const float elapsed_ms = events_[base_].elapsed_time(events_[index]);
  const std::int64_t time_ns = base_ns_ + std::llround(static_cast<double>(elapsed_ms) * kNsPerMs);
  times_ns_.push_back(time_ns);
  if (elapsed_ms > kFarMs) {
    base_ns_ = time_ns;
    std::swap(base_, index);
  }
  free_.push_back(index);
}

void CudaMarks::recycle_done() {
  while (!pending_.empty() && events_[pending_.front()].query()) {
    resolve_next();
  }
  if (free_.empty()) {
    recycle_at_ *= 2;  // all are in flight: do not ask again with every mark
  }
}

std::vector<std::int64_t> CudaMarks::take() {
  while (!pending_.empty()) {
    events_[pending_.front()].synchronize();
    resolve_next();
  }
  return std::exchange(times_ns_, {});
}

}  // namespace torch_offload
