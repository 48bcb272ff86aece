#pragma once

#include <ostream>
#include <string>
#include <vector>

#include "core/steps.h"
#include "lanes/mutant_run.h"
#include "lanes/mutant_schedules.h"

namespace torch_offload::lanes {

/// A step to leave out, or to take at the wrong moment, and the run that shows what comes of it:
/// the checker notices, and kernels find wrong bytes.
struct Mutant {
  Step step;
  const char* name;
  const char* schedule;
  Choice choice;
  bool is_moved = false;

  friend std::ostream& operator<<(std::ostream& out, const Mutant& mutant) {
    return out << mutant.name << (mutant.is_moved ? "_moved" : "");
  }
};

/// One for each step that is left out, by Step.
const std::vector<Mutant>& all_mutants();
/// Those that are moved, by Step: a record in front of what it is to cover, a wait behind what it
/// is to hold back.
const std::vector<Mutant>& moved_mutants();

/// A step that cannot be moved so that it matters, and why.
struct Unmoved {
  Step step;
  const char* reason;
};
const std::vector<Unmoved>& unmoved_steps();

/// One of all_schedules(), or nullptr.
const Schedule* find_schedule(const std::string& name);

}  // namespace torch_offload::lanes
