#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "codec/group.h"
#include "codec/vectors.h"

// One group of weights, coded on the CPU: loops over fixed lengths without branches, for the
// compiler to make vectors of.

namespace torch_offload {

/// The codes of exponents: an entry's place among ascending exponents, or one code for all others.
///
/// Weights have exponents that follow each other, so there is a run or two of them to look for, not
/// sixteen entries.
class CodeTable {
 public:
  CodeTable() = default;
  /// `exponents` ascend, at most kNumPaletteEntries of them; their codes are 0, 1, ...
  CodeTable(const std::uint8_t* exponents, std::uint8_t num_exponents, std::uint8_t other_code);

  /// Writes the code of each exponent.
  TORCH_OFFLOAD_INLINE void codes_of(const GroupBytes& exponents, GroupBytes& codes) const {
    codes.fill(other_code_);
    for (std::size_t run = 0; run < num_runs_; ++run) {
      const auto [first, length, code] = runs_[run];
      for (std::size_t i = 0; i < kGroupWeights; ++i) {
        const auto offset = static_cast<std::uint8_t>(exponents[i] - first);
        const std::uint8_t in_run = offset < length ? 0xFF : 0;  // a mask: all compilers see it
        codes[i] = static_cast<std::uint8_t>((codes[i] & ~in_run) | ((offset + code) & in_run));
      }
    }
  }

 private:
  struct Run {
    std::uint8_t first = 0;
    std::uint8_t length = 0;
    std::uint8_t code = 0;  // of the first
  };
  std::array<Run, kNumPaletteEntries> runs_{};
  std::size_t num_runs_ = 0;
  std::uint8_t other_code_ = 0;
};

/// A group taken apart. Weights from `num_weights` on are padding: zero, with code 0.
struct SplitGroup {
  GroupWeights weights;
  GroupBytes bytes;  ///< Sign and mantissa, as the plane of bytes has them.
  GroupBytes exponents;
  GroupBytes codes;
};

/// e4p: other exponents have this code, which is written as 0.
constexpr std::uint8_t kNoCode = kNumPaletteEntries;

/// Takes apart the `num_weights` weights in `group.weights` and writes their codes as e4p has them.
/// Returns whether any weight has no code.
bool encode_e4p(const CodeTable& table, std::size_t num_weights, SplitGroup& group,
                E4pCodes& nibbles);

/// Which weights of a group are escapes, in the order of the format: bit 8 j + k of word l.
using EscapeMasks = std::array<std::uint32_t, 32>;

/// Likewise as e33 has them; codes are at most kEscapeCode.
void encode_e33(const CodeTable& table, std::size_t num_weights, SplitGroup& group, E33Codes& words,
                EscapeMasks& escapes);

/// The code of each exponent as an escape.
using EscapeCodes = std::array<std::uint8_t, kNumExponents>;

/// gather_escapes writes up to so many bytes behind what it returns.
constexpr std::size_t kGatherSlack = 8;

/// Writes the codes of a group's escapes in order; returns how many there are.
std::uint32_t gather_escapes(const EscapeMasks& escapes, const GroupBytes& exponents,
                             const EscapeCodes& table, std::uint8_t* codes);

/// Calls `visit(position in the group)` for each escape, in order.
template <typename Visit>
void for_each_escape(const EscapeMasks& escapes, Visit visit) {
  for (std::uint32_t lane = 0; lane < escapes.size(); ++lane) {
    for (std::uint32_t left = escapes[lane]; left != 0; left &= left - 1) {
      const auto bit = static_cast<std::uint32_t>(__builtin_ctz(left));
      visit(position_in_group(bit / 8, lane, bit % 8));
    }
  }
}

/// Escapes are packed by so many: then they fill whole words.
constexpr std::size_t kEscapeBlock = 32;
using EscapeWords = std::array<std::uint32_t, 3>;

/// The words of 32 codes, of each of which three bits are taken.
EscapeWords pack_escapes(const std::uint8_t* codes);

}  // namespace torch_offload
