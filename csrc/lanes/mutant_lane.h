#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "check/finding.h"

namespace torch_offload {

/// What came of a run of the pipeline with one of its steps left out, or moved.
struct MutantOutcome {
  std::string step;
  bool is_reached = false;        ///< The run comes to the step at all.
  int num_wrong = 0;              ///< Kernels that found other bytes than their unit's.
  std::vector<Finding> findings;  ///< Of the hazard checker, from the log alone.
};

/// How many steps there are to leave out, and then to move; see core/steps.h.
std::size_t num_mutants();

/// Runs the real pipeline without its `index`-th step, or with that step taken at the wrong moment,
/// on a device that runs its streams in the worst order; or, if not `is_mutated`, its twin: the
/// same run with each step where it belongs.
///
/// Threads: one caller at a time.
MutantOutcome run_mutant(std::size_t index, bool is_mutated);

}  // namespace torch_offload
