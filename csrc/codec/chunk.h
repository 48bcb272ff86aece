#pragma once

#include <cstddef>
#include <cstdint>

namespace torch_offload {

/// What one thread encodes at a time: some tiles of one entry, which together with what they are
/// written to fit the cache of a core.
struct Chunk {
  std::size_t entry = 0;
  std::uint64_t first_tile = 0;
  std::uint64_t num_tiles = 0;  ///< The last of the entry may be shorter.
  std::uint32_t first_escape = 0;
  std::uint32_t num_escapes = 0;
  std::uint32_t first_patch = 0;
  std::uint32_t num_patches = 0;
};

}  // namespace torch_offload
