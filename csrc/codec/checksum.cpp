#include "codec/checksum.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "codec/format.h"
#include "codec/parallel.h"

namespace torch_offload {

namespace {

// Lanes of 64 bits that do not wait for each other: a multiplication a cycle.
constexpr std::size_t kNumLanes = 8;
constexpr std::size_t kStripeBytes = kNumLanes * sizeof(std::uint64_t);
constexpr std::size_t kChunkBytes = std::size_t{1} << 20U;

constexpr std::uint64_t kMultiplier = 0x9E3779B97F4A7C15;

using Lanes = std::array<std::uint64_t, kNumLanes>;

/// A bijection of either argument while the other stands: what has changed stays changed.
constexpr std::uint64_t mix(std::uint64_t sum, std::uint64_t value) {
  sum = (sum ^ value) * kMultiplier;
  return sum ^ (sum >> 29U);
}

void add_stripe(Lanes& lanes, const std::byte* bytes) {
  Lanes words{};
  std::memcpy(words.data(), bytes, kStripeBytes);
  for (std::size_t i = 0; i < kNumLanes; ++i) {
    lanes[i] = mix(lanes[i], words[i]);
  }
}

std::uint64_t chunk_sum(const std::byte* bytes, std::size_t size_bytes) {
  Lanes lanes{};
  for (std::size_t i = 0; i < kNumLanes; ++i) {
    lanes[i] = (i + 1) * kMultiplier;
  }
  std::size_t at = 0;
  for (; at + kStripeBytes <= size_bytes; at += kStripeBytes) {
    add_stripe(lanes, bytes + at);
  }
  if (at < size_bytes) {
    std::array<std::byte, kStripeBytes> last{};
    std::memcpy(last.data(), bytes + at, size_bytes - at);
    add_stripe(lanes, last.data());
  }
  std::uint64_t sum = size_bytes;
  for (const std::uint64_t lane : lanes) {
    sum = mix(sum, lane);
  }
  return sum;
}

}  // namespace

std::uint64_t checksum_of(const std::byte* bytes, std::size_t size_bytes, unsigned num_threads) {
  std::vector<std::uint64_t> sums((size_bytes + kChunkBytes - 1) / kChunkBytes);
  parallel_for(sums.size(), num_threads, [&](std::size_t chunk) {
    const std::size_t begin = chunk * kChunkBytes;
    sums[chunk] = chunk_sum(bytes + begin, std::min(kChunkBytes, size_bytes - begin));
  });
  std::uint64_t sum = size_bytes;
  for (const std::uint64_t of_chunk : sums) {
    sum = mix(sum, of_chunk);
  }
  return sum;
}

std::uint64_t blob_checksum(const std::byte* blob, std::size_t size_bytes, unsigned num_threads) {
  BlobHeader header;
  std::memcpy(&header, blob, sizeof(header));
  header.checksum = 0;
  std::array<std::byte, sizeof(BlobHeader)> head{};
  std::memcpy(head.data(), &header, sizeof(header));
  return mix(chunk_sum(head.data(), head.size()),
             checksum_of(blob + sizeof(header), size_bytes - sizeof(header), num_threads));
}

}  // namespace torch_offload
