#pragma once

#include <ostream>
#include <string>
#include <vector>

#include "core/steps.h"
#include "lanes/mutant_run.h"
#include "lanes/mutant_schedules.h"

namespace torch_offload::lanes {

/// A step to leave out, and the run that shows what comes of it: the checker notices, and kernels
/// find wrong bytes.
struct Mutant {
  Step step;
  const char* name;
  const char* schedule;
  Choice choice;

  friend std::ostream& operator<<(std::ostream& out, const Mutant& mutant) {
    return out << mutant.name;
  }
};

/// One for each step, by Step.
const std::vector<Mutant>& all_mutants();

/// One of all_schedules(), or nullptr.
const Schedule* find_schedule(const std::string& name);

}  // namespace torch_offload::lanes
