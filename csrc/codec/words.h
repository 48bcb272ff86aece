#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace torch_offload {

/// A word of the packed format, at any address.
inline std::uint32_t load_word(const std::byte* at) {
  std::uint32_t word = 0;
  std::memcpy(&word, at, sizeof(word));
  return word;
}

inline void store_word(std::byte* at, std::uint32_t word) { std::memcpy(at, &word, sizeof(word)); }

}  // namespace torch_offload
