#include "codec/exponents.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "codec/vectors.h"

namespace torch_offload {

namespace {

/// How often two exponents lie side by side: one increment for two weights. A quarter of a MiB, of
/// which weights touch the few lines of their exponents.
using PairCounts = std::array<ExponentCounts, kNumExponents>;

/// Of this thread, and all zero between calls: to clear all of it each time would cost more.
PairCounts& pair_counts() {
  thread_local const auto counts = std::make_unique<PairCounts>();
  return *counts;
}

/// The range of exponents that occur.
struct Range {
  std::uint8_t first = 0xFF;
  std::uint8_t last = 0;
};

/// Writes the exponents of a group, and adds them to the range.
TORCH_OFFLOAD_INLINE void take_exponents_loops(const GroupWeights& weights, GroupBytes& exponents,
                                               Range& range) {
  for (std::size_t i = 0; i < kGroupWeights; ++i) {
    exponents[i] = exponent_of(weights[i]);
  }
  std::uint8_t first = range.first;
  std::uint8_t last = range.last;
  for (const std::uint8_t exponent : exponents) {
    first = std::min(first, exponent);
    last = std::max(last, exponent);
  }
  range = {first, last};
}

TORCH_OFFLOAD_WIDE void take_exponents_wide(const GroupWeights& weights, GroupBytes& exponents,
                                            Range& range) {
  take_exponents_loops(weights, exponents, range);
}

void take_exponents(const GroupWeights& weights, GroupBytes& exponents, Range& range) {
  if (has_wide_vectors()) {
    take_exponents_wide(weights, exponents, range);
  } else {
    take_exponents_loops(weights, exponents, range);
  }
}

void count_pairs(const GroupBytes& exponents, PairCounts& pairs) {
  std::uint32_t* const counts = pairs.front().data();
  for (std::size_t i = 0; i < kGroupWeights; i += 2) {
    std::uint16_t pair = 0;
    std::memcpy(&pair, exponents.data() + i, sizeof(pair));
    ++counts[pair];
  }
}

/// Adds both of each pair, and clears what was counted.
void take_pairs(PairCounts& pairs, const Range& range, ExponentCounts& counts) {
  for (std::size_t row = range.first; row <= range.last; ++row) {
    std::uint32_t of_row = 0;
    for (std::size_t column = range.first; column <= range.last; ++column) {
      const std::uint32_t count = pairs[row][column];
      pairs[row][column] = 0;
      counts[column] += count;
      of_row += count;
    }
    counts[row] += of_row;
  }
}

}  // namespace

void count_exponents(const std::byte* weights, std::uint64_t num_weights, ExponentCounts& counts) {
  PairCounts& pairs = pair_counts();
  Range range;
  GroupWeights group;
  GroupBytes exponents;
  std::uint64_t at = 0;
  for (; at + kGroupWeights <= num_weights; at += kGroupWeights) {
    std::memcpy(group.data(), weights + 2 * at, sizeof(group));
    take_exponents(group, exponents, range);
    count_pairs(exponents, pairs);
  }
  take_pairs(pairs, range, counts);
  for (; at < num_weights; ++at) {
    std::uint16_t weight = 0;
    std::memcpy(&weight, weights + 2 * at, sizeof(weight));
    ++counts[exponent_of(weight)];
  }
}

}  // namespace torch_offload
