#include "codec/group.h"

#include <algorithm>
#include <cstring>

namespace torch_offload {

namespace {

constexpr std::uint32_t kLanes = 32;
constexpr std::uint32_t kFourthBits = 0x88888888U;

/// The exponents of a group, in a plane of their own.
GroupBytes exponents_of(const GroupWeights& weights) {
  GroupBytes exponents;
  for (std::size_t i = 0; i < kGroupWeights; ++i) {
    exponents[i] = exponent_of(weights[i]);
  }
  return exponents;
}

/// The index of each exponent among the first `NumEntries` of the palette; else `NumEntries`,
/// or 0 where there are all.
template <std::uint8_t NumEntries>
GroupBytes indices_of(const GroupBytes& exponents, const Palette& palette) {
  GroupBytes indices;
  indices.fill(NumEntries < kNumPaletteEntries ? NumEntries : 0);
  for (std::uint8_t entry = 0; entry < NumEntries; ++entry) {
    const std::uint8_t wanted = palette[entry];
    for (std::size_t i = 0; i < kGroupWeights; ++i) {
      indices[i] = exponents[i] == wanted ? entry : indices[i];
    }
  }
  return indices;
}

/// Two codes a byte, the earlier one low.
void pack_nibbles(const std::uint8_t* codes, std::size_t num_codes, std::uint8_t* nibbles) {
  for (std::size_t i = 0; i < num_codes / 2; ++i) {
    std::uint16_t pair = 0;  // as a word: loads of every second byte make no vectors
    std::memcpy(&pair, codes + 2 * i, sizeof(pair));
    nibbles[i] = static_cast<std::uint8_t>(pair | (pair >> 4U));
  }
}

void unpack_nibbles(const std::uint8_t* nibbles, std::size_t num_codes, std::uint8_t* codes) {
  for (std::size_t i = 0; i < num_codes / 2; ++i) {
    codes[2 * i] = nibbles[i] & 0xFU;
    codes[2 * i + 1] = nibbles[i] >> 4U;
  }
}

template <std::uint8_t NumEntries>
GroupBytes look_up(const GroupBytes& codes, const Palette& palette) {
  GroupBytes exponents{};
  for (std::uint8_t entry = 0; entry < NumEntries; ++entry) {
    const std::uint8_t exponent = palette[entry];
    for (std::size_t i = 0; i < kGroupWeights; ++i) {
      exponents[i] = codes[i] == entry ? exponent : exponents[i];
    }
  }
  return exponents;
}

constexpr std::uint16_t weight_of(std::uint8_t byte, std::uint8_t exponent) {
  return static_cast<std::uint16_t>(((byte & 0x80U) << 8U) |
                                    (std::uint32_t{exponent} << kExponentShift) | (byte & 0x7FU));
}

void join(const GroupBytes& bytes, const GroupBytes& exponents, GroupWeights& weights) {
  for (std::size_t i = 0; i < kGroupWeights; ++i) {
    weights[i] = weight_of(bytes[i], exponents[i]);
  }
}

/// Three bits, which may lie in two words.
std::uint32_t escape_at(const std::byte* escapes, std::uint32_t number) {
  const std::uint64_t bit = std::uint64_t{3} * number;
  std::uint64_t words = 0;
  std::memcpy(&words, escapes + bit / 32 * 4, sizeof(words));
  return static_cast<std::uint32_t>(words >> (bit % 32)) & 7U;
}

}  // namespace

std::uint32_t num_escapes_in(const E33Codes& codes) {
  std::uint32_t count = 0;
  for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
    const std::uint32_t word0 = codes[lane];
    const std::uint32_t word1 = codes[kLanes + lane];
    const std::uint32_t word2 = codes[2 * kLanes + lane];
    // Each mask has every fourth bit only: four of them fit into one word.
    const std::uint32_t all = escapes_in(word0) | (escapes_in(word1) << 1U) |
                              (escapes_in(word2) << 2U) |
                              (escapes_in(last_quarter_of(word0, word1, word2)) << 3U);
    count += static_cast<std::uint32_t>(__builtin_popcount(all));
  }
  return count;
}

void count_exponents(const std::byte* weights, std::uint64_t num_weights, ExponentCounts& counts) {
  // Equal neighbours would wait for each other's increments: each of eight has its own counts.
  constexpr std::size_t kNumPartial = 8;
  std::array<ExponentCounts, kNumPartial> partial{};
  GroupWeights group{};
  for (std::uint64_t at = 0; at < num_weights; at += kGroupWeights) {
    const std::size_t here = std::min<std::uint64_t>(kGroupWeights, num_weights - at);
    std::memcpy(group.data(), weights + 2 * at, 2 * here);
    std::size_t i = 0;
    for (; i + kNumPartial <= here; i += kNumPartial) {
      for (std::size_t k = 0; k < kNumPartial; ++k) {
        ++partial[k][exponent_of(group[i + k])];
      }
    }
    for (; i < here; ++i) {
      ++partial[0][exponent_of(group[i])];
    }
  }
  for (const ExponentCounts& part : partial) {
    for (std::size_t i = 0; i < kNumExponents; ++i) {
      counts[i] += part[i];
    }
  }
}

void split_bytes(const GroupWeights& weights, GroupBytes& bytes) {
  for (std::size_t i = 0; i < kGroupWeights; ++i) {
    bytes[i] = static_cast<std::uint8_t>(((weights[i] >> 8U) & 0x80U) | (weights[i] & 0x7FU));
  }
}

void encode_e4p(const GroupWeights& weights, std::uint32_t num_weights, const Palette& palette,
                E4pCodes& codes) {
  GroupBytes indices = indices_of<kNumPaletteEntries>(exponents_of(weights), palette);
  std::fill(indices.begin() + num_weights, indices.end(), std::uint8_t{0});
  pack_nibbles(indices.data(), kGroupWeights, codes.data());
}

void encode_e33(const GroupWeights& weights, std::uint32_t num_weights, const Palette& palette,
                E33Codes& codes) {
  GroupBytes indices = indices_of<kEscapeCode>(exponents_of(weights), palette);
  std::fill(indices.begin() + num_weights, indices.end(), std::uint8_t{0});
  std::array<std::uint8_t, kGroupWeights / 2> nibbles;
  pack_nibbles(indices.data(), kGroupWeights, nibbles.data());
  std::array<std::uint32_t, kLanes> last;
  std::memcpy(codes.data(), nibbles.data(), sizeof(codes));
  std::memcpy(last.data(), nibbles.data() + sizeof(codes), sizeof(last));
  for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
    codes[lane] |= (last[lane] << 3U) & kFourthBits;
    codes[kLanes + lane] |= (last[lane] << 2U) & kFourthBits;
    codes[2 * kLanes + lane] |= (last[lane] << 1U) & kFourthBits;
  }
}

void decode_e4p(const GroupBytes& bytes, const E4pCodes& codes, const Palette& palette,
                GroupWeights& weights) {
  GroupBytes indices;
  unpack_nibbles(codes.data(), kGroupWeights, indices.data());
  join(bytes, look_up<kNumPaletteEntries>(indices, palette), weights);
}

void decode_e33(const GroupBytes& bytes, const E33Codes& codes, const Palette& palette,
                const std::byte* escapes, std::uint32_t first_escape, GroupWeights& weights) {
  std::array<std::uint32_t, std::size_t{4} * kLanes> words;
  for (std::uint32_t i = 0; i < kE33WordsPerGroup; ++i) {
    words[i] = codes[i] & ~kFourthBits;
  }
  for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
    words[3 * kLanes + lane] =
        last_quarter_of(codes[lane], codes[kLanes + lane], codes[2 * kLanes + lane]);
  }
  std::array<std::uint8_t, kGroupWeights / 2> nibbles;
  std::memcpy(nibbles.data(), words.data(), sizeof(nibbles));
  GroupBytes indices;
  unpack_nibbles(nibbles.data(), kGroupWeights, indices.data());
  join(bytes, look_up<kEscapeCode>(indices, palette), weights);
  std::uint32_t number = first_escape;
  for_each_escape(codes, [&](std::uint32_t position) {
    const std::uint8_t exponent = palette[kEscapePalette + escape_at(escapes, number++)];
    weights[position] = weight_of(bytes[position], exponent);
  });
}

}  // namespace torch_offload
