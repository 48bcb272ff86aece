#include "host/host_device.h"

#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "codec/decoder.h"
#include "core/error.h"

namespace torch_offload {

/// One thread and its queue.
class HostDevice::Worker {
 public:
  Worker() : thread_([this] { work(); }) {}

  ~Worker() {
    submit(nullptr);
    thread_.join();
  }

  void submit(std::function<void()> task) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    has_task_.notify_one();
  }

 private:
  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      has_task_.wait(lock, [this] { return !tasks_.empty(); });
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      if (task == nullptr) {
        return;
      }
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable has_task_;
  std::deque<std::function<void()>> tasks_;  // guarded by mutex_; nullptr ends the thread
  std::thread thread_;                       // last: it uses all of the above
};

/// An event may be recorded many times, on streams that run at different speeds; a wait means the
/// record that came last before it, and no later one. So each record makes a marker of its own.
struct HostDevice::Events {
  struct Marker {
    bool done = false;
  };
  using MarkerRef = std::shared_ptr<Marker>;

  MarkerRef record(EventId event) {
    const std::lock_guard<std::mutex> lock(mutex);
    return last.at(event) = std::make_shared<Marker>();
  }

  void finish(const MarkerRef& marker) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      marker->done = true;
    }
    one_is_done.notify_all();
  }

  MarkerRef last_record(EventId event) {
    const std::lock_guard<std::mutex> lock(mutex);
    return last.at(event);
  }

  bool is_done(const MarkerRef& marker) {
    const std::lock_guard<std::mutex> lock(mutex);
    return marker->done;
  }

  void block_until_done(const MarkerRef& marker) {
    std::unique_lock<std::mutex> lock(mutex);
    one_is_done.wait(lock, [&] { return marker->done; });
  }

  std::mutex mutex;
  std::condition_variable one_is_done;
  std::vector<MarkerRef> last;  // by EventId, as are the markers' contents: guarded by mutex
};

/// Times of marked points, written by whoever comes to them.
struct HostDevice::Marks {
  MarkId add() {
    const std::lock_guard<std::mutex> lock(mutex);
    times_ns.push_back(kUnknownTime);
    return static_cast<MarkId>(times_ns.size() - 1);
  }

  void reach(MarkId mark, std::int64_t time_ns) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      times_ns[mark] = time_ns;
      ++num_reached;
    }
    one_is_reached.notify_all();
  }

  std::vector<std::int64_t> take_all() {
    std::unique_lock<std::mutex> lock(mutex);
    one_is_reached.wait(lock, [this] { return num_reached == times_ns.size(); });
    num_reached = 0;
    return std::exchange(times_ns, {});
  }

  std::mutex mutex;
  std::condition_variable one_is_reached;
  std::vector<std::int64_t> times_ns;  // by MarkId, as is the count: guarded by mutex
  std::size_t num_reached = 0;
};

/// The first thing that went wrong on a worker.
struct HostDevice::Failure {
  void keep(std::exception_ptr failed) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (error == nullptr) {
      error = std::move(failed);
    }
  }

  void rethrow() {
    std::exception_ptr failed;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      failed = std::exchange(error, nullptr);
    }
    if (failed != nullptr) {
      std::rethrow_exception(failed);
    }
  }

  std::mutex mutex;
  std::exception_ptr error;  // guarded by mutex
};

HostDevice::HostDevice(ComputeStreams compute_streams)
    : compute_streams_(compute_streams),
      events_(std::make_unique<Events>()),
      marks_(std::make_unique<Marks>()),
      failure_(std::make_unique<Failure>()) {
  streams_.push_back({"caller", nullptr});
}

HostDevice::~HostDevice() {
  if (in_forked_child()) {
    // The threads are the parent's, and their locks may be held for ever here: leak on purpose.
    for (auto& worker : workers_) {
      [[maybe_unused]] const Worker* leaked = worker.release();
    }
    [[maybe_unused]] const Events* leaked_events = events_.release();
    [[maybe_unused]] const Marks* leaked_marks = marks_.release();
    [[maybe_unused]] const Failure* leaked_failure = failure_.release();
  }
}

const HostDevice::Stream& HostDevice::stream(StreamId stream) const {
  check_internal(stream < streams_.size(), "no such stream");
  return streams_[stream];
}

const std::string& HostDevice::stream_name(StreamId id) const { return stream(id).name; }

StreamId HostDevice::do_create_stream(const StreamOptions& options) {
  const bool is_inline =
      options.role == StreamRole::kCompute && compute_streams_ == ComputeStreams::kInline;
  if (!is_inline) {
    workers_.push_back(std::make_unique<Worker>());
  }
  streams_.push_back({options.name, is_inline ? nullptr : workers_.back().get()});
  return static_cast<StreamId>(streams_.size() - 1);
}

void HostDevice::do_set_current_stream(StreamId id) {
  check_internal(id < streams_.size(), "no such stream");
  current_stream_ = id;
}

void HostDevice::run(StreamId id, std::function<void()> work) {
  if (Worker* worker = stream(id).worker) {
    worker->submit(std::move(work));
  } else {
    work();
  }
}

EventId HostDevice::do_create_event() {
  const std::lock_guard<std::mutex> lock(events_->mutex);
  events_->last.emplace_back();
  return static_cast<EventId>(events_->last.size() - 1);
}

void HostDevice::do_record(EventId event, StreamId id) {
  run(id, [events = events_.get(), marker = events_->record(event)] { events->finish(marker); });
}

void HostDevice::do_wait(StreamId id, EventId event) {
  auto marker = events_->last_record(event);
  if (stream(id).worker == nullptr && !events_->is_done(marker)) {
    ++counters_.caller_waits;
  }
  run(id,
      [events = events_.get(), marker = std::move(marker)] { events->block_until_done(marker); });
  failure_->rethrow();
}

bool HostDevice::do_is_done(EventId event) { return events_->is_done(events_->last_record(event)); }

void HostDevice::do_synchronize(StreamId id) {
  if (Worker* worker = stream(id).worker) {
    std::mutex mutex;
    std::condition_variable reached_end;
    bool reached = false;
    worker->submit([&] {
      const std::lock_guard<std::mutex> lock(mutex);
      reached = true;
      reached_end.notify_one();  // under the lock: the waiter's stack goes away right after
    });
    std::unique_lock<std::mutex> lock(mutex);
    reached_end.wait(lock, [&] { return reached; });
  }
  failure_->rethrow();
}

void HostDevice::do_copy(StreamId id, const Copy& copy) {
  run(id, [copy] { std::memcpy(copy.destination, copy.source, copy.size_bytes); });
}

void HostDevice::do_decode(StreamId id, const Decode& task) {
  run(id, [task, failure = failure_.get()] {
    try {
      torch_offload::decode(static_cast<const std::byte*>(task.source), task.packed_bytes,
                            static_cast<std::byte*>(task.destination), task.size_bytes);
    } catch (...) {
      failure->keep(std::current_exception());
    }
  });
}

void HostDevice::do_fill(StreamId id, void* memory, std::size_t size_bytes, std::uint8_t value) {
  run(id, [=] { std::memset(memory, value, size_bytes); });
}

void* HostDevice::do_allocate(std::size_t size_bytes) {
  void* memory = std::aligned_alloc(kAlignmentBytes, aligned_size(size_bytes));
  if (memory == nullptr) {
    throw MemoryError("expected " + std::to_string(size_bytes) +
                      " bytes of device memory, got none; use a smaller depth or budget");
  }
  return memory;
}

void HostDevice::do_free(void* memory) { std::free(memory); }

// All memory is alike to a memcpy; that a copy's source was registered is checked by Device.
void HostDevice::do_register_host(void* /*memory*/, std::size_t /*size_bytes*/) {}
void HostDevice::do_unregister_host(void* /*memory*/) {}

MarkId HostDevice::do_mark(StreamId id, MarkPoint /*point*/) {
  const MarkId mark = marks_->add();
  run(id, [marks = marks_.get(), mark] { marks->reach(mark, steady_time_ns()); });
  return mark;
}

std::vector<std::int64_t> HostDevice::do_take_marks() { return marks_->take_all(); }

}  // namespace torch_offload
