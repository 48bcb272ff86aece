// The races and faults that shipped in systems of this kind, each planted, each with its clean
// twin.

#include <gtest/gtest.h>

#include <cstdio>
#include <memory>
#include <string>

#include "check/published_races.h"
#include "host/host_device.h"
#include "sim/sim_device.h"

namespace torch_offload {
namespace {

std::unique_ptr<Device> host_device() {
  return std::make_unique<HostDevice>(HostDevice::ComputeStreams::kWorker);
}

std::unique_ptr<Device> inline_host_device() { return std::make_unique<HostDevice>(); }

std::unique_ptr<Device> sim_device() {
  SimCosts costs;
  costs.copy_bytes_per_second = 1e9;
  return std::make_unique<SimDevice>(costs);
}

class PublishedRaceTest : public ::testing::TestWithParam<PublishedRace> {
 protected:
  void SetUp() override {
    if (GetParam().caught == PublishedRace::Caught::kInPython) {
      ASSERT_EQ(GetParam().run, nullptr);
      ASSERT_NE(GetParam().python_test, nullptr);
    }
  }
};

TEST_P(PublishedRaceTest, IsCaughtAndItsTwinPasses) {
  const PublishedRace& race = GetParam();
  if (race.run == nullptr) {
    return;  // SetUp has seen that it names the test in Python
  }
  for (const auto make_device : {host_device, inline_host_device, sim_device}) {
    const std::unique_ptr<Device> device = make_device();
    const RaceOutcome planted = run_race(race, *device, /*planted=*/true);
    EXPECT_TRUE(planted.is_caught(race))
        << (planted.findings.empty() ? "nothing found" : planted.findings[0].message);
    const RaceOutcome twin = run_race(race, *device, /*planted=*/false);
    EXPECT_TRUE(twin.is_clean()) << (twin.findings.empty() ? "" : twin.findings[0].message);
    EXPECT_FALSE(twin.is_caught(race));
    EXPECT_EQ(device->counters().allocated_bytes, 0U);
    EXPECT_EQ(device->counters().registered_bytes, 0U);
  }
}

INSTANTIATE_TEST_SUITE_P(All, PublishedRaceTest, ::testing::ValuesIn(published_races()),
                         [](const auto& info) { return std::string(info.param.id); });

TEST(PublishedRacesTest, AreListedInTheirOrder) {
  ASSERT_EQ(published_races().size(), 24U);
  for (std::size_t i = 0; i < published_races().size(); ++i) {
    EXPECT_EQ(published_races()[i].id, "H" + std::to_string(i + 1));
  }
}

}  // namespace
}  // namespace torch_offload
