#pragma once

#include "core/op_log.h"
#include "core/steps.h"
#include "lanes/adversary_device.h"
#include "lanes/mutation.h"

namespace torch_offload::lanes {

/// An AdversaryDevice that makes the call of a moved step at the wrong moment.
class MovingDevice : public AdversaryDevice {
 public:
  MovingDevice(bool first_made_go_last, OpLog* log)
      : AdversaryDevice(first_made_go_last, log), log_(*log) {}

 protected:
  void do_record(EventId event, StreamId stream) override {
    if (takes_turn(StepKind::kRecord)) {
      record_early(event, stream);
    } else {
      AdversaryDevice::do_record(event, stream);
    }
  }
  void do_wait(StreamId stream, EventId event) override {
    if (takes_turn(StepKind::kWait)) {
      wait_late(stream, event);
    } else {
      AdversaryDevice::do_wait(stream, event);
    }
  }
  void do_synchronize(StreamId stream) override {
    if (takes_turn(StepKind::kSynchronize)) {
      synchronize_late(stream);
    } else {
      AdversaryDevice::do_synchronize(stream);
    }
  }
  void begin_work() override {
    if (kind_of(mutation.step) == StepKind::kSynchronize) {
      mutation.is_due = false;  // all of a drain was asked for
    }
    AdversaryDevice::begin_work();
  }

 private:
  /// Whether this call is the moved step's.
  bool takes_turn(StepKind kind) {
    if (!mutation.is_due || kind_of(mutation.step) != kind) {
      return false;
    }
    mutation.is_due = kind == StepKind::kSynchronize;  // a drain is several of them
    mutation.moved_ops.push_back(log_.ops().size());
    return true;
  }

  const OpLog& log_;
};

}  // namespace torch_offload::lanes
