#include "codec/group_encoder.h"

#include <algorithm>
#include <cstring>

namespace torch_offload {

namespace {

constexpr std::uint32_t kLanes = 32;
constexpr std::uint32_t kFourthBits = 0x88888888U;

/// Two codes a byte, the earlier one low.
TORCH_OFFLOAD_INLINE void pack_nibbles(const GroupBytes& codes, E4pCodes& nibbles) {
  for (std::size_t i = 0; i < nibbles.size(); ++i) {
    std::uint16_t pair = 0;  // as a word: loads of every second byte make no vectors
    std::memcpy(&pair, codes.data() + 2 * i, sizeof(pair));
    pair &= 0x0F0FU;
    nibbles[i] = static_cast<std::uint8_t>(pair | (pair >> 4U));
  }
}

/// The bits whose number has bit `Low` and not bit `High`.
template <unsigned High, unsigned Low>
constexpr std::uint32_t swapped_bits() {
  std::uint32_t bits = 0;
  for (unsigned bit = 0; bit < 32; ++bit) {
    if ((bit >> Low & 1U) != 0 && (bit >> High & 1U) == 0) {
      bits |= std::uint32_t{1} << bit;
    }
  }
  return bits;
}

/// Moves each bit to the number that has two of its own number's bits exchanged.
template <unsigned High, unsigned Low>
TORCH_OFFLOAD_INLINE constexpr std::uint32_t swap_index_bits(std::uint32_t word) {
  constexpr unsigned kShift = (1U << High) - (1U << Low);
  const std::uint32_t changed = (word ^ (word >> kShift)) & swapped_bits<High, Low>();
  return word ^ changed ^ (changed << kShift);
}

/// Moves bit 4 k + j to 8 j + k (k < 8, j < 4).
TORCH_OFFLOAD_INLINE constexpr std::uint32_t by_quarter(std::uint32_t word) {
  word = swap_index_bits<4, 1>(word);
  word = swap_index_bits<3, 0>(word);
  word = swap_index_bits<2, 1>(word);
  return swap_index_bits<1, 0>(word);
}

TORCH_OFFLOAD_INLINE void split(const CodeTable& table, std::size_t num_weights,
                                SplitGroup& group) {
  std::fill(group.weights.begin() + static_cast<std::ptrdiff_t>(num_weights), group.weights.end(),
            std::uint16_t{0});
  for (std::size_t i = 0; i < kGroupWeights; ++i) {
    const auto low = static_cast<std::uint8_t>(group.weights[i]);
    const auto high = static_cast<std::uint8_t>(group.weights[i] >> 8U);
    group.bytes[i] = static_cast<std::uint8_t>((high & 0x80U) | (low & 0x7FU));
    group.exponents[i] = static_cast<std::uint8_t>((high << 1U) | (low >> 7U));
  }
  table.codes_of(group.exponents, group.codes);
  std::fill(group.codes.begin() + static_cast<std::ptrdiff_t>(num_weights), group.codes.end(),
            std::uint8_t{0});
}

TORCH_OFFLOAD_INLINE bool encode_e4p_loops(const CodeTable& table, std::size_t num_weights,
                                           SplitGroup& group, E4pCodes& nibbles) {
  split(table, num_weights, group);
  pack_nibbles(group.codes, nibbles);
  std::uint8_t all = 0;
  for (const std::uint8_t code : group.codes) {
    all |= code;
  }
  return (all & kNoCode) != 0;
}

TORCH_OFFLOAD_INLINE void encode_e33_loops(const CodeTable& table, std::size_t num_weights,
                                           SplitGroup& group, E33Codes& words,
                                           EscapeMasks& escapes) {
  split(table, num_weights, group);
  E4pCodes nibbles;
  pack_nibbles(group.codes, nibbles);
  std::array<std::uint32_t, std::size_t{4} * kLanes> all;
  std::memcpy(all.data(), nibbles.data(), sizeof(all));
  for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
    const std::uint32_t word0 = all[lane];
    const std::uint32_t word1 = all[kLanes + lane];
    const std::uint32_t word2 = all[2 * kLanes + lane];
    const std::uint32_t last = all[3 * kLanes + lane];
    words[lane] = word0 | ((last << 3U) & kFourthBits);
    words[kLanes + lane] = word1 | ((last << 2U) & kFourthBits);
    words[2 * kLanes + lane] = word2 | ((last << 1U) & kFourthBits);
    // Each mask has every fourth bit only: four of them fit into one word.
    escapes[lane] = by_quarter(escapes_in(word0) | (escapes_in(word1) << 1U) |
                               (escapes_in(word2) << 2U) | (escapes_in(last) << 3U));
  }
}

// Note [Two compilations].
TORCH_OFFLOAD_WIDE bool encode_e4p_wide(const CodeTable& table, std::size_t num_weights,
                                        SplitGroup& group, E4pCodes& nibbles) {
  return encode_e4p_loops(table, num_weights, group, nibbles);
}
TORCH_OFFLOAD_WIDE void encode_e33_wide(const CodeTable& table, std::size_t num_weights,
                                        SplitGroup& group, E33Codes& words, EscapeMasks& escapes) {
  encode_e33_loops(table, num_weights, group, words, escapes);
}

/// The number of bits of each word, without an instruction that old processors lack.
void count_bits(const EscapeMasks& words, std::array<std::uint32_t, kLanes>& counts) {
  for (std::size_t i = 0; i < kLanes; ++i) {
    std::uint32_t word = words[i];
    word = word - ((word >> 1U) & 0x55555555U);
    word = (word & 0x33333333U) + ((word >> 2U) & 0x33333333U);
    word = (word + (word >> 4U)) & 0x0F0F0F0FU;
    word += word >> 8U;
    counts[i] = (word + (word >> 16U)) & 0x3FU;
  }
}

/// Eight codes as 24 bits.
std::uint64_t pack_eight(const std::uint8_t* codes) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, codes, sizeof(bits));
  bits &= 0x0707070707070707U;
  bits = (bits | (bits >> 5U)) & 0x003F003F003F003FU;
  bits = (bits | (bits >> 10U)) & 0x00000FFF00000FFFU;
  return (bits | (bits >> 20U)) & 0xFFFFFFU;
}

}  // namespace

CodeTable::CodeTable(const std::uint8_t* exponents, std::uint8_t num_exponents,
                     std::uint8_t other_code)
    : other_code_(other_code) {
  for (std::uint8_t code = 0; code < num_exponents; ++code) {
    const std::uint8_t exponent = exponents[code];
    if (num_runs_ > 0 && exponent == exponents[code - 1] + 1) {
      ++runs_[num_runs_ - 1].length;
    } else {
      runs_[num_runs_++] = {exponent, 1, code};
    }
  }
}

bool encode_e4p(const CodeTable& table, std::size_t num_weights, SplitGroup& group,
                E4pCodes& nibbles) {
  return has_wide_vectors() ? encode_e4p_wide(table, num_weights, group, nibbles)
                            : encode_e4p_loops(table, num_weights, group, nibbles);
}

void encode_e33(const CodeTable& table, std::size_t num_weights, SplitGroup& group, E33Codes& words,
                EscapeMasks& escapes) {
  if (has_wide_vectors()) {
    encode_e33_wide(table, num_weights, group, words, escapes);
  } else {
    encode_e33_loops(table, num_weights, group, words, escapes);
  }
}

std::uint32_t gather_escapes(const EscapeMasks& escapes, const GroupBytes& exponents,
                             const EscapeCodes& table, std::uint8_t* codes) {
  // Two lanes at once hold two escapes as a rule, so four are taken without asking whether they
  // are there: what is written too much is written over.
  constexpr std::uint32_t kUnasked = 4;
  static_assert(kUnasked <= kGatherSlack);
  constexpr std::uint64_t kGuard = std::uint64_t{1} << 63U;  // some bit is there, whatever is asked
  std::array<std::uint32_t, kLanes> counts;
  count_bits(escapes, counts);
  std::uint8_t* out = codes;
  for (std::uint32_t lane = 0; lane < kLanes; lane += 2) {
    std::uint64_t left = escapes[lane] | (std::uint64_t{escapes[lane + 1]} << 32U);
    const auto take = [&](std::uint32_t number) {
      const auto bit = static_cast<std::uint32_t>(__builtin_ctzll(left | kGuard));
      left &= left - 1;
      const std::uint32_t position = position_in_group(bit / 8 % 4, lane + bit / 32, bit % 8);
      out[number] = table[exponents[position]];
    };
    const std::uint32_t count = counts[lane] + counts[lane + 1];
    for (std::uint32_t number = 0; number < kUnasked; ++number) {
      take(number);
    }
    for (std::uint32_t number = kUnasked; number < count; ++number) {
      take(number);
    }
    out += count;
  }
  return static_cast<std::uint32_t>(out - codes);
}

EscapeWords pack_escapes(const std::uint8_t* codes) {
  const std::uint64_t parts[] = {pack_eight(codes), pack_eight(codes + 8), pack_eight(codes + 16),
                                 pack_eight(codes + 24)};
  return {static_cast<std::uint32_t>(parts[0] | (parts[1] << 24U)),
          static_cast<std::uint32_t>((parts[1] >> 8U) | (parts[2] << 16U)),
          static_cast<std::uint32_t>((parts[2] >> 16U) | (parts[3] << 8U))};
}

}  // namespace torch_offload
