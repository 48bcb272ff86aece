#pragma once

#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include "core/order.h"
#include "core/pipeline.h"
#include "lanes/expect.h"

namespace torch_offload {

/// What a loader that wants so many bytes must be told of: by an order of its own, which goes where
/// the pipeline's goes.
class Foretelling {
 public:
  /// None for 0 bytes.
  explicit Foretelling(std::size_t wanted_bytes) : wanted_bytes_(wanted_bytes) {}

  std::size_t wanted_bytes() const { return wanted_bytes_; }

  /// Behind a plan that is new.
  void begin(const Plan& plan) {
    std::vector<UnitIndex> streamed;
    for (UnitIndex unit = 0; unit < plan.units.size(); ++unit) {
      if (!plan.is_resident(unit)) {
        streamed.push_back(unit);
      }
    }
    order_ = std::make_unique<Order>(std::move(streamed));
    expected_.clear();
    told_.clear();
  }
  /// Behind a plan that could not be had: nobody can say whether the pipeline has begun anew.
  void lose_track() { order_.reset(); }

  void begin_pass() {
    if (order_) {
      order_->begin_pass();
    }
  }
  void end_pass(bool completed) {
    if (order_) {
      expect_told();
      order_->end_pass(completed);
    }
  }

  /// The unit is about to be acquired.
  void begin_call(const Pipeline& pipeline, UnitIndex unit) {
    if (!order_) {
      return;
    }
    expect_told();
    told_.clear();
    expected_.clear();
    order_->advance(unit);
    if (pipeline.is_acquired(unit)) {
      return;  // called inside its own call, it needs no bytes
    }
    std::size_t bytes = 0;
    Order::Walk walk = order_->walk();
    for (std::size_t i = 0; i < pipeline.plan().units.size() && bytes < wanted_bytes_; ++i) {
      const UnitIndex next = walk.next();
      if (!pipeline.is_whole(next)) {
        expected_.push_back(next);
        bytes += pipeline.plan().units[next].size_bytes;
      }
    }
  }
  void note(UnitIndex unit) { told_.push_back(unit); }

 private:
  void expect_told() const {
    expect(told_ == expected_, "a loader to be told of the units that come, and no others");
  }

  const std::size_t wanted_bytes_;
  std::unique_ptr<Order> order_;
  std::vector<UnitIndex> expected_;  // by the last call
  std::vector<UnitIndex> told_;
};

}  // namespace torch_offload
