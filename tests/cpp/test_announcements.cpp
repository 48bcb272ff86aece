#include <gtest/gtest.h>

#include <vector>

#include "pipeline_fixture.h"

namespace torch_offload::testing {
namespace {

/// Wants to be told of so many bytes, and notes the units that it was told of.
class Foretold : public RawLoader {
 public:
  using RawLoader::RawLoader;

  std::size_t announced_bytes() const override { return wanted_bytes; }
  void announce(UnitIndex unit) override { announced.push_back(unit); }

  std::size_t wanted_bytes = 0;
  std::vector<UnitIndex> announced;
};

class AnnouncementsTest : public ::testing::Test {
 protected:
  static constexpr std::size_t kBytes = 4096;

  static std::vector<Unit> units() {
    std::vector<Unit> units(4);
    for (std::size_t i = 0; i < units.size(); ++i) {
      units[i].name = "unit" + std::to_string(i);
      units[i].size_bytes = kBytes;
      units[i].layer_index = static_cast<std::uint32_t>(i);
    }
    return units;
  }

  /// What is announced at each acquire of a pass.
  std::vector<std::vector<UnitIndex>> pass(Pipeline& pipeline) {
    std::vector<std::vector<UnitIndex>> told;
    pipeline.enter();
    for (UnitIndex unit = 0; unit < 4; ++unit) {
      loader_.announced.clear();
      pipeline.acquire(unit);
      told.push_back(loader_.announced);
      pipeline.release(unit);
    }
    pipeline.leave(true);
    return told;
  }

  HostDevice device_;
  Masters masters_{device_, units()};
  Foretold loader_{device_, masters_};
};

TEST_F(AnnouncementsTest, UnitsAreForetoldInTheOrderOfThePassAndIntoTheNext) {
  PipelineOptions options;
  options.mode = Mode::kSync;
  options.poison_on_release = true;  // so that nothing is whole that is not in use
  Pipeline pipeline(device_, loader_, plan_of(units(), 0), options);
  loader_.wanted_bytes = 2 * kBytes;
  const std::vector<std::vector<UnitIndex>> expected = {{1, 2}, {2, 3}, {3, 0}, {0, 1}};
  EXPECT_EQ(pass(pipeline), expected);
  EXPECT_EQ(pass(pipeline), expected);
}

TEST_F(AnnouncementsTest, WhatIsCopiedAlreadyIsNotForetold) {
  Pipeline pipeline(device_, loader_, plan_of(units()), {});
  pass(pipeline);
  loader_.wanted_bytes = kBytes;
  for (const std::vector<UnitIndex>& told : pass(pipeline)) {
    for (const UnitIndex unit : told) {
      EXPECT_FALSE(pipeline.is_acquired(unit));
    }
    EXPECT_LE(told.size(), 1U);
  }
}

TEST_F(AnnouncementsTest, LoaderThatWantsNothingIsToldNothing) {
  Pipeline pipeline(device_, loader_, plan_of(units()), {});
  for (const std::vector<UnitIndex>& told : pass(pipeline)) {
    EXPECT_TRUE(told.empty());
  }
}

}  // namespace
}  // namespace torch_offload::testing
