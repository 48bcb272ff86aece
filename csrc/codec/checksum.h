#pragma once

#include <cstddef>
#include <cstdint>

namespace torch_offload {

/// A checksum of bytes in memory or in a file: against damage, not against an adversary. Any change
/// within one word of 64 bits changes it.
///
/// Takes as many threads as are given; the sum does not depend on them.
std::uint64_t checksum_of(const std::byte* bytes, std::size_t size_bytes, unsigned num_threads);

/// The checksum of a blob: of all its bytes, with zero in the field that holds it.
/// `size_bytes` is at least that of a header.
std::uint64_t blob_checksum(const std::byte* blob, std::size_t size_bytes, unsigned num_threads);

}  // namespace torch_offload
