#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/plan.h"
#include "core/unit.h"

namespace torch_offload {

/// Two passes of calls; the first may be cut short by an exception.
struct SmallSchedule {
  using Sequence = std::vector<UnitIndex>;

  Sequence first;
  bool first_completed = true;
  Sequence second;
};

/// All schedules of so many units in up to so many places: every plan, before it every first pass.
///
/// Of the second pass only those of `num_calls` calls are meant: the log of a shorter one is the
/// beginning of theirs.
class SmallSchedules {
 public:
  /// `transports`: how units travel: the first in the first way, the next in the next, in turn.
  SmallSchedules(unsigned num_units, unsigned max_places, unsigned num_calls,
                 const std::vector<Transport>& transports);

  const std::vector<Plan>& plans() const { return plans_; }
  /// Of up to `num_calls` calls.
  const std::vector<SmallSchedule::Sequence>& firsts() const { return firsts_; }
  unsigned num_units() const { return num_units_; }
  unsigned num_calls() const { return num_calls_; }
  std::uint64_t num_seconds() const { return num_seconds_; }
  /// One of all sequences of `length` calls, by its number.
  SmallSchedule::Sequence sequence_at(std::uint64_t number, unsigned length) const;

 private:
  const unsigned num_units_;
  const unsigned num_calls_;
  std::vector<Plan> plans_;
  std::vector<SmallSchedule::Sequence> firsts_;
  std::uint64_t num_seconds_ = 1;
};

/// In words, with the places of its plan.
std::string text_of(const SmallSchedule& schedule, const Plan& plan);

}  // namespace torch_offload
