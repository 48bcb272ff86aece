#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "core/error.h"
#include "host/host_device.h"
#include "lanes/planted_failure.h"

namespace torch_offload::lanes {

/// A HostDevice that runs its streams in the worst order there is, and in the same one each time.
///
/// A stream is either held, and stands still, or is free: `settle` lets the workers of free streams
/// run one piece of work after the other, for as long as one can go on. So what happens is decided
/// by who is held, and by who goes first, but not by the clock.
///
/// Memory is never what one would like it to be: the last tenant of new memory writes to it late,
/// on the stream that allocated it; memory that is freed is overwritten at once, but stays mapped,
/// and goes to the next who wants as much; and where a copy reads host memory that is not locked
/// any more, the system has put other pages there.
///
/// Blocking:  `synchronize` lets go what is held, one stream after the other, until its own is
/// done.
class AdversaryDevice : public HostDevice {
 public:
  /// Streams go first that were made first, or those that were made last.
  AdversaryDevice(bool first_made_go_last, OpLog* log)
      : HostDevice(ComputeStreams::kWorker), first_made_go_last_(first_made_go_last) {
    attach_log(log);
  }
  ~AdversaryDevice() override {
    open_all();
    for (void* memory : freed_) {
      std::free(memory);
    }
  }

  /// Queues `work` on the stream, as a kernel would be.
  void submit(StreamId stream, std::function<void()> work) { push(stream, {std::move(work)}); }

  /// Lets the stream stand still behind what it could have done by now.
  void hold(StreamId stream) {
    settle();
    streams_[stream].is_held = true;
  }

  /// Lets all streams go, one after the other: each runs as far as it can before the next one may.
  void open_all() {
    do {
      settle();
    } while (open_next());
  }

  /// Lets free streams run until none can go on.
  void settle() {
    while (Stream* stream = next_to_go()) {
      const Task task = std::move(stream->queue.front());
      stream->queue.pop_front();
      HostDevice::run(stream->id, task.work);
      HostDevice::do_synchronize(stream->id);
    }
  }

  /// No more than so many ranges of files may be locked.
  void limit_read_only(std::size_t most) { most_read_only_ = most; }

  /// The `call`-th submission from now on fails; 0: none does.
  void fail_at(int call) { calls_until_failure_ = call; }
  bool has_failed() const { return calls_until_failure_ == 0; }

 protected:
  StreamId do_create_stream(const StreamOptions& options) override {
    const StreamId stream = HostDevice::do_create_stream(options);
    streams_[stream].id = stream;
    return stream;
  }
  void do_set_current_stream(StreamId stream) override {
    count_down();
    HostDevice::do_set_current_stream(stream);
  }
  EventId do_create_event() override {
    records_.emplace_back();
    return HostDevice::do_create_event();
  }
  void do_record(EventId event, StreamId stream) override {
    count_down();
    auto is_done = std::make_shared<bool>(false);
    records_[event] = is_done;
    push(stream, record_of(is_done));
  }
  void do_wait(StreamId stream, EventId event) override {
    count_down();
    push(stream, wait_for(records_[event]));
  }
  bool do_is_done(EventId event) override {
    settle();
    return *records_[event];
  }
  void do_synchronize(StreamId stream) override {
    count_down();
    come_to_end(stream);
  }
  void do_copy(StreamId stream, const Copy& copy) override {
    begin_work();
    count_down();
    push(stream, {[this, copy] {
           if (is_locked(copy.source)) {
             std::memcpy(copy.destination, copy.source, copy.size_bytes);
           } else {
             std::memset(copy.destination, kGarbage, copy.size_bytes);
           }
         }});
  }
  /// Nothing is packed here: what is decoded is as it was.
  void do_decode(StreamId stream, const Decode& decode) override {
    begin_work();
    count_down();
    push(stream, {[decode] { std::memcpy(decode.destination, decode.source, decode.size_bytes); }});
  }
  void do_fill(StreamId stream, void* memory, std::size_t size_bytes, std::uint8_t value) override {
    begin_work();
    count_down();
    push(stream, {[=] { std::memset(memory, value, size_bytes); }});
  }
  void* do_allocate(std::size_t size_bytes) override {
    count_down();
    void* memory = take_freed(size_bytes);
    memory = memory == nullptr ? HostDevice::do_allocate(size_bytes) : memory;
    std::memset(memory, kGarbage, size_bytes);
    push(do_current_stream(), {[=] { std::memset(memory, kGarbage, size_bytes); }});
    sizes_[memory] = size_bytes;
    return memory;
  }
  void do_free(void* memory) override {
    begin_work();
    settle();
    std::memset(memory, kGarbage, sizes_.at(memory));
    freed_.push_back(memory);
  }
  void do_register_host(void* memory, std::size_t size_bytes) override {
    const std::lock_guard<std::mutex> lock(locked_mutex_);
    locked_[reinterpret_cast<std::uintptr_t>(memory)] = size_bytes;
  }
  void do_register_read_only(void* memory, std::size_t size_bytes) override {
    {
      const std::lock_guard<std::mutex> lock(locked_mutex_);
      if (read_only_.size() >= most_read_only_) {
        throw MemoryError("planted: no more may be locked");
      }
      read_only_.insert(memory);
    }
    do_register_host(memory, size_bytes);
  }
  void do_unregister_host(void* memory) override {
    begin_work();
    settle();
    const std::lock_guard<std::mutex> lock(locked_mutex_);
    locked_.erase(reinterpret_cast<std::uintptr_t>(memory));
    read_only_.erase(memory);
  }

  // Calls at the wrong moment; see wrong_place.

  /// In front of what was submitted to the stream last.
  void record_early(EventId event, StreamId stream) {
    count_down();
    auto is_done = std::make_shared<bool>(false);
    records_[event] = is_done;
    std::deque<Task>& queue = streams_[stream].queue;
    queue.insert(queue.empty() ? queue.end() : std::prev(queue.end()), record_of(is_done));
  }
  /// Behind the next record on the stream, and so behind all that it is to hold back.
  void wait_late(StreamId stream, EventId event) {
    count_down();
    streams_[stream].late.push_back(wait_for(records_[event]));
  }
  /// Behind the next copy, decoding or fill, or the next memory that is given up.
  void synchronize_late(StreamId stream) {
    count_down();
    late_.push_back(stream);
  }

  /// A call begins that a drain may be there to hold back.
  virtual void begin_work() {
    for (const StreamId stream : std::exchange(overdue_, std::exchange(late_, {}))) {
      come_to_end(stream);
    }
  }

 private:
  static constexpr std::uint8_t kGarbage = 0xDD;

  struct Task {
    std::function<void()> work;
    std::shared_ptr<bool> awaited = nullptr;  // a record that must be done before
    bool is_work = true;                      // else a record or a wait
    bool is_record = false;
  };
  struct Stream {
    StreamId id = kNoStream;
    bool is_held = false;
    std::deque<Task> queue;
    std::vector<Task> late;  // waits, for behind the next record

    /// Work alone stands still: what was done before it is recorded.
    bool can_go() const {
      return !queue.empty() && (!is_held || !queue.front().is_work) &&
             (queue.front().awaited == nullptr || *queue.front().awaited);
    }
  };

  void* take_freed(std::size_t size_bytes) {
    const auto found = std::find_if(freed_.begin(), freed_.end(),
                                    [&](void* memory) { return sizes_.at(memory) == size_bytes; });
    if (found == freed_.end()) {
      return nullptr;
    }
    void* const memory = *found;
    freed_.erase(found);
    return memory;
  }

  bool is_locked(const void* memory) {
    const std::lock_guard<std::mutex> lock(locked_mutex_);
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    const auto next = locked_.upper_bound(address);
    return next != locked_.begin() && address < std::prev(next)->first + std::prev(next)->second;
  }

  template <typename Condition>
  Stream* first_stream(const Condition& condition) {
    Stream* found = nullptr;
    for (auto& [id, stream] : streams_) {
      if (condition(stream) && (found == nullptr || first_made_go_last_)) {
        found = &stream;
      }
    }
    return found;
  }

  Stream* next_to_go() {
    return first_stream([](const Stream& stream) { return stream.can_go(); });
  }

  bool open_next() {
    Stream* stream = first_stream([](const Stream& held) { return held.is_held; });
    if (stream != nullptr) {
      stream->is_held = false;
    }
    return stream != nullptr;
  }

  static Task record_of(const std::shared_ptr<bool>& is_done) {
    return {[is_done] { *is_done = true; }, nullptr, false, true};
  }
  static Task wait_for(std::shared_ptr<bool> record) {
    return {[] {}, std::move(record), false};
  }

  void push(StreamId stream, Task task) {
    Stream& to = streams_[stream];
    const bool is_record = task.is_record;
    to.queue.push_back(std::move(task));
    if (is_record) {
      std::move(to.late.begin(), to.late.end(), std::back_inserter(to.queue));
      to.late.clear();
    }
  }

  void come_to_end(StreamId stream) {
    do {
      settle();
    } while (!streams_[stream].queue.empty() && open_next());
  }

  void count_down() {
    if (calls_until_failure_ > 0) {
      --calls_until_failure_;
      if (calls_until_failure_ == 0) {
        throw PlantedFailure();
      }
    }
  }

  const bool first_made_go_last_;
  int calls_until_failure_ = 0;
  std::map<StreamId, Stream> streams_;          // in the order in which they were made
  std::vector<std::shared_ptr<bool>> records_;  // by EventId: the last one
  std::vector<StreamId> late_;                  // streams to be synchronized behind the next call,
  std::vector<StreamId> overdue_;               // and behind this one
  std::map<void*, std::size_t> sizes_;
  std::vector<void*> freed_;
  std::mutex locked_mutex_;  // guards the two below: several threads lock pages of files
  std::map<std::uintptr_t, std::size_t> locked_;  // host memory
  std::set<void*> read_only_;                     // of that
  std::size_t most_read_only_ = SIZE_MAX;
};

}  // namespace torch_offload::lanes
