#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "codec/encoder.h"

namespace torch_offload {

/// A blob that an earlier run has packed; nothing is known of it yet. Does not own its bytes.
struct KeptBlob {
  const std::byte* bytes = nullptr;  // none
  std::uint64_t size_bytes = 0;
};

/// Makes the blob of a unit: a copy of one that was kept, where that is sound and of this unit's
/// layout, else one that is packed from its tensors.
///
/// That a kept blob holds the values of these tensors is the caller's knowledge; whether its bytes
/// are whole is found out here.
///
/// Blocking:  the constructor reads all tensors unless a blob was kept, `write` does the rest.
/// Lifetime:  tensors and kept blob must stay as they are in between.
class UnitPacker {
 public:
  /// Throws: ValueError as UnitEncoder.
  UnitPacker(std::vector<TensorSource> tensors, std::uint64_t unpacked_bytes,
             const EncodeOptions& options, const KeptBlob& kept = {});

  std::uint64_t blob_bytes() const { return blob_bytes_; }
  std::uint32_t num_tiles() const { return num_tiles_; }
  /// Whether what `write` has written is the kept blob.
  bool took_kept() const { return took_kept_; }

  /// Writes the blob, or returns false if it takes more than `room_bytes`: the kept one was
  /// damaged, and what is packed instead is larger.
  /// Throws: StateError as UnitEncoder::encode.
  bool write(std::byte* blob, std::uint64_t room_bytes);

 private:
  bool write_kept(std::byte* blob);
  void count();

  std::vector<TensorSource> tensors_;
  std::uint64_t unpacked_bytes_;
  EncodeOptions options_;
  KeptBlob kept_;
  std::optional<UnitEncoder> encoder_;  // none while there is a kept blob
  std::uint64_t blob_bytes_ = 0;
  std::uint32_t num_tiles_ = 0;
  bool took_kept_ = false;
};

}  // namespace torch_offload
