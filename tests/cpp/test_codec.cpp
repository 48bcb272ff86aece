#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "codec/blob.h"
#include "codec/checksum.h"
#include "codec/decoder.h"
#include "codec/encoder.h"
#include "codec/parallel.h"
#include "codec/vectors.h"
#include "core/error.h"
#include "packed_fixture.h"

namespace torch_offload {
namespace {

using testing::all_patterns;
using testing::Bytes;
using testing::normal_weights;
using testing::odd_lengths;
using testing::PackedCase;
using testing::random_bits;
using testing::Weights;
using testing::weights_with_escapes;

constexpr std::byte kFiller{0x5C};

const std::vector<std::optional<Codec>>& choices() {
  static const std::vector<std::optional<Codec>> all{std::nullopt, Codec::kRaw, Codec::kE4p,
                                                     Codec::kE33};
  return all;
}

std::string name_of_choice(const std::optional<Codec>& codec) {
  return codec ? name_of(*codec) : "smallest";
}

class CodecTest : public ::testing::Test {
 protected:
  static EncodeOptions options(const std::optional<Codec>& codec, unsigned num_threads = 1) {
    EncodeOptions options;
    options.codec = codec;
    options.num_threads = num_threads;
    return options;
  }

  /// Packs with every codec, decodes, and compares every byte of the place.
  void expect_round_trip(const PackedCase& unit, const std::string& what) {
    for (const auto& codec : choices()) {
      const Bytes blob = unit.pack(options(codec));
      Bytes place(unit.place_bytes(), kFiller);
      decode(blob.data(), blob.size(), place.data(), place.size());
      ASSERT_EQ(place, unit.place(kFiller)) << what << ", " << name_of_choice(codec);
    }
  }

  void expect_round_trip(const Weights& weights, const std::string& what) {
    PackedCase unit;
    unit.add(weights);
    expect_round_trip(unit, what);
  }

  static double bits_a_weight(const Weights& weights, const std::optional<Codec>& codec) {
    PackedCase unit;
    unit.add(weights);
    return 8.0 * static_cast<double>(unit.pack(options(codec)).size()) /
           static_cast<double>(weights.size());
  }

  /// A small sound blob, to be damaged.
  PackedCase small_unit() {
    PackedCase unit;
    unit.add(weights_with_escapes(5000, 100, random_));
    unit.add(random_bits(100, random_));
    return unit;
  }

  template <typename Edit>
  static void reseal(Bytes& blob, Edit edit) {
    BlobHeader header;
    std::memcpy(&header, blob.data(), sizeof(header));
    edit(header);
    std::memcpy(blob.data(), &header, sizeof(header));
    header.checksum = blob_checksum(blob.data(), blob.size(), 1);
    std::memcpy(blob.data(), &header, sizeof(header));
  }

  /// What decoding says of a blob; the place must stay as it was.
  template <typename Error>
  static std::string refusal(const Bytes& blob, std::uint64_t place_bytes) {
    Bytes place(place_bytes, kFiller);
    std::string what;
    try {
      decode(blob.data(), blob.size(), place.data(), place.size());
      ADD_FAILURE() << "the blob was decoded";
    } catch (const Error& error) {
      what = error.what();
    }
    EXPECT_EQ(place, Bytes(place_bytes, kFiller)) << "something was decoded";
    return what;
  }

  std::mt19937 random_{7};
};

TEST_F(CodecTest, AllPatternsComeBack) {
  Weights weights = all_patterns();
  expect_round_trip(weights, "in order");
  std::shuffle(weights.begin(), weights.end(), random_);
  expect_round_trip(weights, "shuffled");
}

TEST_F(CodecTest, EveryKindOfWeightsComesBack) {
  constexpr std::size_t kCount = 20000;
  expect_round_trip(Weights(kCount, 0), "all zero");
  expect_round_trip(Weights(kCount, 0x8000), "all minus zero");
  expect_round_trip(Weights(kCount, 0x7FC1), "all NaN");
  expect_round_trip(Weights(kCount, 0xFF80), "all minus infinity");
  expect_round_trip(random_bits(kCount, random_), "random bits");
  expect_round_trip(normal_weights(kCount, random_), "normal");
  Weights denormals = random_bits(kCount, random_);
  for (std::uint16_t& weight : denormals) {
    weight &= 0x807FU;
  }
  expect_round_trip(denormals, "denormals");
}

TEST_F(CodecTest, LengthsAroundEveryBlockComeBack) {
  for (const std::size_t length : odd_lengths()) {
    expect_round_trip(weights_with_escapes(length, 50, random_), std::to_string(length));
  }
}

TEST_F(CodecTest, EveryShareOfEscapesComesBack) {
  for (const unsigned share : {0U, 1U, 10U, 30U, 100U, 250U, 500U, 900U, 999U, 1000U}) {
    expect_round_trip(weights_with_escapes(9000, share, random_), std::to_string(share));
  }
}

TEST_F(CodecTest, UnitOfManySortsOfTensorsComesBack) {
  PackedCase unit;
  unit.add(normal_weights(10000, random_));
  unit.add(Bytes(), ElementType::kBf16);
  unit.add(Bytes(4097, std::byte{3}), ElementType::kOther);
  unit.add(Bytes(33, std::byte{9}), ElementType::kBf16);  // an odd length: no bf16 after all
  unit.add(weights_with_escapes(4096, 400, random_));
  unit.add(Bytes(1, std::byte{1}), ElementType::kOther);
  unit.add(normal_weights(1, random_));
  expect_round_trip(unit, "many sorts");
  expect_round_trip(PackedCase(), "no tensor at all");
}

TEST_F(CodecTest, ThreadsAndPiecesChangeNothing) {
  PackedCase unit;
  unit.add(weights_with_escapes(3 * 64 * 4096 + 5, 123, random_));
  unit.add(normal_weights(64 * 4096 * 2 + 77, random_));
  unit.add(random_bits(100000, random_));
  for (const auto& codec : choices()) {
    const Bytes blob = unit.pack(options(codec));
    EXPECT_EQ(unit.pack(options(codec, 4)), blob) << name_of_choice(codec);
    EncodeOptions pieces = options(codec, 3);
    pieces.max_entry_weights = 10000;  // two tiles
    for (const Bytes& one : {blob, unit.pack(pieces)}) {
      Bytes place(unit.place_bytes(), kFiller);
      decode(one.data(), one.size(), place.data(), place.size(), 4);
      EXPECT_EQ(place, unit.place(kFiller)) << name_of_choice(codec);
    }
  }
}

TEST_F(CodecTest, ChunksThatShareWordsOfEscapesComeBack) {
  // Of 64 tiles each: some have no escape, some begin and end in a block that others have begun.
  const std::vector<std::size_t> escapes{3, 0, 1, 40, 2, 0, 23, 32, 31, 33, 0, 1, 1, 64, 5};
  constexpr std::size_t kChunk = std::size_t{64} * kTileWeights;
  Weights weights = weights_with_escapes(escapes.size() * kChunk - 1000, 0, random_);
  for (std::size_t chunk = 0; chunk < escapes.size(); ++chunk) {
    for (std::size_t i = 0; i < escapes[chunk]; ++i) {
      // One position for each, spread over all lanes.
      std::uint16_t& weight = weights[chunk * kChunk + i * 3989];
      weight = static_cast<std::uint16_t>((weight & 0x807FU) | ((60U + random_() % 8) << 7U));
    }
  }
  PackedCase unit;
  unit.add(weights);
  unit.add(weights_with_escapes(kChunk + 1, 1, random_));
  const Bytes blob = unit.pack(options(Codec::kE33));
  EXPECT_EQ(unit.pack(options(Codec::kE33, 4)), blob);
  Bytes place(unit.place_bytes(), kFiller);
  decode(blob.data(), blob.size(), place.data(), place.size());
  EXPECT_EQ(place, unit.place(kFiller));
}

TEST_F(CodecTest, BothCompilationsWriteTheSame) {
  if (!has_wide_vectors()) {
    GTEST_SKIP() << "this processor has but one";
  }
  PackedCase unit;
  unit.add(normal_weights(70001, random_));
  unit.add(all_patterns());
  unit.add(weights_with_escapes(9999, 300, random_));
  unit.add(random_bits(5000, random_));
  for (const auto& codec : choices()) {
    const Bytes blob = unit.pack(options(codec));
    wide_vectors_wanted = false;
    EXPECT_FALSE(has_wide_vectors());
    EXPECT_EQ(unit.pack(options(codec)), blob) << name_of_choice(codec);
    wide_vectors_wanted = true;
  }
}

TEST_F(CodecTest, UnalignedBlobAndTensorComeBack) {
  PackedCase unit;
  unit.add(weights_with_escapes(5000, 50, random_));
  Bytes shifted(unit.tensors[0].size() + 1);
  std::copy(unit.tensors[0].begin(), unit.tensors[0].end(), shifted.begin() + 1);
  const UnitEncoder encoder({{shifted.data() + 1, unit.tensors[0].size(), 0, ElementType::kBf16}},
                            unit.place_bytes(), options(Codec::kE33));
  Bytes blob(encoder.blob_bytes() + 1);
  encoder.encode(blob.data() + 1);
  Bytes place(unit.place_bytes(), kFiller);
  decode(blob.data() + 1, blob.size() - 1, place.data(), place.size());
  EXPECT_EQ(place, unit.place(kFiller));
}

TEST_F(CodecTest, PackingPaysAsTheFormatSays) {
  const Weights weights = normal_weights(std::size_t{1} << 20U, random_);
  EXPECT_LT(bits_a_weight(weights, Codec::kE33), 11.2);
  EXPECT_NEAR(bits_a_weight(weights, Codec::kE4p), 12.02, 0.02);
  EXPECT_EQ(bits_a_weight(weights, std::nullopt), bits_a_weight(weights, Codec::kE33));
}

TEST_F(CodecTest, WhatPackingWouldNotShrinkStaysRaw) {
  const Weights weights = random_bits(50000, random_);
  EXPECT_EQ(bits_a_weight(weights, std::nullopt), bits_a_weight(weights, Codec::kRaw));
  EXPECT_GT(bits_a_weight(weights, Codec::kE33), 16.0);
  PackedCase unit;
  unit.add(normal_weights(10, random_));
  unit.add(Bytes(100000, std::byte{0}), ElementType::kOther);
  const UnitEncoder encoder(unit.sources(), unit.place_bytes(), options(std::nullopt));
  EXPECT_EQ(encoder.entries()[0].codec, Codec::kRaw) << "a few weights";
  EXPECT_EQ(encoder.entries()[1].codec, Codec::kRaw) << "another type";
}

TEST_F(CodecTest, TensorsThatDoNotFitThePlaceAreRefused) {
  const Bytes bytes(512);
  const auto refused = [&](const std::vector<TensorSource>& tensors) {
    EXPECT_THROW(UnitEncoder(tensors, 512, {}), ValueError);
  };
  refused({{bytes.data(), 513, 0, ElementType::kOther}});
  refused({{bytes.data(), 16, 512, ElementType::kOther}});
  refused({{bytes.data(), 16, 8, ElementType::kOther}});
  refused(
      {{bytes.data(), 64, 0, ElementType::kOther}, {bytes.data(), 64, 48, ElementType::kOther}});
}

TEST_F(CodecTest, WeightsThatChangeMeanwhileAreNoticed) {
  for (const Codec codec : {Codec::kE4p, Codec::kE33}) {
    PackedCase unit;
    unit.add(Weights(5000, 0x3F80));
    const UnitEncoder encoder(unit.sources(), unit.place_bytes(), options(codec));
    Bytes blob(encoder.blob_bytes());
    const Weights others = random_bits(5000, random_);
    std::memcpy(unit.tensors[0].data(), others.data(), unit.tensors[0].size());
    EXPECT_THROW(encoder.encode(blob.data()), StateError);
    EXPECT_NE(refusal<ValueError>(blob, unit.place_bytes()).find("magic"), std::string::npos);
  }
}

TEST_F(CodecTest, UnknownVersionIsRefused) {
  const PackedCase unit = small_unit();
  Bytes blob = unit.pack({});
  reseal(blob, [](BlobHeader& header) { header.version = kBlobVersion - 1; });
  EXPECT_NE(refusal<NotImplementedError>(blob, unit.place_bytes()).find("version 2"),
            std::string::npos);
}

TEST_F(CodecTest, UnknownCodecIsRefused) {
  const PackedCase unit = small_unit();
  Bytes blob = unit.pack({});
  TensorEntry entry;
  std::memcpy(&entry, blob.data() + sizeof(BlobHeader), sizeof(entry));
  entry.codec = static_cast<Codec>(3);
  std::memcpy(blob.data() + sizeof(BlobHeader), &entry, sizeof(entry));
  reseal(blob, [](BlobHeader& /*header*/) {});
  EXPECT_NE(refusal<NotImplementedError>(blob, unit.place_bytes()).find("number 3"),
            std::string::npos);
}

TEST_F(CodecTest, WrongLengthIsRefused) {
  const PackedCase unit = small_unit();
  Bytes blob = unit.pack({});
  EXPECT_NE(refusal<ValueError>(blob, unit.place_bytes() + 256).find("another unit"),
            std::string::npos);
  blob.pop_back();
  EXPECT_NE(refusal<ValueError>(blob, unit.place_bytes()).find("cut off"), std::string::npos);
  blob.resize(sizeof(BlobHeader) - 1);
  EXPECT_NE(refusal<ValueError>(blob, unit.place_bytes()).find("at least"), std::string::npos);
}

TEST_F(CodecTest, EveryFlippedBitIsRefused) {
  PackedCase unit;
  unit.add(weights_with_escapes(1500, 100, random_));
  const Bytes sound = unit.pack(options(Codec::kE33));
  for (std::size_t at = 0; at < sound.size(); ++at) {
    Bytes blob = sound;
    blob[at] ^= std::byte{1} << (random_() % 8U);
    EXPECT_THROW(BlobView::checked(blob.data(), blob.size(), unit.place_bytes()), std::logic_error)
        << "byte " << at;
  }
}

TEST_F(CodecTest, FailureOnAThreadReachesTheCaller) {
  EXPECT_THROW(parallel_for(100, 4,
                            [](std::size_t index) {
                              if (index == 57) {
                                throw ValueError("the 57th");
                              }
                            }),
               ValueError);
}

}  // namespace
}  // namespace torch_offload
