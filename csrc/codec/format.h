#pragma once

#include <cstddef>
#include <cstdint>

#include "codec/codec.h"

// Note [The packed format]
// One blob holds one unit, so that one copy brings it. All numbers are little endian.
//
//   BlobHeader | TensorEntry x num_tensors | data of each tensor, in the order of the entries
//
// A tensor's data begins at a multiple of 256 bytes. A raw tensor's data are its bytes. Else, with
// n weights, G = ceil(n / 1024) groups and T = ceil(n / 4096) tiles, and each section beginning at
// a multiple of 16 bytes:
//
//   bytes           G x 1024 u8   sign (bit 7) and mantissa of each weight, in order
//   codes           e4p: G x 512 u8, e33: G x 96 u32; see below
//   escape_offsets  e33 only: (G + 1) u32, how many escapes lie before each group
//   escapes         e33 only: 3 bits each, from the low bit of each u32 on, and one u32 of zeros
//   patch_offsets   (T + 1) u32, how many patches lie before each tile
//   patches         u32 each: position in the tile (low half), bits of the weight (high half)
//
// e4p: the code of weight i is nibble i % 2 (0: low) of byte i / 2, an index into the palette.
//
// e33: word 32 j + l of a group (j < 3, l < 32) holds in nibble k the code of weight
// 256 j + 8 l + k in its low three bits. The fourth bits of these words carry the last quarter:
// bit j of the code of weight 768 + 8 l + k is bit 4 k + 3 of word 32 j + l. Codes 0 to 6 are
// indices into the palette. 7 says that the weight is an escape, whose exponent is entry 8 + c of
// the palette, with c the next three bits of `escapes`. Within a group the escapes are counted by
// l, then j, then k: all of lane 0 come before all of lane 1.
//
// A weight whose exponent lies in no palette has any code, and a patch. Weights beyond n, in the
// last group, are zero in all planes and no escapes (their code is 0).
//
// The layout follows from codec, size and the two counts alone, and tiles follow from sizes alone:
// what a launch needs is known before the copy, and the copy's size is the blob's.

namespace torch_offload {

constexpr std::uint64_t kBlobMagic = 0x44454B4341504F54;  // "TOPACKED"
constexpr std::uint32_t kBlobVersion = 3;

/// Where a tensor's data begins in the blob.
constexpr std::size_t kDataAlignmentBytes = 256;
constexpr std::size_t kSectionAlignmentBytes = 16;

constexpr std::uint32_t kNumPaletteEntries = 16;
/// e33: codes below are indices, this one is an escape.
constexpr std::uint32_t kEscapeCode = 7;
/// e33: where the exponents of the escapes begin in the palette.
constexpr std::uint32_t kEscapePalette = 8;
constexpr std::uint32_t kE33WordsPerGroup = kGroupWeights / 32 * 3;

struct BlobHeader {
  std::uint64_t magic = kBlobMagic;
  std::uint32_t version = kBlobVersion;
  std::uint32_t num_tensors = 0;
  std::uint64_t blob_bytes = 0;      ///< All of it.
  std::uint64_t unpacked_bytes = 0;  ///< Of the place.
  std::uint32_t num_tiles = 0;
  std::uint32_t reserved = 0;
  std::uint64_t checksum = 0;  ///< With zero in this field: Note [The checksum].
  std::uint64_t reserved2[2] = {0, 0};
};
static_assert(sizeof(BlobHeader) == 64, "the header is part of the format");

struct TensorEntry {
  Codec codec = Codec::kRaw;
  std::uint32_t first_tile = 0;    ///< Tiles of the tensors before.
  std::uint64_t place_offset = 0;  ///< In the place; a multiple of 16 bytes.
  std::uint64_t size_bytes = 0;    ///< Unpacked; not zero.
  std::uint64_t data_offset = 0;   ///< In the blob.
  std::uint32_t num_escapes = 0;
  std::uint32_t num_patches = 0;
  std::uint8_t palette[kNumPaletteEntries] = {};
  std::uint64_t reserved = 0;
};
static_assert(sizeof(TensorEntry) == 64, "an entry is part of the format");

/// Of one blob; more would not be decoded by one launch.
constexpr std::uint64_t kMaxTiles = UINT32_MAX / 2;
/// Of one entry, so that its counts fit; longer tensors are written as several entries.
constexpr std::uint64_t kMaxEntryWeights = std::uint64_t{1} << 30U;

/// Where the sections of one tensor begin, counted from its data; and how long that is.
struct Sections {
  std::uint64_t codes = 0;  ///< The plane of bytes begins at 0.
  std::uint64_t escape_offsets = 0;
  std::uint64_t escapes = 0;
  std::uint64_t patch_offsets = 0;
  std::uint64_t patches = 0;
  std::uint64_t size_bytes = 0;
};

constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t step) {
  return (value + step - 1) / step * step;
}

constexpr std::uint64_t num_groups_of(std::uint64_t num_weights) {
  return (num_weights + kGroupWeights - 1) / kGroupWeights;
}

constexpr std::uint64_t num_tiles_of(std::uint64_t size_bytes) {
  return (size_bytes + kTileBytes - 1) / kTileBytes;
}

/// 32-bit words that so many escapes take: three bits each, and one word more, so that two whole
/// words can be read from wherever an escape begins.
constexpr std::uint64_t num_escape_words(std::uint64_t num_escapes) {
  return (3 * num_escapes + 31) / 32 + 1;
}

constexpr Sections sections_of(Codec codec, std::uint64_t size_bytes, std::uint32_t num_escapes,
                               std::uint32_t num_patches) {
  Sections sections{};
  if (codec == Codec::kRaw) {
    sections.size_bytes = size_bytes;
    return sections;
  }
  const std::uint64_t num_groups = num_groups_of(size_bytes / 2);
  const std::uint64_t num_tiles = num_tiles_of(size_bytes);
  std::uint64_t end = num_groups * kGroupWeights;
  sections.codes = end;
  if (codec == Codec::kE33) {
    end += num_groups * kE33WordsPerGroup * 4;
    sections.escape_offsets = end;
    end = round_up(end + (num_groups + 1) * 4, kSectionAlignmentBytes);
    sections.escapes = end;
    end = round_up(end + num_escape_words(num_escapes) * 4, kSectionAlignmentBytes);
  } else {
    end += num_groups * (kGroupWeights / 2);
  }
  sections.patch_offsets = end;
  end = round_up(end + (num_tiles + 1) * 4, kSectionAlignmentBytes);
  sections.patches = end;
  sections.size_bytes = end + std::uint64_t{num_patches} * 4;
  return sections;
}

constexpr Sections sections_of(const TensorEntry& entry) {
  return sections_of(entry.codec, entry.size_bytes, entry.num_escapes, entry.num_patches);
}

}  // namespace torch_offload
