#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "host/host_device.h"
#include "lanes/device_fault.h"

namespace torch_offload {

/// A device with a fault that can be switched on: the product above it is as it is always.
///
/// What shows that a comparison of outputs under delays bites: with the fault on, numbers must be
/// wrong. The log tells what was asked of the device, not what it did.
template <typename Base>
class FaultyDevice : public Base {
 public:
  template <typename... Arguments>
  explicit FaultyDevice(std::shared_ptr<const DeviceFault> fault, Arguments... arguments)
      : Base(arguments...),
        fault_(std::move(fault)),
        idle_(Base::do_create_stream({"idle", StreamRole::kCopy, 0})) {}

 protected:
  StreamId do_create_stream(const StreamOptions& options) override {
    const StreamId stream = Base::do_create_stream(options);
    if (options.role == StreamRole::kCopy) {
      copy_streams_.insert(stream);
    }
    return stream;
  }
  void do_record(EventId event, StreamId stream) override {
    recorded_on_[event] = stream;
    Base::do_record(event, fault_->is(DeviceFaultKind::kRecords) ? idle_ : stream);
  }
  void do_wait(StreamId stream, EventId event) override {
    const bool is_copy = copy_streams_.count(stream) > 0;
    const bool is_for_copy = copy_streams_.count(recorded_on_[event]) > 0;
    const bool is_left_out =
        (fault_->is(DeviceFaultKind::kCopyWaits) && is_copy) ||
        (fault_->is(DeviceFaultKind::kComputeWaits) && !is_copy && is_for_copy) ||
        (fault_->is(DeviceFaultKind::kHandovers) && !is_copy && !is_for_copy);
    if (!is_left_out) {
      Base::do_wait(stream, event);
    }
  }
  void do_synchronize(StreamId stream) override {
    if (!fault_->is(DeviceFaultKind::kSynchronizes)) {
      Base::do_synchronize(stream);
    }
  }

 private:
  const std::shared_ptr<const DeviceFault> fault_;
  const StreamId idle_;
  std::set<StreamId> copy_streams_;
  std::map<EventId, StreamId> recorded_on_;
};

/// Host threads whose copies and decoders come late, each by a random time drawn from the seed.
class LateHostDevice : public FaultyDevice<HostDevice> {
 public:
  LateHostDevice(std::shared_ptr<const DeviceFault> fault, std::uint32_t seed,
                 std::chrono::microseconds longest_delay)
      : FaultyDevice(std::move(fault)), random_(seed), longest_delay_(longest_delay) {}

 protected:
  void do_copy(StreamId stream, const Copy& copy) override {
    hold_back(stream);
    FaultyDevice::do_copy(stream, copy);
  }
  /// From bytes of its own: with a fault the next copy may come while the decoder runs, which has
  /// checked a blob by then, and would follow offsets that nobody has checked.
  void do_decode(StreamId stream, const Decode& decode) override {
    hold_back(stream);
    const auto blob = std::make_shared<std::vector<std::byte>>(decode.packed_bytes);
    run(stream,
        [blob, source = decode.source] { std::memcpy(blob->data(), source, blob->size()); });
    Decode own = decode;
    own.source = blob->data();
    FaultyDevice::do_decode(stream, own);
    run(stream, [blob] {});  // which keeps it until then
  }

 private:
  void hold_back(StreamId stream) {
    const auto delay = longest_delay_ * (random_() % 1024) / 1024;
    run(stream, [delay] { std::this_thread::sleep_for(delay); });
  }

  std::mt19937 random_;
  const std::chrono::microseconds longest_delay_;
};

}  // namespace torch_offload
