#pragma once

#include <cstddef>
#include <vector>

#include "check/finding.h"
#include "core/device.h"

namespace torch_offload {

/// A race or fault that shipped in a system of this kind, as calls of a Device.
///
/// Planted, the calls are those of the report, as closely as a Device can make them; else they are
/// those of its clean twin, which differs by the one step that was missing. Some live in Python
/// only: these name the test that plants them there.
struct PublishedRace {
  /// How a planted race comes to light.
  enum class Caught { kByChecker, kByDevice, kInPython };

  const char* id;
  const char* what;          ///< What went wrong, in one sentence.
  const char* where;         ///< The public report.
  const char* ruled_out_by;  ///< What rules it out here.
  Caught caught = Caught::kByChecker;
  FindingKind expected = FindingKind::kUnordered;  ///< Of the first finding, if the checker's.
  void (*run)(Device& device, bool planted) = nullptr;
  const char* python_test = nullptr;
};

/// H1 to H18, then those that were tried: H19 to H24.
const std::vector<PublishedRace>& published_races();

/// How many of published_races() were published; the rest were tried here first.
constexpr std::size_t kNumPublished = 18;

/// What came of a race that lives in C++.
struct RaceOutcome {
  bool was_refused = false;  ///< The device threw an InternalError.
  std::vector<Finding> findings;

  /// Whether it came to light as it should.
  bool is_caught(const PublishedRace& race) const;
  bool is_clean() const { return !was_refused && findings.empty(); }
};

/// Runs the race, or its clean twin, on a device that nobody else uses, and checks its log.
///
/// Blocking: until all that was submitted is done.
RaceOutcome run_race(const PublishedRace& race, Device& device, bool planted);

}  // namespace torch_offload
