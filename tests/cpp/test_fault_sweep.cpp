// The k-th call of a device fails, for every k of a pipeline's and of an arena's life.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check/hazard_checker.h"
#include "core/error.h"
#include "core/pinned_arena.h"
#include "lanes/failing_device.h"
#include "packed_master.h"
#include "pipeline_fixture.h"
#include "plans.h"

namespace torch_offload {
namespace {

using testing::Bytes;
using testing::layers_of;
using testing::Masters;
using testing::PackedMaster;
using testing::plan_of;
using testing::RawLoader;
using Failing = FailingDevice<HostDevice>;

class FaultSweepTest : public ::testing::TestWithParam<FailureKind> {
 protected:
  /// Runs `life` with a failure at its first call, its second, and so on until it gets through.
  template <typename Life>
  void fail_everywhere(std::uint64_t least_calls, const Life& life) {
    constexpr std::uint64_t kTooMany = 1000;
    std::uint64_t call = 1;
    for (; call < kTooMany; ++call) {
      SCOPED_TRACE("failure at call " + std::to_string(call));
      auto failure = std::make_shared<DeviceFailure>();
      failure->kind = GetParam();
      bool thrown = false;
      {
        auto device = std::make_shared<Failing>(failure, HostDevice::ComputeStreams::kWorker);
        OpLog log;
        device->attach_log(&log);
        thrown = life(device, [&](bool is_on) { failure->calls_until_failure = is_on ? call : 0; });
        failure->calls_until_failure = 0;
        device->attach_log(nullptr);
        for (const Finding& finding : HazardChecker().check(log)) {
          ADD_FAILURE() << failure->failed_call << ": " << finding.message;
        }
        const DeviceCounters& counters = device->counters();
        EXPECT_EQ(counters.allocated_bytes > 0, failure->failed_call == "free");
        EXPECT_EQ(counters.registrations > 0, failure->failed_call == "unregister_host");
      }
      const bool is_told_by_word = failure->failed_call == "free" ||
                                   failure->failed_call == "unregister_host" ||
                                   failure->failed_call == "synchronize";
      EXPECT_TRUE(thrown || is_told_by_word || failure->failed_call.empty())
          << failure->failed_call << " was swallowed";
      if (failure->failed_call.empty() || HasFailure()) {
        EXPECT_FALSE(thrown);
        break;
      }
    }
    EXPECT_GT(call, least_calls);
    EXPECT_LT(call, kTooMany);
  }
};

/// From before the window is allocated until after it is freed, streams that are still busy.
TEST_P(FaultSweepTest, InThePipelinesLife) {
  // Planning anew drains: without it, copies are in flight at the end.
  for (const auto& [layout, replans] :
       {std::pair{StreamLayout::kShared, false}, std::pair{StreamLayout::kSplit, false},
        std::pair{StreamLayout::kShared, true}, std::pair{StreamLayout::kSplit, true}}) {
    const Plan plan = plan_of(layers_of(3, 1, 2));
    fail_everywhere(40, [&, layout = layout, replans = replans](
                            const std::shared_ptr<Failing>& device, const auto& arm) {
      Masters masters(*device, plan.units);
      RawLoader loader(*device, masters);
      device->set_current_stream(device->create_stream({"caller", StreamRole::kCompute, 0}));
      arm(true);
      bool thrown = false;
      try {
        Pipeline pipeline(*device, loader, plan, {Mode::kPipeline, layout, false});
        for (int pass = 0; pass < 2; ++pass) {
          pipeline.enter();
          try {
            for (UnitIndex unit = 0; unit < plan.units.size(); ++unit) {
              pipeline.acquire(unit);
              pipeline.release(unit);
            }
          } catch (...) {
            thrown = true;
          }
          pipeline.leave(!thrown);
        }
        if (!thrown && replans) {
          Plan larger = plan;
          larger.window_bytes += 4096;
          pipeline.replan(larger);
        }
      } catch (const std::exception&) {
        thrown = true;
      }
      arm(false);
      device->set_current_stream(HostDevice::kCallerStream);
      return thrown;
    });
  }
}

/// Units that are copied packed and units that stay packed, from before their memory is allocated.
TEST_P(FaultSweepTest, InThePackedLoadersLife) {
  PlanRequest request;
  request.units = layers_of(2, 40, 40);
  request.transports = {Transport::kPackedResident, Transport::kPacked, Transport::kPackedResident,
                        Transport::kPackedResident};
  const Plan plan = make_plan(request);
  for (const Mode mode : {Mode::kPipeline, Mode::kStreams, Mode::kSync}) {
    fail_everywhere(30, [&](const std::shared_ptr<Failing>& device, const auto& arm) {
      std::mt19937 random(4);
      std::vector<std::unique_ptr<PackedMaster>> masters;
      PackedLoader::Options options;
      options.has_decode_stream = mode != Mode::kSync;
      for (UnitIndex unit = 0; unit < plan.units.size(); ++unit) {
        masters.push_back(
            std::make_unique<PackedMaster>(*device, plan.units[unit].size_bytes, random));
        const std::size_t packed_bytes = masters.back()->source.packed_bytes;
        options.resident_bytes.push_back(plan.stays_packed(unit) ? packed_bytes : 0);
        options.slot_bytes = std::max(options.slot_bytes, packed_bytes);
      }
      device->set_current_stream(device->create_stream({"caller", StreamRole::kCompute, 0}));
      arm(true);
      bool thrown = false;
      try {
        PackedLoader loader(*device, plan.units.size(), options);
        for (UnitIndex unit = 0; unit < plan.units.size(); ++unit) {
          if (loader.has_room(unit)) {
            loader.upload(unit, masters[unit]->source);
          } else {
            loader.set_source(unit, masters[unit]->source);
          }
        }
        Pipeline pipeline(*device, loader, plan, {mode, StreamLayout::kShared, false});
        for (int pass = 0; pass < 2; ++pass) {
          pipeline.enter();
          try {
            for (UnitIndex unit = 0; unit < plan.units.size(); ++unit) {
              const std::byte* place = pipeline.acquire(unit);
              const Bytes expected = masters[unit]->weights();
              device->run(device->current_stream(), [place, expected] {
                EXPECT_EQ(std::memcmp(place, expected.data(), expected.size()), 0);
              });
              pipeline.release(unit);
            }
          } catch (...) {
            thrown = true;
          }
          pipeline.leave(!thrown);
        }
      } catch (const std::exception&) {
        thrown = true;
      }
      arm(false);
      device->synchronize(device->current_stream());
      device->set_current_stream(HostDevice::kCallerStream);
      return thrown;
    });
  }
}

TEST_P(FaultSweepTest, InTheArenasLife) {
  fail_everywhere(5, [&](const std::shared_ptr<Failing>& device, const auto& arm) {
    const std::size_t page = HostMapping::page_bytes();
    const std::vector<std::byte> bytes(2 * page, std::byte{7});
    arm(true);
    bool thrown = false;
    {
      PinnedArena arena(device, {2 * page, page, 2 * page}, page, {});
      const auto fill = [&] {
        arena.prepare(1);
        for (PieceIndex piece = 0; piece < 3; ++piece) {
          arena.fill(piece, bytes.data(), arena.piece_bytes(piece));
        }
        arena.seal_up_to(2);
      };
      try {
        fill();
      } catch (const MemoryError& error) {
        thrown = true;
        EXPECT_NE(std::string(error.what()).find("planted failure"), std::string::npos);
      } catch (const std::exception&) {
        thrown = true;
      }
      if (thrown) {
        fill();  // it may be tried again
      }
      EXPECT_EQ(arena.registered_bytes(), arena.size_bytes());
    }
    return thrown;
  });
}

INSTANTIATE_TEST_SUITE_P(All, FaultSweepTest,
                         ::testing::Values(FailureKind::kMemory, FailureKind::kBadAlloc,
                                           FailureKind::kRuntime));

/// Where a stream cannot be drained at all, what a copy may still write to must stay.
TEST(DrainTest, WindowStaysWhereTheDeviceNeverComesToAnEnd) {
  class Broken : public HostDevice {
   public:
    using HostDevice::HostDevice;
    bool is_broken = false;

   protected:
    void do_synchronize(StreamId stream) override {
      if (is_broken) {
        throw std::runtime_error("the device is lost");
      }
      HostDevice::do_synchronize(stream);
    }
  };
  const Plan plan = plan_of(layers_of(2, 1, 2));
  Broken device(HostDevice::ComputeStreams::kWorker);
  Masters masters(device, plan.units);
  RawLoader loader(device, masters);
  std::uintptr_t window = 0;
  {
    Pipeline pipeline(device, loader, plan, {});
    window = pipeline.window().begin;
    EXPECT_TRUE(pipeline.drain());
    device.is_broken = true;
    EXPECT_FALSE(pipeline.drain());
  }
  device.is_broken = false;
  EXPECT_EQ(device.counters().allocated_bytes, plan.window_bytes);
  device.free(reinterpret_cast<void*>(window));  // NOLINT(performance-no-int-to-ptr)
}

TEST(DrainTest, LeakedArenaKeepsItsRegistrations) {
  auto device = std::make_shared<HostDevice>();
  const std::size_t page = HostMapping::page_bytes();
  {
    PinnedArena arena(device, {page}, page, {});
    arena.seal_up_to(0);
    arena.leak();
  }
  EXPECT_EQ(device->counters().registrations, 1U);
}

}  // namespace
}  // namespace torch_offload
