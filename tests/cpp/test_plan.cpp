#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <ctime>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/plan.h"

namespace torch_offload {
namespace {

constexpr std::size_t kSlice = kAlignmentBytes;

std::vector<Unit> layers_of(std::size_t num_layers, std::size_t mha_slices,
                            std::size_t ffn_slices) {
  std::vector<Unit> units;
  for (std::size_t layer = 0; layer < num_layers; ++layer) {
    const auto index = static_cast<std::uint32_t>(layer);
    units.push_back({"mha" + std::to_string(layer), mha_slices * kSlice, index, UnitKind::kMha});
    units.push_back({"ffn" + std::to_string(layer), ffn_slices * kSlice, index, UnitKind::kFfn});
  }
  return units;
}

PlanRequest request_of(std::vector<Unit> units, std::optional<std::size_t> depth_bytes = {}) {
  PlanRequest request;
  request.units = std::move(units);
  request.depth_bytes = depth_bytes;
  return request;
}

std::vector<Unit> random_units(std::mt19937& random, std::size_t count, std::size_t max_slices) {
  std::uniform_int_distribution<std::size_t> slices(1, max_slices);
  std::vector<Unit> units;
  for (std::size_t i = 0; i < count; ++i) {
    units.push_back({"unit" + std::to_string(i), slices(random) * kSlice,
                     static_cast<std::uint32_t>(i / 2), UnitKind::kMha});
  }
  return units;
}

std::size_t total_bytes(const std::vector<Unit>& units) {
  std::size_t total = 0;
  for (const Unit& unit : units) {
    total += unit.size_bytes;
  }
  return total;
}

std::size_t largest_bytes(const std::vector<Unit>& units) {
  std::size_t largest = 0;
  for (const Unit& unit : units) {
    largest = std::max(largest, unit.size_bytes);
  }
  return largest;
}

/// Places are aligned, inside the window, and the overlap sets say which share a slice.
void expect_valid_places(const Plan& plan) {
  std::vector<UnitIndex> streamed;
  std::size_t resident_bytes = 0;
  for (UnitIndex unit = 0; unit < plan.units.size(); ++unit) {
    if (plan.is_resident(unit)) {
      resident_bytes += plan.units[unit].size_bytes;
      EXPECT_TRUE(plan.overlaps[unit].empty());
      continue;
    }
    streamed.push_back(unit);
    const ByteRange& place = *plan.places[unit];
    EXPECT_EQ(place.begin % kSlice, 0U);
    EXPECT_EQ(place.end - place.begin, plan.units[unit].size_bytes);
    EXPECT_LE(place.end, plan.window_bytes);
  }
  EXPECT_EQ(plan.resident_bytes, resident_bytes);

  // The overlap sets, slice by slice.
  for (const UnitIndex a : streamed) {
    std::vector<UnitIndex> expected;
    for (const UnitIndex b : streamed) {
      bool meets = false;
      for (std::size_t at = plan.places[a]->begin; at < plan.places[a]->end; at += kSlice) {
        meets = meets || (plan.places[b]->begin <= at && at < plan.places[b]->end);
      }
      if (a != b && meets) {
        expected.push_back(b);
      }
    }
    std::vector<UnitIndex> overlaps = plan.overlaps[a];
    std::sort(overlaps.begin(), overlaps.end());
    EXPECT_EQ(overlaps, expected) << "unit " << a;
  }
}

/// While any unit is in use, it and those within depth ahead of it have bytes of their own: marks
/// every slice of a small window with its users and complains where two would meet.
void expect_valid(const Plan& plan) {
  expect_valid_places(plan);
  std::vector<UnitIndex> streamed;
  for (UnitIndex unit = 0; unit < plan.units.size(); ++unit) {
    if (!plan.is_resident(unit)) {
      streamed.push_back(unit);
    }
  }
  for (std::size_t used = 0; used < streamed.size(); ++used) {
    std::vector<UnitIndex> owner(plan.window_bytes / kSlice, kNoUnit);
    std::size_t ahead_bytes = 0;
    for (std::size_t step = 0; step < streamed.size(); ++step) {
      const UnitIndex unit = streamed[(used + step) % streamed.size()];
      ahead_bytes += step == 0 ? 0 : plan.units[unit].size_bytes;
      if (step > 1 && ahead_bytes > plan.depth_bytes) {
        break;
      }
      for (std::size_t at = plan.places[unit]->begin; at < plan.places[unit]->end; at += kSlice) {
        ASSERT_EQ(owner[at / kSlice], kNoUnit)
            << "while unit " << streamed[used] << " is in use, unit " << unit << " meets unit "
            << owner[at / kSlice];
        owner[at / kSlice] = unit;
      }
    }
  }
}

TEST(PlanTest, UniformLayersOfEvenCountTakeExactlyTwoLayers) {
  for (const std::size_t num_layers : {2U, 4U, 6U, 16U, 80U}) {
    for (const auto& [mha, ffn] : {std::pair{1U, 2U}, {2U, 7U}, {7U, 2U}, {3U, 3U}}) {
      const Plan plan = make_plan(request_of(layers_of(num_layers, mha, ffn)));
      expect_valid(plan);
      EXPECT_EQ(plan.depth_bytes, (mha + ffn) * kSlice);
      if (mha == ffn && num_layers % 3 == 0) {  // three equal places do, and close the seam
        EXPECT_EQ(plan.window_bytes, 3 * mha * kSlice);
      } else {
        EXPECT_EQ(plan.window_bytes, 2 * (mha + ffn) * kSlice)
            << num_layers << " layers of " << mha << " and " << ffn;
      }
    }
  }
}

TEST(PlanTest, OddCountsCloseTheSeamWithAtMostThreeLayers) {
  for (std::size_t num_layers = 1; num_layers <= 9; ++num_layers) {
    for (const auto& [mha, ffn] : {std::pair{1U, 2U}, {2U, 7U}, {3U, 3U}}) {
      const Plan plan = make_plan(request_of(layers_of(num_layers, mha, ffn)));
      expect_valid(plan);
      EXPECT_LE(plan.window_bytes, std::min<std::size_t>(num_layers, 3) * (mha + ffn) * kSlice);
    }
  }
}

TEST(PlanTest, RandomSizesAndDepthsNeverMeetWithinTheDepth) {
  std::mt19937 random(1);
  for (int round = 0; round < 400; ++round) {
    const std::size_t count = 1 + random() % 14;
    const std::vector<Unit> units = random_units(random, count, 1 + random() % 40);
    PlanRequest request = request_of(units);
    if (round % 4 != 0) {
      request.depth_bytes = random() % (2 * total_bytes(units));
    }
    const Plan plan = make_plan(request);
    expect_valid(plan);
    EXPECT_LE(plan.window_bytes, total_bytes(units));
    EXPECT_EQ(plan.resident_bytes, 0U);
    if (HasFatalFailure()) {
      FAIL() << "round " << round;
    }
  }
}

TEST(PlanTest, DepthZeroStillLeavesRoomForTheNextUnit) {
  for (std::size_t count = 1; count <= 9; ++count) {
    PlanRequest request = request_of(layers_of(count, 2, 2), 0);
    request.units.resize(count);
    const Plan plan = make_plan(request);
    expect_valid(plan);
    // The fewest equal places in which no two neighbours share one, the seam included.
    std::size_t slots = std::min<std::size_t>(count, 2);
    while (count > 1 && (count - 1) % slots == 0) {
      ++slots;
    }
    EXPECT_EQ(plan.window_bytes, slots * 2 * kSlice) << count << " units";
  }
}

TEST(PlanTest, DepthBeyondAllBytesGivesEachUnitBytesOfItsOwn) {
  const std::vector<Unit> units = layers_of(5, 2, 3);
  for (const std::size_t depth : {total_bytes(units), SIZE_MAX / 2, SIZE_MAX}) {
    const Plan plan = make_plan(request_of(units, depth));
    expect_valid(plan);
    EXPECT_EQ(plan.window_bytes, total_bytes(units));
  }
}

TEST(PlanTest, LeavesTakeAFewOfTheLargestAndNotTwoLayers) {
  std::vector<Unit> leaves;
  for (std::uint32_t layer = 0; layer < 16; ++layer) {
    for (const std::size_t slices : {64U, 8U, 8U, 64U, 224U, 224U, 224U}) {
      leaves.push_back({"leaf", slices * kSlice, layer, UnitKind::kMha});
    }
  }
  const Plan plan = make_plan(request_of(leaves));
  expect_valid(plan);
  EXPECT_EQ(plan.depth_bytes, 560 * kSlice) << "2.5 times the largest leaf";
  EXPECT_LE(plan.window_bytes, 5 * 224 * kSlice);
}

TEST(PlanTest, WindowThatIsThereAlreadyIsKeptAsItIs) {
  std::mt19937 random(6);
  for (int round = 0; round < 100; ++round) {
    PlanRequest request = request_of(random_units(random, 1 + random() % 12, 1 + random() % 30));
    const std::size_t largest = largest_bytes(request.units);
    request.window_bytes = largest + (random() % 50) * kSlice;
    const Plan plan = make_plan(request);
    expect_valid_places(plan);
    EXPECT_EQ(plan.window_bytes, *request.window_bytes);
    EXPECT_EQ(plan.resident_bytes, 0U);
  }
}

TEST(PlanTest, WindowBelowTheLargestUnitThrowsAndNamesIt) {
  PlanRequest request = request_of(layers_of(3, 2, 5));
  request.window_bytes = 5 * kSlice - 1;
  try {
    make_plan(request);
    FAIL() << "accepted a window that a unit does not fit";
  } catch (const ValueError& error) {
    EXPECT_NE(std::string(error.what()).find("'ffn0'"), std::string::npos) << error.what();
  }
}

TEST(PlanTest, WithoutUnitsThePlanIsEmpty) {
  const Plan plan = make_plan(request_of({}));
  EXPECT_EQ(plan.window_bytes, 0U);
  EXPECT_EQ(plan.resident_bytes, 0U);
}

TEST(PlanTest, EmptyOrUnalignedUnitThrows) {
  for (const std::size_t size_bytes : {std::size_t{0}, kSlice - 1, kSlice + 1}) {
    std::vector<Unit> units = layers_of(1, 1, 1);
    units[1].size_bytes = size_bytes;
    EXPECT_THROW(make_plan(request_of(units)), ValueError);
  }
}

TEST(PlanTest, WhatIsResidentHasNoPlaceAndTheOthersRunAhead) {
  std::mt19937 random(2);
  for (int round = 0; round < 200; ++round) {
    PlanRequest request = request_of(random_units(random, 1 + random() % 20, 1 + random() % 30));
    std::size_t expected = 0;
    for (const Unit& unit : request.units) {
      request.resident.push_back(random() % 3 == 0);
      expected += request.resident.back() ? unit.size_bytes : 0;
    }
    const Plan plan = make_plan(request);
    expect_valid(plan);
    EXPECT_EQ(plan.resident_bytes, expected);
    for (UnitIndex unit = 0; unit < plan.units.size(); ++unit) {
      EXPECT_EQ(plan.is_resident(unit), request.resident[unit]);
    }
  }
}

TEST(PlanTest, ResidentOfAnotherLengthThrows) {
  PlanRequest request = request_of(layers_of(2, 1, 1));
  request.resident = {true, false, true};
  EXPECT_THROW(make_plan(request), ValueError);
}

/// Each of the two rings is laid as it would be without the other, so neither kind of unit keeps
/// the other from running ahead.
TEST(PlanTest, UnitsThatStayPackedLieInARingOfTheirOwn) {
  std::mt19937 random(6);
  for (int round = 0; round < 200; ++round) {
    PlanRequest request = request_of(random_units(random, 1 + random() % 20, 1 + random() % 30));
    request.decode_depth_bytes = random() % 40 * kSlice;
    PlanRequest copied = request_of({}, default_depth_bytes(request.units));
    PlanRequest decoded = request_of({}, request.decode_depth_bytes);
    for (const Unit& unit : request.units) {
      request.resident.push_back(random() % 4 == 0);
      const bool stays_packed = !request.resident.back() && random() % 2 == 0;
      request.transports.push_back(stays_packed ? Transport::kPackedResident
                                   : random() % 2 == 0 && !request.resident.back()
                                       ? Transport::kPacked
                                       : Transport::kRaw);
      if (!request.resident.back()) {
        (stays_packed ? decoded : copied).units.push_back(unit);
      }
    }
    const Plan plan = make_plan(request);
    expect_valid_places(plan);
    EXPECT_EQ(plan.transports, request.transports);
    EXPECT_EQ(plan.decode_depth_bytes, request.decode_depth_bytes);
    const Plan of_copied = make_plan(copied);
    const Plan of_decoded = make_plan(decoded);
    EXPECT_EQ(plan.window_bytes, of_copied.window_bytes + of_decoded.window_bytes);
    expect_valid(of_decoded);
    std::size_t num_copied = 0;
    std::size_t num_decoded = 0;
    for (UnitIndex unit = 0; unit < plan.units.size(); ++unit) {
      if (plan.is_resident(unit)) {
        continue;
      }
      if (plan.stays_packed(unit)) {
        EXPECT_EQ(plan.places[unit]->begin,
                  of_copied.window_bytes + of_decoded.places[num_decoded++]->begin);
      } else {
        EXPECT_EQ(plan.places[unit]->begin, of_copied.places[num_copied++]->begin);
      }
    }
    if (plan.window_bytes > 0) {
      EXPECT_FALSE(try_make_plan(request, plan.window_bytes - 1).has_value());
    }
    request.window_bytes = plan.window_bytes;
    EXPECT_EQ(make_plan(request).window_bytes, plan.window_bytes);
  }
}

/// As if they were all copied.
TEST(PlanTest, InOneRingAllLieInTheOrderOfTheirUse) {
  std::mt19937 random(7);
  for (int round = 0; round < 200; ++round) {
    PlanRequest request = request_of(random_units(random, 1 + random() % 20, 1 + random() % 30),
                                     random() % 40 * kSlice);
    const Plan raw = make_plan(request);
    for (std::size_t unit = 0; unit < request.units.size(); ++unit) {
      request.transports.push_back(random() % 2 == 0 ? Transport::kPackedResident
                                                     : Transport::kPacked);
    }
    request.one_ring = true;
    request.decode_depth_bytes = random() % 40 * kSlice;  // says nothing here
    request.staging_slots = 1;
    const Plan plan = make_plan(request);
    expect_valid(plan);
    EXPECT_TRUE(plan.one_ring);
    EXPECT_EQ(plan.staging_slots, 1U);
    for (UnitIndex unit = 0; unit < plan.units.size(); ++unit) {
      EXPECT_EQ(plan.places[unit]->begin, raw.places[unit]->begin);
    }
    EXPECT_EQ(plan.window_bytes, raw.window_bytes);
    request.window_bytes = plan.window_bytes + 5 * kSlice;
    expect_valid_places(make_plan(request));
  }
}

TEST(PlanTest, NoStagingSlotThrows) {
  PlanRequest request = request_of(layers_of(2, 1, 1));
  request.staging_slots = 0;
  EXPECT_THROW(make_plan(request), ValueError);
}

TEST(PlanTest, DecodersRunOneUnitAheadByDefault) {
  PlanRequest request = request_of(layers_of(4, 2, 5));
  request.transports.assign(8, Transport::kPackedResident);
  const Plan plan = make_plan(request);
  EXPECT_EQ(plan.window_bytes, (2 + 5) * kSlice);
  for (UnitIndex unit = 0; unit < 8; ++unit) {
    EXPECT_FALSE(plan.places[unit]->overlaps(*plan.places[(unit + 1) % 8])) << unit;
  }
}

TEST(PlanTest, TransportsThatCannotBeThrow) {
  PlanRequest request = request_of(layers_of(2, 1, 1));
  request.transports = {Transport::kPacked};
  EXPECT_THROW(make_plan(request), ValueError);
  request.transports.assign(4, Transport::kPacked);
  request.resident = {true, false, false, false};
  EXPECT_THROW(make_plan(request), ValueError);
  EXPECT_THROW(parse_transport("zip"), ValueError);
  for (const Transport one : {Transport::kRaw, Transport::kPacked, Transport::kPackedResident}) {
    EXPECT_EQ(parse_transport(name_of(one)), one);
  }
}

TEST(PlanTest, WindowOfTheLargestUnitTakesOneUnitAtATime) {
  PlanRequest request = request_of(layers_of(4, 2, 5), 0);
  request.window_bytes = 5 * kSlice;
  const Plan plan = make_plan(request);
  expect_valid_places(plan);
  for (UnitIndex unit = 0; unit + 1 < plan.units.size(); ++unit) {
    EXPECT_TRUE(plan.places[unit]->overlaps(*plan.places[unit + 1])) << unit;
  }
}

TEST(PlanTest, TheSameRequestGivesTheSamePlan) {
  std::mt19937 random(4);
  for (int round = 0; round < 20; ++round) {
    const std::vector<Unit> units = random_units(random, 12, 30);
    const PlanRequest request = request_of(units, total_bytes(units) / 3);
    const Plan first = make_plan(request);
    const Plan second = make_plan(request);
    EXPECT_EQ(first.window_bytes, second.window_bytes);
    EXPECT_EQ(first.depth_bytes, second.depth_bytes);
    EXPECT_EQ(first.overlaps, second.overlaps);
    for (UnitIndex unit = 0; unit < units.size(); ++unit) {
      ASSERT_EQ(first.is_resident(unit), second.is_resident(unit));
      if (!first.is_resident(unit)) {
        EXPECT_EQ(first.places[unit]->begin, second.places[unit]->begin);
      }
    }
  }
}

/// Two thousand units in the blink of an eye, however unhandy the request. The limit is that of the
/// slowest build that runs this (an instrumented one), not what is hoped for.
class PlanRunTimeTest : public ::testing::TestWithParam<int> {};

TEST_P(PlanRunTimeTest, TwoThousandUnits) {
  std::mt19937 random(5);
  std::vector<Unit> units;
  if (GetParam() < 3) {
    units = layers_of(1000, 53, 211);
  } else {
    units = random_units(random, 2000, 4000);
  }
  PlanRequest request = request_of(units);
  switch (GetParam() % 3) {
    case 0:
      break;
    case 1:
      request.depth_bytes = total_bytes(units) / 2;
      break;
    default:
      for (std::size_t i = 0; i < units.size(); ++i) {
        request.resident.push_back(i % 3 == 0);
      }
  }
  const std::clock_t start = std::clock();  // of this process alone: the machine may be busy
  const Plan plan = make_plan(request);
  const double elapsed_seconds =
      static_cast<double>(std::clock() - start) / static_cast<double>(CLOCKS_PER_SEC);
  EXPECT_LT(elapsed_seconds, 2.0);
  EXPECT_GE(plan.window_bytes, largest_bytes(units));
}

INSTANTIATE_TEST_SUITE_P(Requests, PlanRunTimeTest, ::testing::Range(0, 6));

}  // namespace
}  // namespace torch_offload
