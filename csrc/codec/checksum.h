#pragma once

#include <cstddef>
#include <cstdint>

// Note [The checksum]
// It guards against damage and mistakes, not against an adversary. Bytes are cut into blocks of
// 256, the last of which is filled up with zeros. A block is 32 words of 64 bits; each of four
// lanes takes every fourth of them, and all sums are taken modulo 2^64:
//
//   mix(sum, word):  p = (sum ^ word) * 0x9E3779B97F4A7C15, 128 bits;  low half ^ high half
//   block b:         lane i (i < 4) begins as (4 b + i + 1) * 0x9E3779B97F4A7C15, and takes the
//                    words i, i + 4, ..., i + 28 by lane = mix(lane, word)
//                    sum of the block: begins as b, and takes the lanes 0 to 3 in the same way
//   all:             mix(sum of all blocks, number of bytes)
//
// So blocks may be summed in any order and by anybody, right where they have been written. Both
// halves of the product count because the low one carries nothing down: of it alone the highest
// bits of two words can make up for each other. Folding the product is the step of Wang Yi's
// wyhash.

namespace torch_offload {

constexpr std::size_t kSumBlockBytes = 256;

/// The sum of the blocks in these bytes, the first of which is number `first_block` of the whole.
/// Only what ends the whole may end within a block.
std::uint64_t sum_of_blocks(const std::byte* bytes, std::size_t size_bytes,
                            std::uint64_t first_block);

/// The checksum of so many bytes whose blocks have this sum.
std::uint64_t checksum_of_sum(std::uint64_t sum_of_all_blocks, std::size_t size_bytes);

/// The checksum of bytes in memory or in a file.
///
/// Takes as many threads as are given; the sum does not depend on them.
std::uint64_t checksum_of(const std::byte* bytes, std::size_t size_bytes, unsigned num_threads);

/// The checksum of a blob: of all its bytes, with zero in the field that holds it.
/// `size_bytes` is at least that of a header.
std::uint64_t blob_checksum(const std::byte* blob, std::size_t size_bytes, unsigned num_threads);

}  // namespace torch_offload
