#include <gtest/gtest.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "check/hazard_checker.h"
#include "core/error.h"
#include "sim/simulate.h"

namespace torch_offload {
namespace {

// At a byte a nanosecond a unit is copied in 1024 ns, packed in 768; it is decoded in 256.
constexpr std::size_t kUnitBytes = 1024;
constexpr std::size_t kPackedBytes = 768;
constexpr std::int64_t kDecodeNs = 256;
constexpr std::size_t kNumUnits = 8;

SimRequest request_of(const std::vector<Transport>& transports, std::int64_t compute_ns,
                      Mode mode = Mode::kPipeline) {
  PlanRequest planned;
  for (std::uint32_t layer = 0; layer < transports.size(); ++layer) {
    planned.units.push_back({"u", kUnitBytes, layer, UnitKind::kFfn});
  }
  planned.transports = transports;
  SimRequest request;
  request.plan = make_plan(planned);
  request.options.mode = mode;
  request.costs.copy_bytes_per_second = 1e9;
  request.costs.decode_bytes_per_second = 4e9;
  request.costs.compute_ns.assign(transports.size(), compute_ns);
  request.packed_bytes.assign(transports.size(), kPackedBytes);
  std::vector<UnitIndex> pass;
  for (UnitIndex unit = 0; unit < transports.size(); ++unit) {
    pass.push_back(unit);
  }
  request.passes.assign(4, pass);
  return request;
}

std::int64_t steady_ns(const SimResult& result) {
  return result.pass_end_ns[3] - result.pass_end_ns[2];
}

std::vector<Transport> all(Transport transport) {
  return std::vector<Transport>(kNumUnits, transport);
}

TEST(SimulatePackedTest, PackedCopiesTakeTheirPartOfTheLink) {
  const SimResult raw = simulate(request_of(all(Transport::kRaw), 100));
  const SimResult packed = simulate(request_of(all(Transport::kPacked), 100));
  EXPECT_EQ(steady_ns(raw), kNumUnits * kUnitBytes);
  EXPECT_EQ(steady_ns(packed), kNumUnits * kPackedBytes) << "decoder and kernels hide behind it";
  EXPECT_EQ(packed.counters.copies, packed.stats.onloads);
  EXPECT_EQ(packed.counters.decodes, packed.stats.onloads);
  EXPECT_EQ(packed.counters.bytes_copied, packed.stats.onloads * kPackedBytes);
  EXPECT_EQ(packed.stats.bytes_onloaded, packed.stats.onloads * kUnitBytes);
}

TEST(SimulatePackedTest, DecoderTakesItsTurnWithKernels) {
  const SimResult packed = simulate(request_of(all(Transport::kPacked), 2000));
  EXPECT_EQ(steady_ns(packed), kNumUnits * (2000 + kDecodeNs));
  const SimResult raw = simulate(request_of(all(Transport::kRaw), 2000));
  EXPECT_EQ(steady_ns(raw), kNumUnits * 2000) << "compute-bound, packing costs time";
}

TEST(SimulatePackedTest, UnitsThatStayPackedAreOnlyDecoded) {
  const SimResult result = simulate(request_of(all(Transport::kPackedResident), 100));
  EXPECT_EQ(steady_ns(result), kNumUnits * (100 + kDecodeNs));
  EXPECT_EQ(result.counters.copies, 0U) << "they were brought there before the first pass";
  EXPECT_EQ(result.counters.bytes_copied, 0U);
  EXPECT_EQ(result.counters.decodes, result.stats.onloads);
}

TEST(SimulatePackedTest, UnitsOfAllSortsKeepTheirOrder) {
  std::vector<Transport> mixed = all(Transport::kRaw);
  for (std::size_t unit = 0; unit < mixed.size(); ++unit) {
    mixed[unit] = unit % 3 == 0   ? Transport::kPacked
                  : unit % 3 == 1 ? Transport::kPackedResident
                                  : Transport::kRaw;
  }
  for (const Mode mode : {Mode::kSync, Mode::kStreams, Mode::kEvents, Mode::kPipeline}) {
    const SimResult result = simulate(request_of(mixed, 300, mode));
    EXPECT_TRUE(HazardChecker().check(result.log).empty());
    std::uint64_t num_decodes = 0;
    std::uint64_t num_only_decoded = 0;
    for (const Op& op : result.log.ops()) {
      num_decodes += op.kind == OpKind::kDecode ? 1U : 0U;
      if (op.kind == OpKind::kDecode) {
        EXPECT_NE(mixed[op.unit], Transport::kRaw);
        num_only_decoded += mixed[op.unit] == Transport::kPackedResident ? 1U : 0U;
        EXPECT_EQ(op.end_ns - op.begin_ns, kDecodeNs);
      }
    }
    EXPECT_EQ(num_decodes, result.counters.decodes);
    EXPECT_EQ(result.counters.copies, result.stats.onloads - num_only_decoded);
  }
}

/// Every other unit travels packed, through a window for one unit that all of them share.
SimRequest in_one_place(std::size_t staging_slots) {
  std::vector<Transport> turns = all(Transport::kPacked);
  for (std::size_t unit = 1; unit < turns.size(); unit += 2) {
    turns[unit] = Transport::kPackedResident;
  }
  SimRequest request = request_of(turns, 10);
  PlanRequest planned;
  planned.units = request.plan.units;
  planned.transports = std::move(turns);
  planned.window_bytes = kUnitBytes;
  planned.depth_bytes = 0;
  planned.one_ring = true;
  planned.staging_slots = staging_slots;
  request.plan = make_plan(planned);
  return request;
}

TEST(SimulatePackedTest, InOneRingUnitsComeInOrderAndPackedCopiesRunAhead) {
  constexpr std::int64_t kNumCopied = kNumUnits / 2;
  const SimResult two = simulate(in_one_place(2));
  EXPECT_EQ(steady_ns(two), kNumCopied * static_cast<std::int64_t>(kPackedBytes))
      << "the link never waits for the one place";
  const SimResult one = simulate(in_one_place(1));
  EXPECT_EQ(steady_ns(one), kNumCopied * (static_cast<std::int64_t>(kPackedBytes) + kDecodeNs))
      << "with one slot it waits for each decoder";
  for (const SimResult* result : {&two, &one}) {
    EXPECT_TRUE(HazardChecker().check(result->log).empty());
    EXPECT_EQ(result->stats.onloads, 4 * kNumUnits + 1)
        << "but the next pass's first, each came once a use: none ahead of others that need its "
           "bytes";
  }
}

TEST(SimulatePackedTest, TheSameRequestGivesTheSameTimes) {
  const SimRequest request = request_of(all(Transport::kPacked), 700);
  EXPECT_EQ(simulate(request).pass_end_ns, simulate(request).pass_end_ns);
}

TEST(SimulatePackedTest, PackedUnitWithoutASizeIsRefused) {
  SimRequest request = request_of(all(Transport::kPacked), 100);
  request.packed_bytes[3] = 0;
  EXPECT_THROW(simulate(request), ValueError);
  request.packed_bytes.clear();
  EXPECT_THROW(simulate(request), ValueError);
  request = request_of(all(Transport::kRaw), 100);
  request.packed_bytes.clear();
  EXPECT_NO_THROW(simulate(request));
}

}  // namespace
}  // namespace torch_offload
