#include "codec/blob.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "codec/checksum.h"
#include "codec/group.h"
#include "codec/parallel.h"
#include "codec/words.h"
#include "core/error.h"

namespace torch_offload {

namespace {

[[noreturn]] void refuse_damaged(const std::string& expected) {
  throw ValueError("expected a packed unit with " + expected +
                   ", got one that is damaged; pack the weights again");
}

void expect(bool condition, const char* expected) {
  if (!condition) {
    refuse_damaged(expected);
  }
}

BlobHeader checked_header(const std::byte* bytes, std::uint64_t size_bytes,
                          std::uint64_t place_bytes) {
  BlobHeader header;
  if (size_bytes < sizeof(header)) {
    throw ValueError("expected a packed unit of at least " + std::to_string(sizeof(header)) +
                     " bytes, got " + std::to_string(size_bytes) + "; pack the weights again");
  }
  std::memcpy(&header, bytes, sizeof(header));
  expect(header.magic == kBlobMagic, "its magic number");
  if (header.version != kBlobVersion) {
    throw NotImplementedError("expected a packed unit of format version " +
                              std::to_string(kBlobVersion) + ", got version " +
                              std::to_string(header.version) +
                              "; pack the weights again with this release");
  }
  if (header.blob_bytes != size_bytes) {
    throw ValueError("expected a packed unit of " + std::to_string(header.blob_bytes) +
                     " bytes, as its header says, got " + std::to_string(size_bytes) +
                     "; it was cut off or put together wrongly: pack the weights again");
  }
  if (header.unpacked_bytes != place_bytes) {
    throw ValueError("expected a packed unit for a place of " + std::to_string(place_bytes) +
                     " bytes, got one for " + std::to_string(header.unpacked_bytes) +
                     "; it belongs to another unit");
  }
  expect(header.num_tensors <= (size_bytes - sizeof(header)) / sizeof(TensorEntry),
         "a table within it");
  return header;
}

/// Walks the table: everything that the layout of the data follows from.
void check_table(const BlobHeader& header, const std::vector<TensorEntry>& entries) {
  std::uint64_t data_end = sizeof(header) + entries.size() * sizeof(TensorEntry);
  std::uint64_t place_end = 0;
  std::uint64_t num_tiles = 0;
  for (const TensorEntry& entry : entries) {
    const auto codec = static_cast<std::uint32_t>(entry.codec);
    if (codec >= kNumCodecs) {
      throw NotImplementedError(
          "expected a codec that this release knows (0 raw, 1 e4p, 2 e33), got number " +
          std::to_string(codec) + "; pack the weights again with this release");
    }
    const bool is_packed = entry.codec != Codec::kRaw;
    expect(entry.size_bytes > 0 && entry.place_offset >= place_end &&
               entry.place_offset % kSectionAlignmentBytes == 0 &&
               entry.place_offset <= header.unpacked_bytes &&
               entry.size_bytes <= header.unpacked_bytes - entry.place_offset,
           "tensors within its place");
    expect(entry.first_tile == num_tiles, "tiles counted in order");
    expect(!is_packed || (entry.size_bytes % 2 == 0 && entry.size_bytes / 2 <= kMaxEntryWeights &&
                          entry.num_escapes <= entry.size_bytes / 2 &&
                          entry.num_patches <= entry.size_bytes / 2),
           "counts that a tensor can have");
    expect(entry.data_offset >= data_end && entry.data_offset % kDataAlignmentBytes == 0 &&
               entry.data_offset <= header.blob_bytes &&
               sections_of(entry).size_bytes <= header.blob_bytes - entry.data_offset,
           "data within it");
    data_end = entry.data_offset + sections_of(entry).size_bytes;
    place_end = entry.place_offset + entry.size_bytes;
    num_tiles += num_tiles_of(entry.size_bytes);
    expect(num_tiles <= kMaxTiles, "fewer tiles");
  }
  expect(header.num_tiles == num_tiles, "as many tiles as its tensors have");
}

/// The escapes of one group begin and end where the offsets say.
void check_escapes(const std::byte* data, const Sections& sections, std::uint64_t group,
                   std::uint32_t num_escapes) {
  E33Codes codes;
  std::memcpy(codes.data(), data + sections.codes + group * sizeof(codes), sizeof(codes));
  const std::uint32_t begin = load_word(data + sections.escape_offsets + group * 4);
  const std::uint32_t end = load_word(data + sections.escape_offsets + group * 4 + 4);
  expect(begin <= end && end <= num_escapes && end - begin == num_escapes_in(codes),
         "as many escapes as its codes ask for");
}

void check_patches(const std::byte* data, const Sections& sections, std::uint64_t tile,
                   std::uint64_t num_weights, std::uint32_t num_patches) {
  const std::uint32_t begin = load_word(data + sections.patch_offsets + tile * 4);
  const std::uint32_t end = load_word(data + sections.patch_offsets + tile * 4 + 4);
  expect(begin <= end && end <= num_patches, "patches counted in order");
  const std::uint64_t here =
      std::min<std::uint64_t>(kTileWeights, num_weights - tile * kTileWeights);
  for (std::uint64_t patch = begin; patch < end; ++patch) {
    expect((load_word(data + sections.patches + patch * 4) & 0xFFFFU) < here,
           "patches within their tile");
  }
}

}  // namespace

BlobHeader BlobView::header_of(const std::byte* bytes, std::uint64_t size_bytes,
                               std::uint64_t place_bytes) {
  return checked_header(bytes, size_bytes, place_bytes);
}

BlobView BlobView::checked(const std::byte* bytes, std::uint64_t size_bytes,
                           std::uint64_t place_bytes, unsigned num_threads) {
  BlobView view;
  view.bytes_ = bytes;
  view.header_ = checked_header(bytes, size_bytes, place_bytes);
  if (view.header_.checksum != blob_checksum(bytes, size_bytes, num_threads)) {
    refuse_damaged("the checksum that its header says");
  }
  view.entries_.resize(view.header_.num_tensors);
  if (!view.entries_.empty()) {
    std::memcpy(view.entries_.data(), bytes + sizeof(BlobHeader),
                view.entries_.size() * sizeof(TensorEntry));
  }
  check_table(view.header_, view.entries_);
  for (const TensorEntry& entry : view.entries_) {
    if (entry.codec == Codec::kRaw) {
      continue;
    }
    const Sections sections = sections_of(entry);
    const std::byte* const data = bytes + entry.data_offset;
    const std::uint64_t num_groups = num_groups_of(entry.size_bytes / 2);
    parallel_for(num_tiles_of(entry.size_bytes), num_threads, [&](std::size_t tile) {
      check_patches(data, sections, tile, entry.size_bytes / 2, entry.num_patches);
      const std::uint64_t end = std::min<std::uint64_t>((tile + 1) * kGroupsPerTile, num_groups);
      for (std::uint64_t group = tile * kGroupsPerTile; entry.codec == Codec::kE33 && group < end;
           ++group) {
        check_escapes(data, sections, group, entry.num_escapes);
      }
    });
  }
  return view;
}

}  // namespace torch_offload
