#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "planner/planner.h"
#include "planner_requests.h"

namespace torch_offload {
namespace {

constexpr double kDecoder = 1637e9;
constexpr double kShare = 0.705;

// What is given up for an early end of the search, twice: now and with the other budget.
constexpr double kSlack = 1.003;

void allow_packing(PlannerRequest& request, PackingPolicy policy, double share = kShare) {
  request.packing = policy;
  request.decode_bytes_per_second = kDecoder;
  request.packed_bytes.clear();
  for (const Unit& unit : request.units) {
    request.packed_bytes.push_back(
        static_cast<std::size_t>(share * static_cast<double>(unit.size_bytes)));
  }
}

/// Units of random sizes and types, some of which do not pack, and a decoder of some speed.
PlannerRequest random_packable(std::mt19937& random, PackingPolicy policy) {
  PlannerRequest request = random_request(random, /*most_layers=*/24);
  allow_packing(request, policy, 0.6 + 0.01 * static_cast<double>(random() % 20));
  request.decode_bytes_per_second = kLink * (1.2 + static_cast<double>(random() % 40));
  for (ExpectedForward& forward : request.forwards) {  // as of short prompts: copies count
    for (std::int64_t& time_ns : forward.compute_ns) {
      time_ns /= 3;
    }
  }
  for (std::size_t& packed : request.packed_bytes) {
    packed = random() % 6 == 0 ? 0 : packed;
  }
  return request;
}

struct Bytes {
  std::size_t resident = 0;
  std::size_t packed_resident = 0;
  std::size_t slot = 0;
  std::size_t streamed_raw = 0;
  std::size_t streamed_packed = 0;  // of weights, not of copies
};

Bytes bytes_of(const PlannerRequest& request, const Plan& plan) {
  Bytes bytes;
  for (UnitIndex unit = 0; unit < plan.units.size(); ++unit) {
    const std::size_t size = plan.units[unit].size_bytes;
    const std::size_t packed = aligned_size(request.packed_bytes_of(unit));
    if (plan.is_resident(unit)) {
      EXPECT_EQ(plan.transport(unit), Transport::kRaw);
      bytes.resident += size;
      continue;
    }
    EXPECT_EQ(plan.places[unit]->size_bytes(), size);
    EXPECT_LE(plan.places[unit]->end, plan.window_bytes);
    if (plan.transport(unit) == Transport::kRaw) {
      bytes.streamed_raw += size;
      continue;
    }
    EXPECT_GT(packed, 0U) << "a unit that cannot be packed is";
    if (plan.transport(unit) == Transport::kPacked) {
      bytes.slot = std::max(bytes.slot, packed);
      bytes.streamed_packed += size;
    } else {
      bytes.packed_resident += packed;
    }
  }
  return bytes;
}

class PackingPolicyTest : public ::testing::TestWithParam<PackingPolicy> {};

TEST_P(PackingPolicyTest, NeverExceedsItsBudgetAndEveryByteHasOneHome) {
  std::mt19937 random(11);
  int num_packed = 0;
  for (int round = 0; round < 60; ++round) {
    PlannerRequest request = random_packable(random, GetParam());
    const std::size_t least = least_budget_bytes(request);
    const std::size_t total = std::max(least, total_bytes(request.units));
    const std::size_t budget = least + (random() % 1000) * (total - least) / 999;
    const Choice choice = choose_plan(request, budget);
    const Plan& plan = choice.plan;
    const Bytes bytes = bytes_of(request, plan);
    EXPECT_EQ(bytes.resident, plan.resident_bytes);
    EXPECT_EQ(bytes.packed_resident, choice.packed_resident_bytes);
    EXPECT_EQ(plan.staging_slots * bytes.slot, choice.staging_bytes);
    EXPECT_LE(plan.window_bytes + plan.resident_bytes + choice.packed_resident_bytes +
                  choice.staging_bytes,
              budget)
        << round << ": " << choice.rule;
    EXPECT_NEAR(simulated_ns(request, plan), choice.score_ns, 1.0)
        << "what is predicted is what the plan takes";
    num_packed += bytes.packed_resident + bytes.streamed_packed > 0 ? 1 : 0;
    if (GetParam() == PackingPolicy::kAlways) {
      for (UnitIndex unit = 0; unit < plan.units.size(); ++unit) {
        const bool streams = !plan.is_resident(unit) && !plan.stays_packed(unit);
        EXPECT_EQ(streams && request.packed_bytes[unit] > 0,
                  plan.transport(unit) == Transport::kPacked);
      }
    }
  }
  EXPECT_GT(num_packed, 20);
}

TEST_P(PackingPolicyTest, MoreBudgetIsNeverSlower) {
  std::mt19937 random(12);
  for (int round = 0; round < 12; ++round) {
    PlannerRequest request = random_packable(random, GetParam());
    const std::size_t least = least_budget_bytes(request);
    const std::size_t total = std::max(least, total_bytes(request.units));
    double before_ns = 0;
    for (std::size_t step = 0; step <= 8; ++step) {
      const std::size_t budget = least + step * (total - least) / 8;
      const double now_ns = choose_plan(request, budget).score_ns;
      if (before_ns > 0) {
        EXPECT_LE(now_ns, before_ns * kSlack) << "round " << round << ", step " << step;
      }
      before_ns = now_ns;
    }
  }
}

TEST_P(PackingPolicyTest, LeastBudgetIsAcceptedAndOneByteLessIsRefused) {
  std::mt19937 random(13);
  for (int round = 0; round < 20; ++round) {
    PlannerRequest request = random_packable(random, GetParam());
    const std::size_t least = least_budget_bytes(request);
    EXPECT_LE(choose_plan(request, least).plan.window_bytes, least);
    if (GetParam() == PackingPolicy::kWherePays) {
      EXPECT_THROW(choose_plan(request, least - 1), ValueError);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Policies, PackingPolicyTest,
                         ::testing::Values(PackingPolicy::kWherePays, PackingPolicy::kAlways));

TEST(PlannerPackingTest, AutoIsNeverSlowerThanTheBestRawPlan) {
  std::mt19937 random(14);
  int num_faster = 0;
  for (int round = 0; round < 80; ++round) {
    PlannerRequest request = random_packable(random, PackingPolicy::kWherePays);
    const std::size_t budget = random_budget(random, request.units);
    const Choice chosen = choose_plan(request, budget);
    request.packing = PackingPolicy::kNever;
    const Choice raw = choose_plan(request, budget);
    EXPECT_LE(chosen.score_ns, raw.score_ns) << "round " << round;
    EXPECT_EQ(chosen.raw_score_ns, raw.score_ns);
    num_faster += chosen.score_ns < raw.score_ns ? 1 : 0;
  }
  EXPECT_GT(num_faster, 20);
}

TEST(PlannerPackingTest, ATokenWithinThreeFifthsOfTheWeightsIsMoreThanTwiceAsFast) {
  struct Case {
    std::vector<Unit> units;
    double most;  // of the best raw plan's time
  };
  for (const Case& one : {Case{llama_layers(80), 0.30}, Case{llama_layers(16), 0.45},
                          Case{llama_leaves(16), 0.35}, Case{llama_leaves(80), 0.28}}) {
    for (const PackingPolicy policy : {PackingPolicy::kWherePays, PackingPolicy::kAlways}) {
      PlannerRequest request = request_of(one.units, {0.02});
      const std::size_t budget = total_bytes(request.units) / 5 * 3;
      const double raw_ns = choose_plan(request, budget).score_ns;
      allow_packing(request, policy);
      const Choice choice = choose_plan(request, budget);
      EXPECT_LT(choice.score_ns, one.most * raw_ns) << one.units.size() << choice.rule;
      EXPECT_GT(choice.packed_resident_bytes, total_bytes(request.units) / 4);
    }
  }
}

/// With little room each unit has its place in turn, and a slot for one packed copy is enough.
TEST(PlannerPackingTest, LeastBudgetSharesOnePlaceAndOneSlot) {
  PlannerRequest request = request_of(llama_layers(16), {0.02});
  allow_packing(request, PackingPolicy::kAlways);
  const std::size_t slot = aligned_size(request.packed_bytes[1]);
  const std::size_t least = 1344 * kMiB + slot;
  EXPECT_EQ(least_budget_bytes(request), least);
  const Choice choice = choose_plan(request, least);
  EXPECT_EQ(choice.plan.staging_slots, 1U);
  EXPECT_EQ(choice.staging_bytes, slot);
  EXPECT_EQ(choice.plan.window_bytes, 1344 * kMiB);
  EXPECT_LT(choose_plan(request, least + slot).score_ns, choice.score_ns);
}

TEST(PlannerPackingTest, LargeUnitsTravelRawWhereASmallSlotLeavesMoreRoom) {
  int num_so = 0;
  for (std::size_t percent = 54; percent <= 62; ++percent) {
    PlannerRequest request = request_of(llama_leaves(16), {0.02});
    const std::size_t budget = total_bytes(request.units) / 100 * percent;
    allow_packing(request, PackingPolicy::kAlways);
    const double all_packed_ns = choose_plan(request, budget).score_ns;
    request.packing = PackingPolicy::kWherePays;
    const Choice choice = choose_plan(request, budget);
    const Bytes bytes = bytes_of(request, choice.plan);
    if (bytes.streamed_raw > 0) {
      ++num_so;
      EXPECT_LT(choice.score_ns, all_packed_ns) << choice.rule;
      EXPECT_LT(bytes.slot, 128 * kMiB);
    }
  }
  EXPECT_GT(num_so, 0);
}

TEST(PlannerPackingTest, WhatFitsPackedIsNotStreamed) {
  PlannerRequest request = request_of(llama_layers(16), {0.02});
  allow_packing(request, PackingPolicy::kWherePays);
  const Choice choice = choose_plan(request, total_bytes(request.units) / 10 * 8);
  const Bytes bytes = bytes_of(request, choice.plan);
  EXPECT_EQ(bytes.streamed_raw + bytes.streamed_packed, 0U) << choice.rule;
  EXPECT_EQ(choice.staging_bytes, 0U) << "nothing is copied: no ring";
  EXPECT_GT(bytes.resident, 0U) << "what is left over keeps units as they are";
}

TEST(PlannerPackingTest, EverythingPackedNeedsRoomForOneUnitMore) {
  PlannerRequest request = request_of(llama_layers(16), {0.02});
  allow_packing(request, PackingPolicy::kWherePays);
  std::size_t packed = 0;
  for (const std::size_t size_bytes : request.packed_bytes) {
    packed += aligned_size(size_bytes);
  }
  const Choice choice = choose_plan(request, packed + 1344 * kMiB);
  EXPECT_EQ(choice.packed_resident_bytes, packed) << choice.rule;
  EXPECT_EQ(choice.plan.window_bytes, 1344 * kMiB);
}

TEST(PlannerPackingTest, WhatComputesLongerThanItCopiesIsNotPacked) {
  PlannerRequest request = request_of(llama_layers(16), {1.6});
  allow_packing(request, PackingPolicy::kWherePays);
  const Choice choice = choose_plan(request, total_bytes(request.units) / 2);
  const Bytes bytes = bytes_of(request, choice.plan);
  EXPECT_EQ(bytes.streamed_packed + bytes.packed_resident, 0U) << choice.rule;
  EXPECT_EQ(choice.score_ns, choice.raw_score_ns);
}

TEST(PlannerPackingTest, NearBalanceOnlyPartOfTheUnitsIsPacked) {
  // Copies of what streams take longer than kernels, and less than kernels and decoder of all.
  PlannerRequest request = request_of(llama_layers(80), {0.7});
  const std::size_t budget = total_bytes(request.units) / 5;
  allow_packing(request, PackingPolicy::kWherePays);
  request.decode_bytes_per_second = 200e9;
  const Choice choice = choose_plan(request, budget);
  const Bytes bytes = bytes_of(request, choice.plan);
  EXPECT_GT(bytes.streamed_packed + bytes.packed_resident, 0U) << choice.rule;
  EXPECT_GT(bytes.streamed_raw + bytes.resident, 0U) << choice.rule;
  EXPECT_LT(choice.score_ns, choice.raw_score_ns);
  request.packing = PackingPolicy::kAlways;
  EXPECT_LE(choice.score_ns, choose_plan(request, budget).score_ns);
}

TEST(PlannerPackingTest, ADecoderSlowerThanTheLinkPacksNothing) {
  PlannerRequest request = request_of(llama_layers(8), {0.02, 1.0});
  allow_packing(request, PackingPolicy::kWherePays);
  request.decode_bytes_per_second = kLink / 2;
  const Choice choice = choose_plan(request, 6000 * kMiB);
  EXPECT_EQ(choice.score_ns, choice.raw_score_ns);
  EXPECT_EQ(choice.staging_bytes + choice.packed_resident_bytes, 0U);
}

TEST(PlannerPackingTest, UnitsThatDoNotPackGiveTheRawPlan) {
  for (const PackingPolicy policy : {PackingPolicy::kWherePays, PackingPolicy::kAlways}) {
    PlannerRequest request = request_of(llama_layers(8), {0.02, 1.0});
    const Choice raw = choose_plan(request, 6000 * kMiB);
    allow_packing(request, policy, 0.0);
    const Choice choice = choose_plan(request, 6000 * kMiB);
    EXPECT_EQ(choice.score_ns, raw.score_ns);
    EXPECT_EQ(choice.plan.window_bytes, raw.plan.window_bytes);
    EXPECT_EQ(choice.rule, raw.rule);
  }
}

TEST(PlannerPackingTest, MeasuredCopiesCountByTheirPackedPart) {
  PlannerRequest request = request_of(llama_layers(16), {0.02});
  allow_packing(request, PackingPolicy::kAlways);
  const double by_rate_ns = choose_plan(request, 5000 * kMiB).score_ns;
  request.copy_ns.emplace();
  for (const Unit& unit : request.units) {
    request.copy_ns->push_back(2 * copy_ns(unit));
  }
  EXPECT_NEAR(choose_plan(request, 5000 * kMiB).score_ns, 2 * by_rate_ns, 0.05 * by_rate_ns);
}

TEST(PlannerPackingTest, TransportsAreChosenForPlacesThatAreThere) {
  PlannerRequest request = request_of(llama_layers(8), {0.02, 1.0});
  allow_packing(request, PackingPolicy::kWherePays);
  PlanRequest usual;
  usual.units = request.units;
  usual.resident.assign(usual.units.size(), false);
  usual.resident[3] = true;
  const Plan plan = make_plan(usual);
  const Choice choice = choose_transports(request, plan);
  ASSERT_EQ(choice.plan.places.size(), plan.places.size());
  for (UnitIndex unit = 0; unit < plan.units.size(); ++unit) {
    EXPECT_EQ(choice.plan.is_resident(unit), plan.is_resident(unit));
    EXPECT_EQ(choice.plan.transport(unit) == Transport::kPacked, !plan.is_resident(unit));
  }
  EXPECT_LT(choice.score_ns, choice.raw_score_ns);
  EXPECT_EQ(choice.plan.window_bytes, plan.window_bytes);
  request.packing = PackingPolicy::kNever;
  EXPECT_TRUE(choose_transports(request, plan).plan.transports.empty());
}

TEST(PlannerPackingTest, WhatCannotBeIsRefused) {
  PlannerRequest good = request_of(llama_layers(2), {1.0});
  allow_packing(good, PackingPolicy::kWherePays);
  PlannerRequest request = good;
  request.packed_bytes.pop_back();
  EXPECT_THROW(choose_plan(request, 9000 * kMiB), ValueError);
  request = good;
  request.decode_bytes_per_second = 0;
  EXPECT_THROW(choose_plan(request, 9000 * kMiB), ValueError);
  EXPECT_THROW(choose_transports(good, Plan{}), ValueError);
  EXPECT_THROW(parse_packing_policy("zip"), ValueError);
}

}  // namespace
}  // namespace torch_offload
