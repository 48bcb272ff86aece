#include "codec/encoder.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>

#include "codec/checksum.h"
#include "codec/chunk_writer.h"
#include "codec/exponents.h"
#include "codec/palette.h"
#include "codec/parallel.h"
#include "codec/words.h"
#include "core/error.h"

namespace torch_offload {

namespace {

constexpr std::uint64_t kTilesPerChunk = kCountedWeights / kTileWeights;
/// What one thread sums at a time of what no chunk has.
constexpr std::uint64_t kSummedBytes = std::uint64_t{1} << 18U;
static_assert(kSummedBytes % kSumBlockBytes == 0);

PaletteChoice smallest_for(const TensorEntry& entry, const TotalCounts& counts) {
  PaletteChoice best(Codec::kRaw, counts);
  std::uint64_t best_bytes = entry.size_bytes;
  for (const Codec codec : {Codec::kE4p, Codec::kE33}) {
    const PaletteChoice choice(codec, counts);
    const std::uint64_t size_bytes =
        sections_of(codec, entry.size_bytes, choice.num_escapes(counts), choice.num_patches(counts))
            .size_bytes;
    if (size_bytes < best_bytes) {
      best = choice;
      best_bytes = size_bytes;
    }
  }
  return best;
}

}  // namespace

UnitEncoder::UnitEncoder(const std::vector<TensorSource>& tensors, std::uint64_t unpacked_bytes,
                         const EncodeOptions& options)
    : options_(options) {
  std::uint64_t reached = 0;
  for (const TensorSource& tensor : tensors) {
    if (tensor.place_offset % kSectionAlignmentBytes != 0 || tensor.place_offset < reached ||
        tensor.place_offset > unpacked_bytes ||
        tensor.size_bytes > unpacked_bytes - tensor.place_offset) {
      throw ValueError(
          "expected tensors one behind the other in a place of " + std::to_string(unpacked_bytes) +
          " bytes, each at a multiple of " + std::to_string(kSectionAlignmentBytes) + ", got " +
          std::to_string(tensor.size_bytes) + " bytes at " + std::to_string(tensor.place_offset));
    }
    reached = tensor.place_offset + tensor.size_bytes;
    add(tensor);
  }
  header_.unpacked_bytes = unpacked_bytes;
  header_.num_tensors = static_cast<std::uint32_t>(entries_.size());

  std::vector<ExponentCounts> counts(chunks_.size());
  count(counts);
  std::size_t begin = 0;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const std::size_t num_chunks = (num_tiles_of(entries_[i].size_bytes) - 1) / kTilesPerChunk + 1;
    if (sources_[i].may_be_packed) {
      choose(entries_[i], counts.data() + begin, chunks_.data() + begin, num_chunks);
    }
    begin += num_chunks;
  }
  header_.blob_bytes = round_up(place_data(), kSectionAlignmentBytes);
}

/// Makes the entries of one tensor, and their chunks.
void UnitEncoder::add(const TensorSource& tensor) {
  check_internal(tensor.counts == nullptr || options_.max_entry_weights == kMaxEntryWeights,
                 "exponents counted by other pieces than those to be packed");
  // A piece but the last holds whole tiles, so that none is shared.
  const std::uint64_t piece_bytes =
      kTileBytes * std::max<std::uint64_t>(options_.max_entry_weights / kTileWeights, 1);
  for (std::uint64_t at = 0; at < tensor.size_bytes; at += piece_bytes) {
    TensorEntry entry;
    entry.place_offset = tensor.place_offset + at;
    entry.size_bytes = std::min(piece_bytes, tensor.size_bytes - at);
    Source source;
    source.bytes = tensor.bytes == nullptr ? nullptr : tensor.bytes + at;
    source.counted = tensor.counts == nullptr ? nullptr : tensor.counts + at / 2 / kCountedWeights;
    source.may_be_packed = tensor.type == ElementType::kBf16 && tensor.size_bytes % 2 == 0 &&
                           options_.codec != Codec::kRaw;
    const std::uint64_t num_tiles = num_tiles_of(entry.size_bytes);
    for (std::uint64_t tile = 0; tile < num_tiles; tile += kTilesPerChunk) {
      Chunk chunk;
      chunk.entry = entries_.size();
      chunk.first_tile = tile;
      chunk.num_tiles = std::min(kTilesPerChunk, num_tiles - tile);
      chunks_.push_back(chunk);
    }
    entries_.push_back(entry);
    sources_.push_back(source);
  }
}

/// All chunks of all tensors that may be packed, unless it was done.
void UnitEncoder::count(std::vector<ExponentCounts>& counts) const {
  std::vector<std::size_t> not_counted;
  for (std::size_t index = 0; index < chunks_.size(); ++index) {
    const Source& source = sources_[chunks_[index].entry];
    if (!source.may_be_packed) {
      continue;
    }
    if (source.counted != nullptr) {
      counts[index] = source.counted[chunks_[index].first_tile / kTilesPerChunk];
    } else {
      not_counted.push_back(index);
    }
  }
  parallel_for(not_counted.size(), options_.num_threads, [&](std::size_t number) {
    const std::size_t index = not_counted[number];
    const Chunk& chunk = chunks_[index];
    const std::uint64_t first = chunk.first_tile * kTileWeights;
    count_exponents(sources_[chunk.entry].bytes + 2 * first,
                    std::min(kCountedWeights, entries_[chunk.entry].size_bytes / 2 - first),
                    counts[index]);
  });
}

/// Takes the codec that makes the entry smallest, or the one that was asked for.
void UnitEncoder::choose(TensorEntry& entry, const ExponentCounts* counts, Chunk* chunks,
                         std::size_t num_chunks) const {
  TotalCounts total{};
  for (std::size_t chunk = 0; chunk < num_chunks; ++chunk) {
    for (std::size_t i = 0; i < kNumExponents; ++i) {
      total[i] += counts[chunk][i];
    }
  }
  const PaletteChoice choice =
      options_.codec ? PaletteChoice(*options_.codec, total) : smallest_for(entry, total);
  entry.codec = choice.codec();
  std::copy(choice.palette().begin(), choice.palette().end(), std::begin(entry.palette));
  for (std::size_t i = 0; i < num_chunks; ++i) {
    Chunk& chunk = chunks[i];
    chunk.first_escape = entry.num_escapes;
    chunk.num_escapes = choice.num_escapes(counts[i]);
    entry.num_escapes += chunk.num_escapes;
    chunk.first_patch = entry.num_patches;
    chunk.num_patches = choice.num_patches(counts[i]);
    entry.num_patches += chunk.num_patches;
  }
}

/// Gives each entry its tiles and its place in the blob; returns where the last one ends.
std::uint64_t UnitEncoder::place_data() {
  std::uint64_t end = sizeof(BlobHeader) + entries_.size() * sizeof(TensorEntry);
  std::uint64_t num_tiles = 0;
  for (TensorEntry& entry : entries_) {
    entry.first_tile = static_cast<std::uint32_t>(num_tiles);
    entry.data_offset = round_up(end, kDataAlignmentBytes);
    end = entry.data_offset + sections_of(entry).size_bytes;
    num_tiles += num_tiles_of(entry.size_bytes);
    if (num_tiles > kMaxTiles) {
      throw ValueError("expected a unit of at most " + std::to_string(kMaxTiles * kTileBytes) +
                       " bytes, got more; divide it with granularity='module'");
    }
  }
  header_.num_tiles = static_cast<std::uint32_t>(num_tiles);
  return end;
}

void UnitEncoder::encode(std::byte* blob) const {
  std::memset(blob, 0, sizeof(BlobHeader));  // no valid blob until all is written
  write_rest(blob);
  std::vector<WrittenChunk> written(chunks_.size());
  parallel_for(chunks_.size(), options_.num_threads, [&](std::size_t index) {
    const Chunk& chunk = chunks_[index];
    written[index] = write_chunk(entries_[chunk.entry], chunk, sources_[chunk.entry].bytes, blob);
  });
  join_escapes(blob, written);
  BlobHeader header = header_;
  std::memcpy(blob, &header, sizeof(header));
  std::uint64_t sum = sum_rest(blob);
  for (const WrittenChunk& chunk : written) {
    sum += chunk.sum;
  }
  header.checksum = checksum_of_sum(sum, header.blob_bytes);
  std::memcpy(blob, &header, sizeof(header));
}

/// Writes the table and what lies between and behind the parts of the chunks.
void UnitEncoder::write_rest(std::byte* blob) const {
  std::uint64_t end = sizeof(BlobHeader);
  if (!entries_.empty()) {
    std::memcpy(blob + end, entries_.data(), entries_.size() * sizeof(TensorEntry));
    end += entries_.size() * sizeof(TensorEntry);
  }
  for (const TensorEntry& entry : entries_) {
    std::memset(blob + end, 0, entry.data_offset - end);
    std::byte* const data = blob + entry.data_offset;
    const Sections sections = sections_of(entry);
    end = entry.data_offset + sections.size_bytes;
    if (entry.codec == Codec::kRaw) {
      continue;
    }
    if (entry.codec == Codec::kE33) {
      const std::uint64_t offsets_end =
          sections.escape_offsets + num_groups_of(entry.size_bytes / 2) * 4;
      store_word(data + offsets_end, entry.num_escapes);
      std::memset(data + offsets_end + 4, 0, sections.escapes - offsets_end - 4);
      const std::uint64_t last_block = escape_block_offset(entry, entry.num_escapes);
      std::memset(blob + last_block, 0, entry.data_offset + sections.patch_offsets - last_block);
    }
    const std::uint64_t offsets_end = sections.patch_offsets + num_tiles_of(entry.size_bytes) * 4;
    store_word(data + offsets_end, entry.num_patches);
    std::memset(data + offsets_end + 4, 0, sections.patches - offsets_end - 4);
  }
  std::memset(blob + end, 0, header_.blob_bytes - end);
  for (const Chunk& chunk : chunks_) {  // what several chunks will add to
    const TensorEntry& entry = entries_[chunk.entry];
    if (chunk.first_escape % kEscapeBlock != 0 &&
        chunk.first_escape / kEscapeBlock != entry.num_escapes / kEscapeBlock) {
      std::memset(blob + escape_block_offset(entry, chunk.first_escape), 0, sizeof(EscapeWords));
    }
  }
}

/// Adds what chunks have of blocks of escapes that those before them have begun.
void UnitEncoder::join_escapes(std::byte* blob, const std::vector<WrittenChunk>& written) const {
  for (std::size_t index = 0; index < chunks_.size(); ++index) {
    const Chunk& chunk = chunks_[index];
    for (std::size_t i = 0; i < written[index].shared.size(); ++i) {
      if (const std::uint32_t word = written[index].shared[i]; word != 0) {
        std::byte* const at =
            blob + escape_block_offset(entries_[chunk.entry], chunk.first_escape) + 4 * i;
        store_word(at, load_word(at) | word);
      }
    }
  }
}

/// The blocks of the checksum that no chunk has summed, in parts for one thread each.
std::vector<UnitEncoder::Range> UnitEncoder::not_summed() const {
  std::vector<Range> ranges;
  const auto add = [&](std::uint64_t begin, std::uint64_t end) {
    for (; begin < end; begin += kSummedBytes) {
      ranges.push_back({begin, std::min(begin + kSummedBytes, end)});
    }
  };
  std::uint64_t begin = 0;
  for (const TensorEntry& entry : entries_) {
    add(begin, entry.data_offset);
    begin = entry.data_offset + summed_bytes(entry);
  }
  add(begin, header_.blob_bytes);
  return ranges;
}

std::uint64_t UnitEncoder::sum_rest(const std::byte* blob) const {
  const std::vector<Range> ranges = not_summed();
  std::uint64_t size_bytes = 0;
  for (const auto [begin, end] : ranges) {
    size_bytes += end - begin;
  }
  // Most ranges are small, and a thread that is started must be worth it.
  const auto num_threads = static_cast<unsigned>(
      std::min<std::uint64_t>(options_.num_threads, size_bytes / kSummedBytes));
  std::vector<std::uint64_t> sums(ranges.size());
  parallel_for(ranges.size(), num_threads, [&](std::size_t index) {
    const auto [begin, end] = ranges[index];
    sums[index] = sum_of_blocks(blob + begin, end - begin, begin / kSumBlockBytes);
  });
  return std::accumulate(sums.begin(), sums.end(), std::uint64_t{0});
}

}  // namespace torch_offload
