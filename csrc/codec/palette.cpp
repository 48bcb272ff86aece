#include "codec/palette.h"

#include <algorithm>
#include <numeric>

namespace torch_offload {

PaletteChoice::PaletteChoice(Codec codec, const TotalCounts& counts) : codec_(codec) {
  ranks_.fill(Rank::kNone);
  std::array<std::uint8_t, kNumExponents> order{};
  std::iota(order.begin(), order.end(), std::uint8_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::uint8_t left, std::uint8_t right) {
    return counts[left] > counts[right];
  });
  if (codec == Codec::kE4p) {
    take(order, 0, kNumPaletteEntries, 0, Rank::kShort);
  } else if (codec == Codec::kE33) {
    take(order, 0, kEscapeCode, 0, Rank::kShort);
    take(order, kEscapeCode, kNumPaletteEntries - kEscapePalette, kEscapePalette, Rank::kLong);
  }
}

void PaletteChoice::take(const std::array<std::uint8_t, kNumExponents>& by_frequency,
                         std::uint32_t begin, std::uint32_t count, std::uint32_t entry, Rank rank) {
  const auto first = palette_.begin() + entry;
  std::copy_n(by_frequency.begin() + begin, count, first);
  std::sort(first, first + count);
  std::for_each(first, first + count, [&](std::uint8_t exponent) { ranks_[exponent] = rank; });
}

}  // namespace torch_offload
