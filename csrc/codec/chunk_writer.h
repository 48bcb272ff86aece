#pragma once

#include <cstddef>
#include <cstdint>

#include "codec/chunk.h"
#include "codec/format.h"
#include "codec/group_encoder.h"

namespace torch_offload {

/// What a chunk leaves to whoever joins the chunks.
struct WrittenChunk {
  /// Of the blocks of the checksum that it has written: see summed_bytes.
  std::uint64_t sum = 0;
  /// Where the chunk before has begun a block of escapes: what belongs to it, to be added there.
  EscapeWords shared{};
};

/// So many bytes of an entry's data, from their begin, are summed by those who write its chunks:
/// whole blocks of what is written tile by tile.
std::uint64_t summed_bytes(const TensorEntry& entry);

/// Where in the blob the block of escapes lies that escape `number` of an entry belongs to.
std::uint64_t escape_block_offset(const TensorEntry& entry, std::uint32_t number);

/// Writes what one chunk of an entry takes of the blob, but a block of escapes that the chunk
/// before has begun. `source` are the entry's bytes.
///
/// Threads:  chunks may be written at once, and in any order.
/// Throws:   StateError where escapes and patches are others than the chunk says.
WrittenChunk write_chunk(const TensorEntry& entry, const Chunk& chunk, const std::byte* source,
                         std::byte* blob);

}  // namespace torch_offload
