#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "codec/encoder.h"
#include "core/unit.h"

namespace torch_offload::testing {

using Weights = std::vector<std::uint16_t>;
using Bytes = std::vector<std::byte>;

/// Weights as trained or freshly made layers have them: normal, rounded to bf16.
inline Weights normal_weights(std::size_t count, std::mt19937& random, float deviation = 0.02F) {
  std::normal_distribution<float> normal(0.0F, deviation);
  Weights weights(count);
  for (std::uint16_t& weight : weights) {
    const float value = normal(random);
    std::uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof(bits));
    weight = static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16U) & 1U)) >> 16U);
  }
  return weights;
}

/// Every bit pattern is as likely as every other.
inline Weights random_bits(std::size_t count, std::mt19937& random) {
  Weights weights(count);
  std::generate(weights.begin(), weights.end(),
                [&] { return static_cast<std::uint16_t>(random()); });
  return weights;
}

/// `share` of 1000 weights have one of eight rare exponents, the others one of seven common ones.
inline Weights weights_with_escapes(std::size_t count, unsigned share, std::mt19937& random) {
  Weights weights(count);
  for (std::uint16_t& weight : weights) {
    const unsigned exponent = random() % 1000 < share ? 60 + random() % 8 : 120 + random() % 7;
    weight = static_cast<std::uint16_t>((exponent << 7U) | (random() & 0x807FU));
  }
  return weights;
}

inline Weights all_patterns() {
  Weights weights(std::size_t{1} << 16U);
  for (std::size_t i = 0; i < weights.size(); ++i) {
    weights[i] = static_cast<std::uint16_t>(i);
  }
  return weights;
}

/// What a test packs: tensors of bf16 and of others, as a unit's master has them.
struct PackedCase {
  std::vector<Bytes> tensors;
  std::vector<ElementType> types;

  void add(const Weights& weights) {
    Bytes bytes(2 * weights.size());
    if (!bytes.empty()) {
      std::memcpy(bytes.data(), weights.data(), bytes.size());
    }
    add(std::move(bytes), ElementType::kBf16);
  }
  void add(Bytes bytes, ElementType type) {
    tensors.push_back(std::move(bytes));
    types.push_back(type);
  }

  std::vector<TensorSource> sources() const {
    std::vector<TensorSource> sources;
    std::uint64_t offset = 0;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      sources.push_back({tensors[i].data(), tensors[i].size(), offset, types[i]});
      offset += aligned_size(tensors[i].size());
    }
    return sources;
  }

  std::uint64_t place_bytes() const {
    std::uint64_t size_bytes = 0;
    for (const Bytes& tensor : tensors) {
      size_bytes += aligned_size(tensor.size());
    }
    return size_bytes;
  }

  /// The place as it has to be after decoding, when it held `filler` before.
  Bytes place(std::byte filler) const {
    Bytes bytes(place_bytes(), filler);
    std::uint64_t offset = 0;
    for (const Bytes& tensor : tensors) {
      std::copy(tensor.begin(), tensor.end(), bytes.begin() + static_cast<std::ptrdiff_t>(offset));
      offset += aligned_size(tensor.size());
    }
    return bytes;
  }

  Bytes pack(const EncodeOptions& options) const {
    const UnitEncoder encoder(sources(), place_bytes(), options);
    Bytes blob(encoder.blob_bytes(), std::byte{0xA5});
    encoder.encode(blob.data());
    return blob;
  }
};

/// Lengths around every block size of the format.
inline std::vector<std::size_t> odd_lengths() {
  std::vector<std::size_t> lengths{0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 255, 256, 257};
  for (const std::size_t block : {1024U, 2048U, 4096U, 8192U, 64U * 4096U}) {
    lengths.insert(lengths.end(), {block - 1, block, block + 1});
  }
  return lengths;
}

}  // namespace torch_offload::testing
