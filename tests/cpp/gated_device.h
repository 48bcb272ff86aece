#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <future>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

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
  /// Whether there is no device memory left to give.
  bool is_out_of_memory = false;

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
  void do_decode(StreamId stream, const Decode& decode) override {
    count_down();
    HostDevice::do_decode(stream, decode);
  }
  void do_fill(StreamId stream, void* memory, std::size_t size_bytes, std::uint8_t value) override {
    count_down();
    HostDevice::do_fill(stream, memory, size_bytes, value);
  }
  void* do_allocate(std::size_t size_bytes) override {
    count_down();
    if (is_out_of_memory) {
      throw InjectedFault();
    }
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

}  // namespace torch_offload::testing
