#include "codec/decoder.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

#include "codec/group.h"
#include "codec/parallel.h"
#include "codec/words.h"
#include "core/error.h"

namespace torch_offload {

namespace {

/// What one thread decodes at a time.
constexpr std::uint32_t kTilesPerChunk = 64;

class EntryDecoder {
 public:
  EntryDecoder(const TensorEntry& entry, const std::byte* blob)
      : entry_(entry), sections_(sections_of(entry)), data_(blob + entry.data_offset) {
    std::copy(std::begin(entry.palette), std::end(entry.palette), palette_.begin());
  }

  std::uint64_t num_tiles() const { return num_tiles_of(entry_.size_bytes); }
  std::uint64_t tile_bytes(std::uint64_t tile) const {
    return std::min<std::uint64_t>(kTileBytes, entry_.size_bytes - tile * kTileBytes);
  }

  /// Writes `tile_bytes` bytes.
  void decode_tile(std::uint64_t tile, std::byte* destination) const {
    const std::uint64_t begin = tile * kTileBytes;
    const std::uint64_t size_bytes = tile_bytes(tile);
    if (entry_.codec == Codec::kRaw) {
      std::memcpy(destination, data_ + begin, size_bytes);
      return;
    }
    constexpr std::uint64_t kGroupBytes = std::uint64_t{2} * kGroupWeights;
    for (std::uint64_t at = 0; at < size_bytes; at += kGroupBytes) {
      decode_group((begin + at) / kGroupBytes, std::min(kGroupBytes, size_bytes - at),
                   destination + at);
    }
    const std::byte* const offsets = data_ + sections_.patch_offsets + tile * 4;
    const std::uint32_t last = load_word(offsets + 4);
    for (std::uint32_t patch = load_word(offsets); patch < last; ++patch) {
      const std::uint32_t word = load_word(data_ + sections_.patches + std::uint64_t{patch} * 4);
      const auto weight = static_cast<std::uint16_t>(word >> 16U);
      std::memcpy(destination + 2 * std::size_t{word & 0xFFFFU}, &weight, sizeof(weight));
    }
  }

 private:
  void decode_group(std::uint64_t group, std::uint64_t size_bytes, std::byte* destination) const {
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
    std::memcpy(destination, weights.data(), size_bytes);
  }

  const TensorEntry& entry_;
  Sections sections_;
  const std::byte* data_;
  Palette palette_{};
};

void decode_entry(const TensorEntry& entry, const std::byte* blob, std::byte* destination,
                  unsigned num_threads) {
  const EntryDecoder decoder(entry, blob);
  const std::uint64_t num_tiles = decoder.num_tiles();
  parallel_for(
      (num_tiles + kTilesPerChunk - 1) / kTilesPerChunk, num_threads, [&](std::size_t chunk) {
        const std::uint64_t end = std::min<std::uint64_t>((chunk + 1) * kTilesPerChunk, num_tiles);
        for (std::uint64_t tile = chunk * kTilesPerChunk; tile < end; ++tile) {
          decoder.decode_tile(tile, destination + tile * kTileBytes);
        }
      });
}

/// Calls `visit` with each tensor that begins in [begin, begin + size_bytes) of the place.
template <typename Visit>
void for_each_entry(const BlobView& blob, std::uint64_t begin, std::uint64_t size_bytes,
                    Visit visit) {
  for (const TensorEntry& entry : blob.entries()) {
    if (entry.place_offset >= begin && entry.place_offset - begin < size_bytes) {
      visit(entry);
    }
  }
}

}  // namespace

void decode(const BlobView& blob, std::byte* place, unsigned num_threads) {
  for (const TensorEntry& entry : blob.entries()) {
    decode_entry(entry, blob.bytes(), place + entry.place_offset, num_threads);
  }
}

void decode_part(const BlobView& blob, std::uint64_t place_begin, std::uint64_t size_bytes,
                 std::byte* destination, unsigned num_threads) {
  for_each_entry(blob, place_begin, size_bytes, [&](const TensorEntry& entry) {
    check_internal(entry.place_offset + entry.size_bytes <= place_begin + size_bytes,
                   "a part of a blob that ends within a tensor");
    decode_entry(entry, blob.bytes(), destination + (entry.place_offset - place_begin),
                 num_threads);
  });
}

bool holds(const BlobView& blob, std::uint64_t place_begin, const std::byte* bytes,
           std::uint64_t size_bytes, unsigned num_threads) {
  std::atomic<bool> is_equal{true};
  std::uint64_t num_bytes = 0;
  for_each_entry(blob, place_begin, size_bytes, [&](const TensorEntry& entry) {
    check_internal(entry.place_offset + entry.size_bytes <= place_begin + size_bytes,
                   "a part of a blob that ends within a tensor");
    num_bytes += entry.size_bytes;
    const EntryDecoder decoder(entry, blob.bytes());
    const std::byte* const tensor = bytes + (entry.place_offset - place_begin);
    parallel_for(decoder.num_tiles(), num_threads, [&](std::size_t tile) {
      std::array<std::byte, kTileBytes> decoded;
      if (!is_equal) {
        return;
      }
      decoder.decode_tile(tile, decoded.data());
      if (std::memcmp(decoded.data(), tensor + tile * kTileBytes, decoder.tile_bytes(tile)) != 0) {
        is_equal = false;
      }
    });
  });
  return is_equal && num_bytes == size_bytes;
}

void decode(const std::byte* blob, std::uint64_t blob_bytes, std::byte* place,
            std::uint64_t place_bytes, unsigned num_threads) {
  decode(BlobView::checked(blob, blob_bytes, place_bytes, num_threads), place, num_threads);
}

}  // namespace torch_offload
