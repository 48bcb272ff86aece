#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/device.h"

namespace torch_offload {

/// A Device made of threads: copies are real memcpy on a worker thread per stream.
///
/// What a machine without a GPU runs, and where ordering can be proved: tests queue work of their
/// own on its streams. There are two sorts of streams. A *worker* stream has a thread of its own
/// and a queue. An *inline* stream is executed by the thread that submits to it: recording on it is
/// done at once, waiting on it blocks. The caller's stream is inline.
///
/// Failures:  a packed unit that turns out to be damaged is found by a worker; the next wait or
///            synchronize throws what it has found, and the place holds what it held.
/// Blocking:  `wait` on an inline stream blocks and counts as `caller_waits` if it had to.
/// Lifetime:  the destructor runs what is queued, then joins; in a forked child it leaks instead,
///            because the threads do not exist there.
/// Threads:   one caller at a time; the workers are its own.
class HostDevice : public Device {
 public:
  enum class ComputeStreams {
    kInline,  ///< Torch computes on the calling thread: compute streams must block it.
    kWorker,  ///< C++ tests queue readers on compute streams of their own.
  };

  explicit HostDevice(ComputeStreams compute_streams = ComputeStreams::kInline);
  ~HostDevice() override;

  const std::string& stream_name(StreamId stream) const override;
  bool can_decode() const override { return true; }

  /// Queues `work` on a stream, as a kernel would be; runs it at once on an inline stream.
  void run(StreamId stream, std::function<void()> work);

  /// The calling thread's own stream; what current_stream() is unless set otherwise.
  static constexpr StreamId kCallerStream = 0;

 protected:
  StreamId do_create_stream(const StreamOptions& options) override;
  StreamId do_current_stream() override { return current_stream_; }
  void do_set_current_stream(StreamId stream) override;
  EventId do_create_event() override;
  void do_record(EventId event, StreamId stream) override;
  void do_wait(StreamId stream, EventId event) override;
  bool do_is_done(EventId event) override;
  void do_synchronize(StreamId stream) override;
  void do_copy(StreamId stream, const Copy& copy) override;
  void do_decode(StreamId stream, const Decode& decode) override;
  void do_fill(StreamId stream, void* memory, std::size_t size_bytes, std::uint8_t value) override;
  void* do_allocate(std::size_t size_bytes) override;
  void do_free(void* memory) override;
  void do_register_host(void* memory, std::size_t size_bytes) override;
  void do_unregister_host(void* memory) override;
  MarkId do_mark(StreamId stream, MarkPoint point) override;
  std::vector<std::int64_t> do_take_marks() override;

 private:
  class Worker;
  struct Events;
  struct Marks;
  struct Failure;
  struct Stream {
    std::string name;
    Worker* worker = nullptr;  // nullptr: inline
  };

  const Stream& stream(StreamId stream) const;

  ComputeStreams compute_streams_;
  std::deque<Stream> streams_;  // a deque: stream_name() hands out references
  std::unique_ptr<Events> events_;
  std::unique_ptr<Marks> marks_;
  std::unique_ptr<Failure> failure_;
  // After all of these: they use them until they are joined.
  std::vector<std::unique_ptr<Worker>> workers_;
  StreamId current_stream_ = kCallerStream;
};

}  // namespace torch_offload
