#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "codec/format.h"

// One group of weights, and how it is decoded on the CPU. Plain loops over fixed lengths, for the
// compiler to make vectors of; what a section holds is in Note [The packed format].

namespace torch_offload {

constexpr unsigned kExponentShift = 7;
constexpr std::uint32_t kNumExponents = 256;

using GroupWeights = std::array<std::uint16_t, kGroupWeights>;
using GroupBytes = std::array<std::uint8_t, kGroupWeights>;
using E4pCodes = std::array<std::uint8_t, kGroupWeights / 2>;
using E33Codes = std::array<std::uint32_t, kE33WordsPerGroup>;
using ExponentCounts = std::array<std::uint32_t, kNumExponents>;
using Palette = std::array<std::uint8_t, kNumPaletteEntries>;

constexpr std::uint8_t exponent_of(std::uint16_t weight) {
  return static_cast<std::uint8_t>(weight >> kExponentShift);
}

/// Which of the 8 weights of an e33 word are escapes: bit 4 k is set for weight k.
constexpr std::uint32_t escapes_in(std::uint32_t codes) {
  return codes & (codes >> 1U) & (codes >> 2U) & 0x11111111U;
}

/// The last quarter's codes, which lie in the fourth bits of the three words of a lane.
constexpr std::uint32_t last_quarter_of(std::uint32_t word0, std::uint32_t word1,
                                        std::uint32_t word2) {
  return ((word0 >> 3U) & 0x11111111U) | ((word1 >> 2U) & 0x22222222U) |
         ((word2 >> 1U) & 0x44444444U);
}

/// The position in its group of weight `k` of the word of quarter `quarter` and lane `lane`.
constexpr std::uint32_t position_in_group(std::uint32_t quarter, std::uint32_t lane,
                                          std::uint32_t k) {
  return quarter * (kGroupWeights / 4) + lane * 8 + k;
}

/// Calls `visit(position)` for each escape of a group, in the order of the format.
template <typename Visit>
void for_each_escape(const E33Codes& codes, Visit visit) {
  constexpr std::uint32_t kNumLanes = 32;
  for (std::uint32_t lane = 0; lane < kNumLanes; ++lane) {
    const std::uint32_t words[] = {
        codes[lane], codes[kNumLanes + lane], codes[2 * kNumLanes + lane],
        last_quarter_of(codes[lane], codes[kNumLanes + lane], codes[2 * kNumLanes + lane])};
    for (std::uint32_t quarter = 0; quarter < 4; ++quarter) {
      for (std::uint32_t left = escapes_in(words[quarter]); left != 0; left &= left - 1) {
        const auto bit = static_cast<std::uint32_t>(__builtin_ctz(left));
        visit(position_in_group(quarter, lane, bit / 4));
      }
    }
  }
}

std::uint32_t num_escapes_in(const E33Codes& codes);

void decode_e4p(const GroupBytes& bytes, const E4pCodes& codes, const Palette& palette,
                GroupWeights& weights);
/// `escapes` are the 32-bit words of the tensor's escapes, and the group's begin with number
/// `first_escape` of them.
void decode_e33(const GroupBytes& bytes, const E33Codes& codes, const Palette& palette,
                const std::byte* escapes, std::uint32_t first_escape, GroupWeights& weights);

}  // namespace torch_offload
