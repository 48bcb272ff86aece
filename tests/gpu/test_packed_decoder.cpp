// The GPU's decoder against what was packed, byte by byte of the place.

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "../cpp/packed_fixture.h"
#include "codec/checksum.h"
#include "codec/decoder.h"
#include "cuda/packed_decoder.h"
#include "require_gpu.h"

namespace torch_offload {
namespace {

using testing::all_patterns;
using testing::Bytes;
using testing::check_cuda;
using testing::normal_weights;
using testing::odd_lengths;
using testing::PackedCase;
using testing::random_bits;
using testing::require_gpu;
using testing::Weights;
using testing::weights_with_escapes;

constexpr std::byte kFiller{0x5C};
/// Around blob and place, so that a write beside them shows.
constexpr std::size_t kMarginBytes = 4096;

/// Device memory with a margin on both sides, all of it filled.
class GuardedMemory {
 public:
  explicit GuardedMemory(std::size_t size_bytes) : size_bytes_(size_bytes) {
    check_cuda(cudaMalloc(&memory_, size_bytes + 2 * kMarginBytes));
    check_cuda(cudaMemset(memory_, std::to_integer<int>(kFiller), size_bytes + 2 * kMarginBytes));
  }
  ~GuardedMemory() { static_cast<void>(cudaFree(memory_)); }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  std::byte* get() const { return static_cast<std::byte*>(memory_) + kMarginBytes; }

  void write(const Bytes& bytes) const {
    check_cuda(cudaMemcpy(get(), bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
  }

  Bytes read() const {
    Bytes bytes(size_bytes_);
    check_cuda(cudaMemcpy(bytes.data(), get(), size_bytes_, cudaMemcpyDeviceToHost));
    return bytes;
  }

  void expect_margins_untouched() const {
    Bytes all(size_bytes_ + 2 * kMarginBytes);
    check_cuda(cudaMemcpy(all.data(), memory_, all.size(), cudaMemcpyDeviceToHost));
    std::size_t touched = 0;
    for (std::size_t i = 0; i < kMarginBytes; ++i) {
      touched += all[i] != kFiller ? 1U : 0U;
      touched += all[all.size() - 1 - i] != kFiller ? 1U : 0U;
    }
    EXPECT_EQ(touched, 0U) << "bytes beside the block";
  }

 private:
  std::size_t size_bytes_;
  void* memory_ = nullptr;
};

class PackedDecoderTest : public ::testing::Test {
 protected:
  void SetUp() override {
    require_gpu();
    if (HasFatalFailure() || IsSkipped()) {
      return;
    }
    check_cuda(cudaStreamCreate(&stream_));
  }

  void TearDown() override {
    if (stream_ != nullptr) {
      check_cuda(cudaStreamDestroy(stream_));
    }
  }

  static std::uint32_t num_tiles_of_blob(const Bytes& blob) {
    BlobHeader header;
    std::memcpy(&header, blob.data(), sizeof(header));
    return header.num_tiles;
  }

  DecodeLaunch launch_of(const GuardedMemory& blob, std::size_t blob_bytes,
                         const GuardedMemory& place, std::size_t place_bytes,
                         std::uint32_t num_tiles, std::uint32_t max_blocks = 0) const {
    DecodeLaunch launch;
    launch.blob = blob.get();
    launch.blob_bytes = blob_bytes;
    launch.place = place.get();
    launch.place_bytes = place_bytes;
    launch.num_tiles = num_tiles;
    launch.max_blocks = max_blocks;
    return launch;
  }

  Bytes decode_on_gpu(const Bytes& blob, std::uint64_t place_bytes, std::uint32_t max_blocks = 0) {
    const GuardedMemory device_blob(blob.size());
    const GuardedMemory place(place_bytes);
    device_blob.write(blob);
    check_cuda(launch_decode(stream_, launch_of(device_blob, blob.size(), place, place_bytes,
                                                num_tiles_of_blob(blob), max_blocks)));
    check_cuda(cudaStreamSynchronize(stream_));
    place.expect_margins_untouched();
    return place.read();
  }

  void expect_round_trip(const PackedCase& unit, const std::string& what) {
    const std::vector<std::optional<Codec>> codecs{std::nullopt, Codec::kRaw, Codec::kE4p,
                                                   Codec::kE33};
    for (const auto& codec : codecs) {
      EncodeOptions options;
      options.codec = codec;
      const Bytes blob = unit.pack(options);
      for (const std::uint32_t max_blocks : {0U, 1U, 5U}) {
        ASSERT_EQ(decode_on_gpu(blob, unit.place_bytes(), max_blocks), unit.place(kFiller))
            << what << ", " << (codec ? name_of(*codec) : "smallest") << ", " << max_blocks
            << " blocks";
      }
    }
  }

  void expect_round_trip(const Weights& weights, const std::string& what) {
    PackedCase unit;
    unit.add(weights);
    expect_round_trip(unit, what);
  }

  cudaStream_t stream_ = nullptr;
  std::mt19937 random_{7};
};

TEST_F(PackedDecoderTest, AllPatternsComeBack) {
  Weights weights = all_patterns();
  expect_round_trip(weights, "in order");
  std::shuffle(weights.begin(), weights.end(), random_);
  expect_round_trip(weights, "shuffled");
}

TEST_F(PackedDecoderTest, EveryKindOfWeightsComesBack) {
  constexpr std::size_t kCount = 20000;
  expect_round_trip(Weights(kCount, 0), "all zero");
  expect_round_trip(Weights(kCount, 0x7FC1), "all NaN");
  expect_round_trip(random_bits(kCount, random_), "random bits");
  expect_round_trip(normal_weights(kCount, random_), "normal");
}

TEST_F(PackedDecoderTest, LengthsAroundEveryBlockComeBack) {
  for (const std::size_t length : odd_lengths()) {
    if (length > 0) {
      expect_round_trip(weights_with_escapes(length, 50, random_), std::to_string(length));
    }
  }
}

TEST_F(PackedDecoderTest, EveryShareOfEscapesComesBack) {
  for (const unsigned share : {0U, 1U, 30U, 100U, 500U, 900U, 1000U}) {
    expect_round_trip(weights_with_escapes(9000, share, random_), std::to_string(share));
  }
}

TEST_F(PackedDecoderTest, UnitOfManySortsOfTensorsComesBack) {
  PackedCase unit;
  unit.add(normal_weights(300000, random_));
  unit.add(Bytes(), ElementType::kBf16);
  unit.add(Bytes(40097, std::byte{3}), ElementType::kOther);
  unit.add(Bytes(33, std::byte{9}), ElementType::kBf16);
  unit.add(weights_with_escapes(4096, 400, random_));
  unit.add(Bytes(1, std::byte{1}), ElementType::kOther);
  unit.add(random_bits(70000, random_));
  for (int i = 0; i < 40; ++i) {
    unit.add(normal_weights(2000 + random_() % 9000, random_));
  }
  expect_round_trip(unit, "many sorts");
}

TEST_F(PackedDecoderTest, DamagedBlobReachesNothingOutside) {
  PackedCase unit;
  unit.add(weights_with_escapes(9000, 300, random_));
  unit.add(random_bits(2000, random_));
  unit.add(Bytes(1001, std::byte{4}), ElementType::kOther);
  const std::uint64_t place_bytes = unit.place_bytes();
  for (const Codec codec : {Codec::kE4p, Codec::kE33}) {
    EncodeOptions options;
    options.codec = codec;
    const Bytes sound = unit.pack(options);
    const GuardedMemory device_blob(sound.size());
    const GuardedMemory place(place_bytes);
    for (int i = 0; i < 2000; ++i) {
      Bytes blob = sound;
      for (unsigned left = 1 + random_() % 4; left > 0; --left) {
        const std::size_t bound = random_() % 2 == 0 ? 64 * (1 + random_() % 4) : blob.size();
        const std::size_t at = random_() % bound;
        blob[at] = random_() % 3 == 0 ? std::byte{0xFF} : static_cast<std::byte>(random_());
      }
      device_blob.write(blob);
      check_cuda(launch_decode(stream_, launch_of(device_blob, blob.size(), place, place_bytes,
                                                  num_tiles_of_blob(sound))));
    }
    check_cuda(cudaStreamSynchronize(stream_));
    place.expect_margins_untouched();
    // The device is none the worse for it.
    device_blob.write(sound);
    check_cuda(launch_decode(stream_, launch_of(device_blob, sound.size(), place, place_bytes,
                                                num_tiles_of_blob(sound))));
    check_cuda(cudaStreamSynchronize(stream_));
    Bytes expected = unit.place(kFiller);
    Bytes got = place.read();
    std::uint64_t offset = 0;
    for (const Bytes& tensor : unit.tensors) {
      EXPECT_EQ(std::memcmp(got.data() + offset, expected.data() + offset, tensor.size()), 0);
      offset += aligned_size(tensor.size());
    }
  }
}

TEST_F(PackedDecoderTest, GraphDecodesWhatTheBlobHoldsWhenItRuns) {
  PackedCase first;
  first.add(normal_weights(50000, random_));
  PackedCase second;
  second.add(weights_with_escapes(50000, 200, random_));
  EncodeOptions options;
  options.codec = Codec::kE33;
  Bytes blobs[] = {first.pack(options), second.pack(options)};
  const std::uint32_t num_tiles = num_tiles_of_blob(blobs[0]);
  ASSERT_EQ(num_tiles, num_tiles_of_blob(blobs[1]));
  const std::size_t blob_bytes = std::max(blobs[0].size(), blobs[1].size());
  const GuardedMemory device_blob(blob_bytes);
  const GuardedMemory place(first.place_bytes());
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  check_cuda(launch_decode(
      stream_, launch_of(device_blob, blob_bytes, place, first.place_bytes(), num_tiles)));
  check_cuda(cudaStreamEndCapture(stream_, &graph));
  check_cuda(cudaGraphInstantiate(&executable, graph, 0));
  for (const std::size_t which : {0U, 1U, 0U}) {
    device_blob.write(blobs[which]);
    check_cuda(cudaGraphLaunch(executable, stream_));
    check_cuda(cudaStreamSynchronize(stream_));
    EXPECT_EQ(place.read(), (which == 0 ? first : second).place(kFiller));
  }
  check_cuda(cudaGraphExecDestroy(executable));
  check_cuda(cudaGraphDestroy(graph));
}

}  // namespace
}  // namespace torch_offload
