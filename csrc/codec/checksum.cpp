#include "codec/checksum.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "codec/format.h"
#include "codec/parallel.h"

namespace torch_offload {

namespace {

constexpr std::size_t kNumLanes = 4;
constexpr std::size_t kNumWords = kSumBlockBytes / sizeof(std::uint64_t);
/// What one thread sums at a time.
constexpr std::size_t kPartBytes = std::size_t{1} << 20U;
constexpr std::size_t kPartBlocks = kPartBytes / kSumBlockBytes;

constexpr std::uint64_t kMultiplier = 0x9E3779B97F4A7C15;

__extension__ using Product = unsigned __int128;

constexpr std::uint64_t mix(std::uint64_t sum, std::uint64_t word) {
  const Product product = Product{sum ^ word} * kMultiplier;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64U);
}

/// The lanes do not wait for each other, and blocks neither.
std::uint64_t block_sum(const std::byte* bytes, std::uint64_t block) {
  std::array<std::uint64_t, kNumWords> words;
  std::memcpy(words.data(), bytes, kSumBlockBytes);
  std::array<std::uint64_t, kNumLanes> lanes;
  for (std::size_t lane = 0; lane < kNumLanes; ++lane) {
    lanes[lane] = (kNumLanes * block + lane + 1) * kMultiplier;
  }
  for (std::size_t i = 0; i < kNumWords; i += kNumLanes) {
    for (std::size_t lane = 0; lane < kNumLanes; ++lane) {
      lanes[lane] = mix(lanes[lane], words[i + lane]);
    }
  }
  std::uint64_t sum = block;
  for (const std::uint64_t lane : lanes) {
    sum = mix(sum, lane);
  }
  return sum;
}

/// Of all blocks from `first_block` on.
std::uint64_t sum_by_threads(const std::byte* bytes, std::size_t size_bytes,
                             std::uint64_t first_block, unsigned num_threads) {
  std::vector<std::uint64_t> sums((size_bytes + kPartBytes - 1) / kPartBytes);
  parallel_for(sums.size(), num_threads, [&](std::size_t part) {
    const std::size_t begin = part * kPartBytes;
    sums[part] = sum_of_blocks(bytes + begin, std::min(kPartBytes, size_bytes - begin),
                               first_block + part * kPartBlocks);
  });
  std::uint64_t sum = 0;
  for (const std::uint64_t of_part : sums) {
    sum += of_part;
  }
  return sum;
}

}  // namespace

std::uint64_t sum_of_blocks(const std::byte* bytes, std::size_t size_bytes,
                            std::uint64_t first_block) {
  std::uint64_t sum = 0;
  std::size_t at = 0;
  for (; at + kSumBlockBytes <= size_bytes; at += kSumBlockBytes) {
    sum += block_sum(bytes + at, first_block++);
  }
  if (at < size_bytes) {
    std::array<std::byte, kSumBlockBytes> last{};
    std::memcpy(last.data(), bytes + at, size_bytes - at);
    sum += block_sum(last.data(), first_block);
  }
  return sum;
}

std::uint64_t checksum_of_sum(std::uint64_t sum_of_all_blocks, std::size_t size_bytes) {
  return mix(sum_of_all_blocks, size_bytes);
}

std::uint64_t checksum_of(const std::byte* bytes, std::size_t size_bytes, unsigned num_threads) {
  return checksum_of_sum(sum_by_threads(bytes, size_bytes, 0, num_threads), size_bytes);
}

std::uint64_t blob_checksum(const std::byte* blob, std::size_t size_bytes, unsigned num_threads) {
  const std::size_t head_bytes = std::min(kSumBlockBytes, size_bytes);
  std::array<std::byte, kSumBlockBytes> head{};
  std::memcpy(head.data(), blob, head_bytes);
  BlobHeader header;
  std::memcpy(&header, head.data(), sizeof(header));
  header.checksum = 0;
  std::memcpy(head.data(), &header, sizeof(header));
  return checksum_of_sum(
      block_sum(head.data(), 0) +
          sum_by_threads(blob + head_bytes, size_bytes - head_bytes, 1, num_threads),
      size_bytes);
}

}  // namespace torch_offload
