#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "core/device.h"
#include "lanes/device_failure.h"

namespace torch_offload {

/// A device of which any call can be made to fail, before it has done anything.
///
/// Only the question which stream is current never fails: it asks nobody but the thread.
template <typename Base>
class FailingDevice : public Base {
 public:
  template <typename... Arguments>
  explicit FailingDevice(std::shared_ptr<DeviceFailure> failure, Arguments... arguments)
      : Base(arguments...), failure_(std::move(failure)) {}
  /// Gives back what a failure has kept it from giving back: nobody else can.
  ~FailingDevice() override {
    for (void* memory : kept_) {
      Base::do_free(memory);
    }
  }

 protected:
  StreamId do_create_stream(const StreamOptions& options) override {
    failure_->count("create_stream");
    return Base::do_create_stream(options);
  }
  void do_set_current_stream(StreamId stream) override {
    failure_->count("set_current_stream");
    Base::do_set_current_stream(stream);
  }
  EventId do_create_event() override {
    failure_->count("create_event");
    return Base::do_create_event();
  }
  void do_record(EventId event, StreamId stream) override {
    failure_->count("record");
    Base::do_record(event, stream);
  }
  void do_wait(StreamId stream, EventId event) override {
    failure_->count("wait");
    Base::do_wait(stream, event);
  }
  bool do_is_done(EventId event) override {
    failure_->count("is_done");
    return Base::do_is_done(event);
  }
  void do_synchronize(StreamId stream) override {
    failure_->count("synchronize");
    Base::do_synchronize(stream);
  }
  void do_copy(StreamId stream, const Copy& copy) override {
    failure_->count("copy");
    Base::do_copy(stream, copy);
  }
  void do_decode(StreamId stream, const Decode& decode) override {
    failure_->count("decode");
    Base::do_decode(stream, decode);
  }
  void do_fill(StreamId stream, void* memory, std::size_t size_bytes, std::uint8_t value) override {
    failure_->count("fill");
    Base::do_fill(stream, memory, size_bytes, value);
  }
  void* do_allocate(std::size_t size_bytes) override {
    failure_->count("allocate");
    return Base::do_allocate(size_bytes);
  }
  void do_free(void* memory) override {
    kept_.push_back(memory);
    failure_->count("free");
    kept_.pop_back();
    Base::do_free(memory);
  }
  void do_register_host(void* memory, std::size_t size_bytes) override {
    failure_->count("register_host");
    Base::do_register_host(memory, size_bytes);
  }
  void do_unregister_host(void* memory) override {
    failure_->count("unregister_host");
    Base::do_unregister_host(memory);
  }
  // With a log that keeps times.
  void do_start_marks() override {
    failure_->count("start_marks");
    Base::do_start_marks();
  }
  MarkId do_mark(StreamId stream, MarkPoint point) override {
    failure_->count("mark");
    return Base::do_mark(stream, point);
  }
  std::vector<std::int64_t> do_take_marks() override {
    failure_->count("take_marks");
    return Base::do_take_marks();
  }

 private:
  const std::shared_ptr<DeviceFailure> failure_;
  std::vector<void*> kept_;
};

}  // namespace torch_offload
