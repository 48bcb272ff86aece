#include "codec/decoder.h"

#include <algorithm>
#include <cstring>

#include "codec/group.h"
#include "codec/parallel.h"
#include "codec/words.h"

namespace torch_offload {

namespace {

/// What one thread decodes at a time.
constexpr std::uint32_t kTilesPerChunk = 64;

class EntryDecoder {
 public:
  EntryDecoder(const TensorEntry& entry, const std::byte* blob, std::byte* place)
      : entry_(entry),
        sections_(sections_of(entry.codec, entry.size_bytes, entry.num_escapes, entry.num_patches)),
        data_(blob + entry.data_offset),
        tensor_(place + entry.place_offset) {
    std::copy(std::begin(entry.palette), std::end(entry.palette), palette_.begin());
  }

  void decode_tile(std::uint64_t tile) const {
    const std::uint64_t begin = tile * kTileBytes;
    const std::uint64_t end = std::min(begin + kTileBytes, entry_.size_bytes);
    if (entry_.codec == Codec::kRaw) {
      std::memcpy(tensor_ + begin, data_ + begin, end - begin);
      return;
    }
    constexpr std::uint64_t kGroupBytes = std::uint64_t{2} * kGroupWeights;
    for (std::uint64_t at = begin; at < end; at += kGroupBytes) {
      decode_group(at / kGroupBytes, std::min(kGroupBytes, end - at));
    }
    const std::byte* const offsets = data_ + sections_.patch_offsets + tile * 4;
    const std::uint32_t last = load_word(offsets + 4);
    for (std::uint32_t patch = load_word(offsets); patch < last; ++patch) {
      const std::uint32_t word = load_word(data_ + sections_.patches + std::uint64_t{patch} * 4);
      const auto weight = static_cast<std::uint16_t>(word >> 16U);
      std::memcpy(tensor_ + begin + 2 * std::size_t{word & 0xFFFFU}, &weight, sizeof(weight));
    }
  }

 private:
  void decode_group(std::uint64_t group, std::uint64_t size_bytes) const {
    GroupBytes bytes;
    GroupWeights weights;
    std::memcpy(bytes.data(), data_ + group * sizeof(bytes), sizeof(bytes));
    const std::byte* const codes_at = data_ + sections_.codes;
    if (entry_.codec == Codec::kE33) {
      E33Codes codes;
      std::memcpy(codes.data(), codes_at + group * sizeof(codes), sizeof(codes));
      decode_e33(bytes, codes, palette_, data_ + sections_.escapes,
                 load_word(data_ + sections_.escape_offsets + group * 4), weights);
    } else {
      E4pCodes codes;
      std::memcpy(codes.data(), codes_at + group * sizeof(codes), sizeof(codes));
      decode_e4p(bytes, codes, palette_, weights);
    }
    std::memcpy(tensor_ + group * sizeof(weights), weights.data(), size_bytes);
  }

  const TensorEntry& entry_;
  Sections sections_;
  const std::byte* data_;
  std::byte* tensor_;
  Palette palette_{};
};

}  // namespace

void decode(const BlobView& blob, std::byte* place, unsigned num_threads) {
  for (const TensorEntry& entry : blob.entries()) {
    const EntryDecoder decoder(entry, blob.bytes(), place);
    const std::uint64_t num_tiles = num_tiles_of(entry.size_bytes);
    parallel_for((num_tiles + kTilesPerChunk - 1) / kTilesPerChunk, num_threads,
                 [&](std::size_t chunk) {
                   const std::uint64_t end =
                       std::min<std::uint64_t>((chunk + 1) * kTilesPerChunk, num_tiles);
                   for (std::uint64_t tile = chunk * kTilesPerChunk; tile < end; ++tile) {
                     decoder.decode_tile(tile);
                   }
                 });
  }
}

void decode(const std::byte* blob, std::uint64_t blob_bytes, std::byte* place,
            std::uint64_t place_bytes, unsigned num_threads) {
  decode(BlobView::checked(blob, blob_bytes, place_bytes, num_threads), place, num_threads);
}

}  // namespace torch_offload
