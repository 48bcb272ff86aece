#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "codec/chunk.h"
#include "codec/codec.h"
#include "codec/format.h"
#include "codec/group.h"

namespace torch_offload {

struct WrittenChunk;

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
  /// Where an entry is read from.
  struct Source {
    const std::byte* bytes = nullptr;         // none where only sizes are asked for
    const ExponentCounts* counted = nullptr;  // of its first chunk; none: to be counted
    bool may_be_packed = false;
  };
  /// Some bytes of the blob, [begin, end).
  struct Range {
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
  };

  void add(const TensorSource& tensor);
  void count(std::vector<ExponentCounts>& counts) const;
  void choose(TensorEntry& entry, const ExponentCounts* counts, Chunk* chunks,
              std::size_t num_chunks) const;
  std::uint64_t place_data();
  void write_rest(std::byte* blob) const;
  void join_escapes(std::byte* blob, const std::vector<WrittenChunk>& written) const;
  std::vector<Range> not_summed() const;
  std::uint64_t sum_rest(const std::byte* blob) const;

  EncodeOptions options_;
  BlobHeader header_;
  std::vector<TensorEntry> entries_;
  std::vector<Source> sources_;  // by entry
  std::vector<Chunk> chunks_;    // of all entries, in order
};

}  // namespace torch_offload
