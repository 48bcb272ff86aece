#include "codec/group.h"

#include <cstring>

namespace torch_offload {

namespace {

constexpr std::uint32_t kLanes = 32;
constexpr std::uint32_t kFourthBits = 0x88888888U;

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
