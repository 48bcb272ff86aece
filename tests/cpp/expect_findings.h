#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "check/hazard_checker.h"
#include "lanes/log_builder.h"

namespace torch_offload::testing {

using lanes::LogBuilder;

constexpr StreamId kCopies = 0;
constexpr StreamId kCompute = 1;
constexpr EventId kReady = 0;
constexpr EventId kFree = 1;

inline std::vector<Finding> check(OpLog log) {
  log.set_stream_names({"weight_h2d", "caller"});
  log.set_unit_names({"mha", "ffn"});
  return HazardChecker().check(log);
}

inline void expect_clean(const LogBuilder& build) {
  for (const Finding& finding : check(build.log)) {
    ADD_FAILURE() << name_of(finding.kind) << ": " << finding.message;
  }
}

/// Exactly one finding, which names both ops, the bytes, and a way out.
inline void expect_fault(const LogBuilder& build, FindingKind kind, std::size_t first,
                         std::size_t second, AddressRange memory, const std::string& advice) {
  const std::vector<Finding> findings = check(build.log);
  ASSERT_EQ(findings.size(), 1U) << (findings.empty() ? "" : findings[1].message);
  const Finding& finding = findings[0];
  EXPECT_STREQ(name_of(finding.kind), name_of(kind));
  EXPECT_EQ(finding.first, first);
  EXPECT_EQ(finding.second, second);
  EXPECT_EQ(finding.second_kind, build.log.ops()[second].kind);
  EXPECT_EQ(finding.second_unit, build.log.ops()[second].unit);
  if (first != kNoOp) {
    EXPECT_EQ(finding.first_kind, build.log.ops()[first].kind);
    EXPECT_EQ(finding.first_unit, build.log.ops()[first].unit);
    EXPECT_NE(finding.message.find("op " + std::to_string(first) + " ("), std::string::npos)
        << finding.message;
  }
  EXPECT_NE(finding.message.find("op " + std::to_string(second) + " ("), std::string::npos)
      << finding.message;
  EXPECT_EQ(finding.memory.begin, memory.begin);
  EXPECT_EQ(finding.memory.end, memory.end);
  EXPECT_NE(finding.message.find(advice), std::string::npos) << finding.message;
  EXPECT_EQ(finding.message.find('\n'), std::string::npos);
  EXPECT_EQ(finding.message.back(), '.');
}

}  // namespace torch_offload::testing
