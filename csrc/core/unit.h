#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace torch_offload {

/// Position of a unit in the list that the plan was made from.
using UnitIndex = std::uint32_t;

constexpr UnitIndex kNoUnit = UINT32_MAX;

/// Alignment of every slice, unit and place: a kernel may choose its code path by the address
/// modulo some power of two, so equal alignment is a condition for equal bits.
constexpr std::size_t kAlignmentBytes = 256;

constexpr std::size_t aligned_size(std::size_t size_bytes) {
  return (size_bytes + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
}

/// A half-open range of bytes [begin, end) in the window.
struct ByteRange {
  std::size_t begin = 0;
  std::size_t end = 0;

  std::size_t size_bytes() const { return end - begin; }
  bool overlaps(const ByteRange& other) const { return begin < other.end && other.begin < end; }
};

/// Which half of a layer a unit is. A label for the `split` stream layout and for reports only.
enum class UnitKind : std::uint8_t { kMha, kFfn };

/// What moves as one: an attention or FFN module of a layer, a whole layer, or a leaf.
struct Unit {
  std::string name;
  std::size_t size_bytes = 0;  ///< Flat size of the master, a multiple of kAlignmentBytes.
  std::uint32_t layer_index = 0;
  UnitKind kind = UnitKind::kMha;
};

}  // namespace torch_offload
