#pragma once

#include <cstddef>
#include <cstdint>

namespace torch_offload {

/// How the bytes of one tensor are written in a packed unit. The numbers are part of the format.
enum class Codec : std::uint32_t {
  kRaw = 0,  ///< As they are.
  kE4p = 1,  ///< bf16: a palette of 16 exponents, 4 bits each; patches for the others.
  kE33 = 2,  ///< bf16: 7 exponents in 3 bits, 8 further ones in 3 more; patches for the others.
};

constexpr std::uint32_t kNumCodecs = 3;

/// The name of a codec in Python and in reports, such as "e33".
constexpr const char* name_of(Codec codec) {
  switch (codec) {
    case Codec::kRaw:
      return "raw";
    case Codec::kE4p:
      return "e4p";
    case Codec::kE33:
      return "e33";
  }
  return "?";
}

/// What a tensor's bytes mean, as far as packing is concerned.
enum class ElementType : std::uint8_t {
  kBf16,
  kOther,  ///< Nothing is known that packs it: it stays raw.
};

/// Weights that are decoded as one, by a warp on the GPU.
constexpr std::uint32_t kGroupWeights = 1024;
/// Weights that share a list of patches; what a block of threads decodes on the GPU.
constexpr std::uint32_t kTileWeights = 4096;
constexpr std::uint32_t kGroupsPerTile = kTileWeights / kGroupWeights;
/// Unpacked bytes of a tile, of raw tensors as well.
constexpr std::uint32_t kTileBytes = 2 * kTileWeights;

}  // namespace torch_offload
