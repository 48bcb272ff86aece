#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "codec/codec.h"
#include "codec/format.h"
#include "codec/group.h"

namespace torch_offload {

/// Exponents are counted by so many weights of a tensor, the last of which may be fewer.
constexpr std::uint64_t kCountedWeights = std::uint64_t{64} * kTileWeights;
static_assert(kMaxEntryWeights % kCountedWeights == 0);

/// One tensor of a unit, as it lies in the master.
struct TensorSource {
  const std::byte* bytes = nullptr;
  std::uint64_t size_bytes = 0;
  std::uint64_t place_offset = 0;  ///< Where it belongs in the unit's place.
  ElementType type = ElementType::kOther;
  /// Of bf16: the exponents of each kCountedWeights, if they have been counted before. Without
  /// `bytes` they tell what the blob takes, and nothing can be encoded.
  const ExponentCounts* counts = nullptr;
};

struct EncodeOptions {
  /// Takes this codec for every tensor that it can write, whatever the size. Default: for each
  /// tensor the one that makes it smallest.
  std::optional<Codec> codec;
  unsigned num_threads = 1;
  /// Longer tensors are written in several entries.
  std::uint64_t max_entry_weights = kMaxEntryWeights;
};

/// Writes a unit as a packed blob; see Note [The packed format].
///
/// Reads the tensors twice: the constructor counts the exponents of those whose counts are not
/// given, and so knows the size of the blob, `encode` writes it. The result depends on the tensors
/// and the codec alone, not on the threads.
///
/// Blocking:  both do all their work before they return.
/// Lifetime:  the tensors must stay as they are in between, and since they were counted. Counts may
///            go once the constructor has returned.
class UnitEncoder {
 public:
  /// Throws: ValueError for tensors that overlap in the place, lie outside of it, or at an offset
  ///         that is no multiple of 16 bytes.
  UnitEncoder(const std::vector<TensorSource>& tensors, std::uint64_t unpacked_bytes,
              const EncodeOptions& options);

  std::uint64_t blob_bytes() const { return header_.blob_bytes; }
  std::uint32_t num_tiles() const { return header_.num_tiles; }
  const std::vector<TensorEntry>& entries() const { return entries_; }

  /// Writes `blob_bytes` bytes.
  /// Throws: StateError if a tensor has changed since the constructor read it; the blob is then
  ///         worth nothing, and its header says so.
  void encode(std::byte* blob) const;

 private:
  /// What one thread encodes at a time: whole tiles of one entry.
  struct Chunk {
    std::size_t entry = 0;
    std::uint64_t first_weight = 0;
    std::uint64_t num_weights = 0;
    std::uint32_t first_escape = 0;
    std::uint32_t num_escapes = 0;
    std::uint32_t first_patch = 0;
    std::uint32_t num_patches = 0;
  };
  class ChunkWriter;

  void add(const TensorSource& tensor);
  void choose(std::size_t entry_index, std::size_t first_chunk,
              const std::vector<ExponentCounts>& counts);
  void copy_raw(std::byte* blob, std::size_t entry_index) const;

  EncodeOptions options_;
  BlobHeader header_;
  std::vector<TensorEntry> entries_;
  std::vector<const std::byte*> sources_;       // by entry
  std::vector<const ExponentCounts*> counted_;  // by entry, of its first chunk; none: to be counted
  std::vector<Chunk> chunks_;                   // of the packed entries, in order
};

}  // namespace torch_offload
