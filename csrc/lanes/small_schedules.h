#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/plan.h"
#include "core/unit.h"

namespace torch_offload {

/// Two passes of calls; each may be cut short by an exception.
struct SmallSchedule {
  using Sequence = std::vector<UnitIndex>;

  Sequence first;
  bool first_completed = true;
  Sequence second;
  bool second_completed = true;
};

/// All schedules of so many units in up to so many places: every plan, and on it two passes, each
/// any sequence of up to `num_calls` calls, completed or not.
class SmallSchedules {
 public:
  /// `transports`: how units travel: the first in the first way, the next in the next, in turn.
  SmallSchedules(unsigned num_units, unsigned max_places, unsigned num_calls,
                 const std::vector<Transport>& transports);

  const std::vector<Plan>& plans() const { return plans_; }
  /// The calls of a pass: all sequences of up to `num_calls`.
  const std::vector<SmallSchedule::Sequence>& sequences() const { return sequences_; }
  unsigned num_units() const { return num_units_; }
  unsigned num_calls() const { return num_calls_; }
  /// On each plan.
  std::uint64_t num_schedules() const { return num_passes() * num_passes(); }
  /// Sequences that are completed, and those that are not.
  std::uint64_t num_passes() const { return 2 * sequences_.size(); }
  /// One of all sequences of `length` calls, by its number.
  SmallSchedule::Sequence sequence_at(std::uint64_t number, unsigned length) const;

 private:
  const unsigned num_units_;
  const unsigned num_calls_;
  std::vector<Plan> plans_;
  std::vector<SmallSchedule::Sequence> sequences_;
};

/// In words, with the places of its plan.
std::string text_of(const SmallSchedule& schedule, const Plan& plan);

}  // namespace torch_offload
