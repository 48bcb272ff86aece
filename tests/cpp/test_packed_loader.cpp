#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <utility>
#include <vector>

#include "codec/encoder.h"
#include "core/error.h"
#include "core/packed_loader.h"
#include "packed_master.h"
#include "pipeline_fixture.h"
#include "sim/sim_device.h"

namespace torch_offload {
namespace {

using testing::Bytes;
using testing::CheckedLog;
using testing::PackedMaster;
using testing::plan_of;
using testing::sequence_of;
using testing::TestDevice;

constexpr std::size_t kSlack = 1024;     // other weights pack a little worse
constexpr std::size_t kUnitSlices = 40;  // 5120 weights: more than one tile

class PackedLoaderTest : public ::testing::Test {
 protected:
  PackedLoaderTest()
      : device_(HostDevice::ComputeStreams::kWorker),
        log_checked_(device_, log_),
        units_(testing::layers_of(4, kUnitSlices, kUnitSlices)) {
    caller_ = device_.create_stream({"caller", StreamRole::kCompute, 0});
    device_.set_current_stream(caller_);
    for (const Unit& unit : units_) {
      masters_.push_back(std::make_unique<PackedMaster>(device_, unit.size_bytes, random_));
    }
    pack(std::vector<Transport>(units_.size(), Transport::kPacked));
  }

  /// From here on units travel or stay as is said of each; none is raw.
  void pack(const std::vector<Transport>& transports, bool has_decode_stream = true) {
    PackedLoader::Options options;
    options.has_decode_stream = has_decode_stream;
    options.resident_bytes.assign(units_.size(), 0);
    for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
      const std::size_t packed_bytes = masters_[unit]->source.packed_bytes;
      if (transports[unit] == Transport::kPacked) {
        options.slot_bytes = std::max(options.slot_bytes, packed_bytes);
      } else {
        options.resident_bytes[unit] = packed_bytes + kSlack;
      }
    }
    transports_ = transports;
    if (loader_ && has_decode_stream) {
      options.streams = loader_->streams();
    }
    loader_.reset();
    loader_.emplace(device_, units_.size(), options);
    for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
      if (loader_->has_room(unit)) {
        loader_->upload(unit, masters_[unit]->source);
      } else {
        loader_->set_source(unit, masters_[unit]->source);
      }
    }
  }

  void start(Mode mode, StreamLayout layout = StreamLayout::kShared) {
    PipelineOptions options;
    options.mode = mode;
    options.layout = layout;
    PlanRequest request;
    request.units = units_;
    request.transports = transports_;
    pipeline_.emplace(device_, *loader_, make_plan(request), options);
  }

  /// One forward whose kernels compare what they find.
  void pass() {
    pipeline_->enter();
    for (const UnitIndex unit : sequence_of(units_.size())) {
      use(unit);
    }
    pipeline_->leave(true);
  }

  void use(UnitIndex unit) {
    const std::byte* place = pipeline_->acquire(unit);
    device_.run(device_.current_stream(), [this, place, expected = masters_[unit]->weights()] {
      const bool equal = std::memcmp(place, expected.data(), expected.size()) == 0;
      device_.step([&] {
        num_wrong_ += equal ? 0 : 1;
        ++num_run_;
      });
    });
    pipeline_->release(unit);
  }

  /// The streams on which the unit was decoded, or copied, since the log began.
  std::vector<StreamId> streams_of(OpKind kind, UnitIndex unit) const {
    std::vector<StreamId> streams;
    for (const Op& op : log_.ops()) {
      if (op.kind == kind && op.unit == unit && op.generation != 0) {
        streams.push_back(op.stream);
      }
    }
    return streams;
  }

  void finish() {
    pipeline_->synchronize();
    device_.synchronize(caller_);
  }

  OpLog log_;
  TestDevice device_;
  CheckedLog log_checked_;
  std::vector<Unit> units_;
  std::mt19937 random_{3};
  std::vector<std::unique_ptr<PackedMaster>> masters_;
  std::vector<Transport> transports_;
  std::optional<PackedLoader> loader_;
  std::optional<Pipeline> pipeline_;
  StreamId caller_ = kNoStream;
  int num_wrong_ = 0;  // guarded by device_.step(), as is the next one
  int num_run_ = 0;
};

TEST_F(PackedLoaderTest, UnitsComeOutRightInEveryModeWithStreamsOfItsOwn) {
  for (const auto& [mode, layout] : {std::pair{Mode::kPipeline, StreamLayout::kShared},
                                     {Mode::kPipeline, StreamLayout::kSplit},
                                     {Mode::kEvents, StreamLayout::kSplit},
                                     {Mode::kStreams, StreamLayout::kShared}}) {
    start(mode, layout);
    for (int i = 0; i < 3; ++i) {
      pass();
    }
    finish();
    EXPECT_EQ(num_wrong_, 0);
    EXPECT_EQ(pipeline_->streams().back(), loader_->own_streams().front());
    pipeline_.reset();
  }
}

TEST_F(PackedLoaderTest, CopiesArePackedAndDecodersFollowThem) {
  start(Mode::kPipeline);
  const DeviceCounters before = device_.counters();
  pass();
  finish();
  const DeviceCounters& after = device_.counters();
  const std::uint64_t copies = after.copies - before.copies;
  EXPECT_GE(copies, units_.size());
  EXPECT_EQ(after.decodes - before.decodes, copies);
  EXPECT_LT(after.bytes_copied - before.bytes_copied, copies * units_[0].size_bytes * 3 / 4);
  EXPECT_EQ(after.allocations, before.allocations) << "nothing is allocated in a forward";
}

TEST_F(PackedLoaderTest, UnitsThatStayComeOutRightInEveryModeAndAreNeverCopied) {
  for (const auto& [mode, layout] : {std::pair{Mode::kSync, StreamLayout::kShared},
                                     {Mode::kPipeline, StreamLayout::kShared},
                                     {Mode::kPipeline, StreamLayout::kSplit},
                                     {Mode::kEvents, StreamLayout::kSplit},
                                     {Mode::kStreams, StreamLayout::kShared}}) {
    pack(std::vector<Transport>(units_.size(), Transport::kPackedResident), mode != Mode::kSync);
    EXPECT_EQ(loader_->ring_bytes(), 0U);
    start(mode, layout);
    const DeviceCounters before = device_.counters();
    for (int i = 0; i < 3; ++i) {
      pass();
    }
    finish();
    const DeviceCounters& after = device_.counters();
    EXPECT_EQ(num_wrong_, 0);
    EXPECT_EQ(after.bytes_copied, before.bytes_copied);
    EXPECT_EQ(after.decodes - before.decodes, pipeline_->stats().onloads);
    EXPECT_GE(pipeline_->stats().onloads, 3 * (units_.size() - 2));
    EXPECT_EQ(after.allocations, before.allocations);
    EXPECT_EQ(pipeline_->streams().size(),
              (mode == Mode::kSync ? 0U : 2U) + (layout == StreamLayout::kSplit ? 3U : 0U));
    pipeline_.reset();
  }
}

TEST_F(PackedLoaderTest, UnitsThatStayAndUnitsThatAreCopiedComeOutRightSideBySide) {
  pack({Transport::kPacked, Transport::kPackedResident, Transport::kPackedResident,
        Transport::kPacked, Transport::kPackedResident, Transport::kPacked,
        Transport::kPackedResident, Transport::kPackedResident});
  for (const Mode mode : {Mode::kPipeline, Mode::kEvents, Mode::kStreams}) {
    start(mode);
    for (int i = 0; i < 4; ++i) {
      pass();
    }
    finish();
    EXPECT_EQ(num_wrong_, 0);
    const std::vector<StreamId> own = loader_->own_streams();
    ASSERT_EQ(own.size(), 2U);
    EXPECT_EQ(streams_of(OpKind::kDecode, 3).back(), own[0]);
    EXPECT_EQ(streams_of(OpKind::kDecode, 4).back(), own[1]);
    EXPECT_TRUE(streams_of(OpKind::kCopy, 4).empty());
    EXPECT_EQ(streams_of(OpKind::kCopy, 3).size(), streams_of(OpKind::kDecode, 3).size());
    pipeline_.reset();
  }
}

/// The link may be busy for long with a unit that is used much later.
TEST_F(PackedLoaderTest, UnitThatStaysWaitsForNoCopyAndTheLinkGoesOnMeanwhile) {
  pack({Transport::kPackedResident, Transport::kPackedResident, Transport::kPackedResident,
        Transport::kPackedResident, Transport::kPackedResident, Transport::kPackedResident,
        Transport::kPacked, Transport::kPacked});
  start(Mode::kPipeline);
  pass();
  finish();
  num_run_ = 0;
  testing::Gate link;
  link.hold(device_, pipeline_->streams().front());
  for (const UnitIndex unit : {6U, 7U}) {
    pipeline_->invalidate(unit);
  }
  pipeline_->enter();
  const std::uint64_t copies = device_.counters().copies;
  use(0);
  EXPECT_EQ(device_.counters().copies, copies + 2) << "both are on their way from the start";
  for (const UnitIndex unit : {1U, 2U, 3U, 4U, 5U}) {
    use(unit);
  }
  device_.await([&] { return num_run_ == 6; });
  link.open();
  use(6);
  use(7);
  pipeline_->leave(true);
  finish();
  EXPECT_EQ(num_wrong_, 0);
}

/// The place is in use for long; the link is not held up by that.
TEST_F(PackedLoaderTest, CopyRunsAheadOfThePlaceThatItsUnitWillGet) {
  start(Mode::kPipeline);
  pass();
  finish();
  const std::vector<UnitIndex>& overlapping = pipeline_->plan().overlaps[0];
  ASSERT_FALSE(overlapping.empty());
  const UnitIndex next = overlapping.front();  // gets the bytes of unit 0
  pipeline_->enter();
  pipeline_->acquire(0);
  testing::Gate kernels;
  kernels.hold(device_, caller_);
  pipeline_->release(0);
  const int copies = [&] {
    int run = 0;
    device_.await([&] {
      run = device_.copies_run(next);
      return true;
    });
    return run;
  }();
  pipeline_->acquire(next);
  device_.await([&] { return device_.copies_run(next) == copies + 1; });
  device_.await([&] { return device_.blocked_on(loader_->own_streams().front()) != kNoEvent; });
  kernels.open();
  pipeline_->release(next);
  pipeline_->leave(true);
  finish();
}

TEST_F(PackedLoaderTest, UploadReplacesWhatIsDecodedFromThenOn) {
  pack(std::vector<Transport>(units_.size(), Transport::kPackedResident));
  start(Mode::kPipeline);
  pass();
  for (const UnitIndex unit : {0U, 5U}) {
    pipeline_->synchronize_onload(unit);
    finish();
    masters_[unit] = std::make_unique<PackedMaster>(device_, units_[unit].size_bytes, random_);
    loader_->upload(unit, masters_[unit]->source);
    pipeline_->invalidate(unit);
    pass();
  }
  finish();
  EXPECT_EQ(num_wrong_, 0);
}

TEST_F(PackedLoaderTest, UploadWithoutRoomIsRefusedAndLeavesTheUnitWithoutSource) {
  pack(std::vector<Transport>(units_.size(), Transport::kPackedResident));
  PackedSource source = masters_[0]->source;
  source.packed_bytes = loader_->room_bytes(0) + 1;
  EXPECT_THROW(loader_->upload(0, source), ValueError);
  EXPECT_FALSE(loader_->has_source(0));
  EXPECT_EQ(loader_->first_writer(0, caller_), caller_) << "whoever loads it now copies it";
  EXPECT_TRUE(loader_->has_source(1));
  loader_->upload(0, masters_[0]->source);
  EXPECT_EQ(loader_->first_writer(0, caller_), loader_->own_streams().back());
}

TEST_F(PackedLoaderTest, RingAndUnitsThatStayAreTwoAllocationsOfExactSize) {
  const std::uint64_t before = device_.counters().allocated_bytes - loader_->ring_bytes();
  pack({Transport::kPacked, Transport::kPackedResident, Transport::kPackedResident,
        Transport::kPacked, Transport::kPacked, Transport::kPacked, Transport::kPacked,
        Transport::kPacked});
  EXPECT_EQ(device_.counters().allocated_bytes - before,
            loader_->ring_bytes() + loader_->resident_bytes());
  EXPECT_EQ(loader_->resident_bytes(), loader_->room_bytes(1) + loader_->room_bytes(2));
  EXPECT_EQ(loader_->room_bytes(1), aligned_size(masters_[1]->source.packed_bytes + kSlack));
}

TEST_F(PackedLoaderTest, LaterLoaderGoesOnWithStreamsAndEventsOfTheEarlier) {
  const std::vector<Transport> copied(8, Transport::kPacked);
  const std::vector<Transport> stay(8, Transport::kPackedResident);
  pack(stay);
  const DeviceCounters before = device_.counters();
  std::uint64_t events_of_units = 0;
  for (const auto& transports : {copied, stay, copied}) {
    pack(transports);
    const std::uint64_t events = device_.counters().events;
    start(Mode::kPipeline);
    events_of_units += device_.counters().events - events;
    pass();
    pass();
    finish();
    pipeline_.reset();
  }
  EXPECT_EQ(device_.counters().events - events_of_units, before.events);
  EXPECT_EQ(loader_->own_streams().size(), 2U);
  EXPECT_EQ(num_wrong_, 0);
}

TEST_F(PackedLoaderTest, DamagedUnitIsToldByTheNextWaitAndDecodesNothing) {
  start(Mode::kPipeline);
  masters_[0]->damage();
  pipeline_->enter();
  EXPECT_THROW(
      {
        pipeline_->acquire(0);
        device_.synchronize(loader_->own_streams().front());
      },
      ValueError);
  pipeline_->leave(false);
  if (pipeline_->is_acquired(0)) {
    pipeline_->enter();
    pipeline_->release(0);
    pipeline_->leave(false);
  }
  finish();
  EXPECT_EQ(num_wrong_, 0);
}

TEST_F(PackedLoaderTest, SourceThatFitsNoSlotIsRefused) {
  PackedSource source = masters_[0]->source;
  source.packed_bytes = loader_->ring_bytes();
  EXPECT_THROW(loader_->set_source(0, source), ValueError);
  EXPECT_EQ(loader_->source(0).packed_bytes, masters_[0]->source.packed_bytes);
  loader_->drop_source(0);
  EXPECT_FALSE(loader_->has_source(0));
}

TEST(PackedSimulationTest, DecoderTakesItsTurnWithTheKernels) {
  SimCosts costs;
  costs.copy_bytes_per_second = 1e9;  // a byte a nanosecond
  costs.decode_bytes_per_second = 4e9;
  costs.compute_ns = {0};
  SimDevice device(costs);
  const StreamId decoding = device.create_stream({"decode", StreamRole::kCopy, -1});
  Decode decode;
  decode.size_bytes = 4000;
  decode.unit = 0;
  device.run(SimDevice::kCallerStream, 700);
  device.decode(decoding, decode);
  EXPECT_EQ(device.time_of(device.end_of(decoding)), 1000) << "its stream goes first";
  EXPECT_EQ(device.time_of(device.end_of(SimDevice::kCallerStream)), 1700);
  costs.decode_bytes_per_second = 0;
  EXPECT_THROW(SimDevice{costs}, ValueError);
}

}  // namespace
}  // namespace torch_offload
