#pragma once

#include <cstddef>
#include <unordered_map>
#include <vector>

#include "core/unit.h"

namespace torch_offload {

/// A guess of which units will be asked for next, learned from the passes seen so far.
///
/// A pass is remembered as its whole sequence, so a unit used many times in a pass is followed by
/// the right one each time. Passes are told apart by their first unit: an encoder's and a
/// decoder's, a prompt's and a speculator's are learned side by side, together with which pass
/// followed which; one that has come twice in a row is expected to come again. Until a pass was
/// seen, the static order stands in for it. A wrong guess costs time, never a result.
class Order {
 public:
  /// `static_order` lists every unit once, as a forward is expected to call them.
  explicit Order(std::vector<UnitIndex> static_order);
  Order(const Order&) = delete;  // it points into itself
  Order& operator=(const Order&) = delete;

  void begin_pass();
  /// Remembers the pass, if it was `completed`: one cut short by an exception teaches nothing.
  void end_pass(bool completed);

  /// The unit asked for now. Returns whether it is the one that was expected.
  bool advance(UnitIndex unit);

  /// Walks through the expected units from the next one on, across the ends of passes, for ever.
  class Walk {
   public:
    /// The next expected unit, or kNoUnit where nothing is known.
    UnitIndex next();

   private:
    friend class Order;
    explicit Walk(const Order& order);
    const Order& order_;
    const std::vector<UnitIndex>* sequence_;
    std::size_t position_;
    bool is_repeat_;  // whether the pass of `sequence_` is like the one before it
  };
  Walk walk() const { return Walk(*this); }

 private:
  friend class OrderState;  // of the lanes: what later calls depend on

  const std::vector<UnitIndex>* sequence_starting_with(UnitIndex first) const;
  const std::vector<UnitIndex>* sequence_after(const std::vector<UnitIndex>& sequence,
                                               bool is_repeat) const;

  std::vector<UnitIndex> static_order_;
  std::unordered_map<UnitIndex, std::vector<UnitIndex>> passes_;  // by their first unit
  std::unordered_map<UnitIndex, UnitIndex> follower_;  // first unit -> first of the next pass
  UnitIndex last_first_ = kNoUnit;                     // of the last completed pass
  bool last_is_repeat_ = false;                        // whether the one before it was like it
  std::vector<UnitIndex> current_;                     // this pass so far
  const std::vector<UnitIndex>* expected_;             // what this pass is taken for
  std::size_t position_ = 0;                           // in expected_: the next unit
};

}  // namespace torch_offload
