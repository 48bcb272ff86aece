#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "check/hazard_checker.h"
#include "core/op_log.h"

namespace torch_offload {

/// What came of comparing the checker with brute force, and how many logs of each sort there were:
/// a comparison of faulty logs alone would prove little.
struct LinearisationReport {
  std::uint64_t num_orders = 0;
  std::uint64_t num_logs = 0;
  std::uint64_t num_clean = 0;
  std::uint64_t num_unordered = 0;
  std::uint64_t num_stale = 0;      ///< Ordered well, but a read finds other bytes.
  std::uint64_t num_too_large = 0;  ///< Logs with more orders than are run; not counted elsewhere.
  std::uint64_t num_disagreements = 0;
  std::vector<std::string> examples;  ///< The first few of those, in words.
};

/// The checker against brute force: small random logs, each run in every order that streams, events
/// and the host allow; what the checker says must be what these orders show.
class LinearisationLane {
 public:
  /// `is_control`: the checker misses one wait of each log, which must be found out.
  explicit LinearisationLane(bool is_control = false) : is_control_(is_control) {}

  /// Blocking: until at least `num_orders` more were run.
  void advance(std::uint64_t num_orders);
  const LinearisationReport& report() const { return report_; }

 private:
  void compare(std::uint32_t seed);

  const bool is_control_;
  std::uint32_t next_seed_ = 0;
  HazardChecker checker_{kMaxFindings};
  LinearisationReport report_;

  static constexpr std::size_t kMaxFindings = 100'000;
};

}  // namespace torch_offload
