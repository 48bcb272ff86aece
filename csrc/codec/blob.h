#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "codec/format.h"

namespace torch_offload {

/// A packed blob that was found sound. Does not own its bytes.
class BlobView {
 public:
  /// Checks all of a blob: version, codecs, lengths, checksum, and that whoever decodes it reads
  /// nothing outside of it and writes nothing outside of a place of `place_bytes`.
  ///
  /// Blocking:  reads all of it.
  /// Lifetime:  the bytes must outlive the view, and stay as they are.
  /// Throws:    NotImplementedError for a version or codec of another release, ValueError for a
  ///            blob that is damaged, or made for a place of another size.
  static BlobView checked(const std::byte* bytes, std::uint64_t size_bytes,
                          std::uint64_t place_bytes, unsigned num_threads = 1);

  /// Checks no more than the header: what must be known before a blob is read.
  /// Throws: as `checked`.
  static BlobHeader header_of(const std::byte* bytes, std::uint64_t size_bytes,
                              std::uint64_t place_bytes);

  const std::byte* bytes() const { return bytes_; }
  const BlobHeader& header() const { return header_; }
  const std::vector<TensorEntry>& entries() const { return entries_; }

 private:
  BlobView() = default;

  const std::byte* bytes_ = nullptr;
  BlobHeader header_;
  std::vector<TensorEntry> entries_;
};

}  // namespace torch_offload
