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
#include "packed_fixture.h"
#include "pipeline_fixture.h"
#include "sim/sim_device.h"

namespace torch_offload {
namespace {

using testing::Bytes;
using testing::CheckedLog;
using testing::plan_of;
using testing::sequence_of;
using testing::TestDevice;

constexpr std::size_t kPageBytes = 4096;
constexpr std::size_t kUnitSlices = 40;  // 5120 weights: more than one tile

/// Page-locked memory of one packed unit, and the weights that it holds.
class PackedMaster {
 public:
  PackedMaster(Device& device, std::size_t size_bytes, std::mt19937& random) : device_(device) {
    unit_.add(testing::weights_with_escapes(size_bytes / 2, 60, random));
    EncodeOptions options;
    options.codec = Codec::kE33;
    const UnitEncoder encoder(unit_.sources(), unit_.place_bytes(), options);
    reserved_bytes_ = (encoder.blob_bytes() / kPageBytes + 1) * kPageBytes;
    memory_ = static_cast<std::byte*>(std::aligned_alloc(kPageBytes, reserved_bytes_));
    encoder.encode(memory_);
    source = {memory_, encoder.blob_bytes(), unit_.place_bytes(), encoder.num_tiles()};
    device_.register_host(memory_, reserved_bytes_);
  }
  PackedMaster(const PackedMaster&) = delete;
  PackedMaster& operator=(const PackedMaster&) = delete;
  ~PackedMaster() {
    device_.unregister_host(memory_);
    std::free(memory_);
  }

  void damage() { memory_[source.packed_bytes / 2] ^= std::byte{1}; }
  Bytes weights() const { return unit_.place(std::byte{0}); }

  PackedSource source;

 private:
  Device& device_;
  testing::PackedCase unit_;
  std::byte* memory_ = nullptr;
  std::size_t reserved_bytes_ = 0;
};

class PackedLoaderTest : public ::testing::Test {
 protected:
  PackedLoaderTest()
      : device_(HostDevice::ComputeStreams::kWorker),
        log_checked_(device_, log_),
        units_(testing::layers_of(4, kUnitSlices, kUnitSlices)) {
    caller_ = device_.create_stream({"caller", StreamRole::kCompute, 0});
    device_.set_current_stream(caller_);
    PackedLoader::Options options;
    for (const Unit& unit : units_) {
      masters_.push_back(std::make_unique<PackedMaster>(device_, unit.size_bytes, random_));
      options.slot_bytes = std::max(options.slot_bytes, masters_.back()->source.packed_bytes);
    }
    loader_.emplace(device_, units_.size(), options);
    for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
      loader_->set_source(unit, masters_[unit]->source);
    }
  }

  void start(Mode mode, StreamLayout layout = StreamLayout::kShared) {
    PipelineOptions options;
    options.mode = mode;
    options.layout = layout;
    pipeline_.emplace(device_, *loader_, plan_of(units_), options);
  }

  /// One forward whose kernels compare what they find.
  void pass() {
    pipeline_->enter();
    for (const UnitIndex unit : sequence_of(units_.size())) {
      const std::byte* place = pipeline_->acquire(unit);
      device_.run(device_.current_stream(), [this, place, expected = masters_[unit]->weights()] {
        const bool equal = std::memcmp(place, expected.data(), expected.size()) == 0;
        device_.step([&] { num_wrong_ += equal ? 0 : 1; });
      });
      pipeline_->release(unit);
    }
    pipeline_->leave(true);
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
  std::optional<PackedLoader> loader_;
  std::optional<Pipeline> pipeline_;
  StreamId caller_ = kNoStream;
  int num_wrong_ = 0;  // guarded by device_.step()
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
