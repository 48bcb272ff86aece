#pragma once

#include <array>
#include <cstdint>

#include "codec/codec.h"
#include "codec/format.h"
#include "codec/group.h"

namespace torch_offload {

/// How often exponents occur among few weights, or in a whole tensor.
using TotalCounts = std::array<std::uint64_t, kNumExponents>;

/// Which exponents a codec has a code for, and how many weights have others.
///
/// The commonest are in the palette, ties go to the lower exponent. Entries whose codes are as long
/// ascend: that is what makes a palette quick to look up, see CodeTable.
class PaletteChoice {
 public:
  PaletteChoice(Codec codec, const TotalCounts& counts);

  Codec codec() const { return codec_; }
  const Palette& palette() const { return palette_; }

  /// Of weights with these exponents; e4p and raw have none.
  template <typename Counts>
  std::uint32_t num_escapes(const Counts& counts) const {
    return codec_ == Codec::kE33 ? num_from(Rank::kLong, counts) : 0;
  }
  /// Likewise; raw has none.
  template <typename Counts>
  std::uint32_t num_patches(const Counts& counts) const {
    return codec_ == Codec::kRaw ? 0 : num_from(Rank::kNone, counts);
  }

 private:
  enum class Rank : std::uint8_t {
    kShort,  ///< Has a code.
    kLong,   ///< e33: has a code as an escape.
    kNone,   ///< Is in no palette.
  };

  void take(const std::array<std::uint8_t, kNumExponents>& by_frequency, std::uint32_t begin,
            std::uint32_t count, std::uint32_t entry, Rank rank);

  template <typename Counts>
  std::uint32_t num_from(Rank rank, const Counts& counts) const {
    std::uint64_t num = 0;
    for (std::uint32_t exponent = 0; exponent < kNumExponents; ++exponent) {
      num += ranks_[exponent] >= rank ? counts[exponent] : 0;
    }
    return static_cast<std::uint32_t>(num);
  }

  Codec codec_;
  Palette palette_{};
  std::array<Rank, kNumExponents> ranks_;
};

}  // namespace torch_offload
