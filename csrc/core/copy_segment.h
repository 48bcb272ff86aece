#pragma once

#include <cstddef>
#include <vector>

namespace torch_offload {

/// What one copy can carry of a unit's master.
struct CopySegment {
  const std::byte* source = nullptr;
  /// In the flat layout of what is copied, from its begin.
  std::size_t offset = 0;
  std::size_t size_bytes = 0;
};

/// Appends a segment, to the last one where it goes on both there and in the flat layout.
inline void append_segment(std::vector<CopySegment>& segments, const CopySegment& segment) {
  if (segment.size_bytes == 0) {
    return;
  }
  if (!segments.empty()) {
    CopySegment& last = segments.back();
    if (last.source + last.size_bytes == segment.source &&
        last.offset + last.size_bytes == segment.offset) {
      last.size_bytes += segment.size_bytes;
      return;
    }
  }
  segments.push_back(segment);
}

}  // namespace torch_offload
