#pragma once

#include <cstddef>
#include <cstdint>

#include "codec/blob.h"

namespace torch_offload {

/// Decodes a unit into its place, on the CPU. Bytes between its tensors stay as they are.
///
/// Blocking:  until all is decoded.
void decode(const BlobView& blob, std::byte* place, unsigned num_threads = 1);

/// Decodes what of the place lies in [place_begin, place_begin + size_bytes) to `destination`:
/// whole tensors.
void decode_part(const BlobView& blob, std::uint64_t place_begin, std::uint64_t size_bytes,
                 std::byte* destination, unsigned num_threads = 1);

/// Whether the blob holds just these bytes of the place from `place_begin` on: whole tensors.
bool holds(const BlobView& blob, std::uint64_t place_begin, const std::byte* bytes,
           std::uint64_t size_bytes, unsigned num_threads = 1);

/// Decodes all of a blob of which nothing is known yet.
/// Throws: as BlobView::checked; then nothing is decoded.
void decode(const std::byte* blob, std::uint64_t blob_bytes, std::byte* place,
            std::uint64_t place_bytes, unsigned num_threads = 1);

}  // namespace torch_offload
