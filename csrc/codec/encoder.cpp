#include "codec/encoder.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <utility>

#include "codec/checksum.h"
#include "codec/parallel.h"
#include "codec/words.h"
#include "core/error.h"

namespace torch_offload {

namespace {

constexpr std::uint64_t kRawChunkBytes = std::uint64_t{4} << 20U;
constexpr std::uint32_t kNumKnown = kEscapeCode + kNumPaletteEntries - kEscapePalette;  // e33

/// The exponents, the commonest first.
std::array<std::uint8_t, kNumExponents> by_frequency(
    const std::array<std::uint64_t, kNumExponents>& counts) {
  std::array<std::uint8_t, kNumExponents> order{};
  std::iota(order.begin(), order.end(), std::uint8_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::uint8_t left, std::uint8_t right) {
    return counts[left] > counts[right];
  });
  return order;
}

Palette palette_of(Codec codec, const std::array<std::uint8_t, kNumExponents>& order) {
  Palette palette{};
  if (codec == Codec::kE4p) {
    std::copy_n(order.begin(), kNumPaletteEntries, palette.begin());
  } else if (codec == Codec::kE33) {
    std::copy_n(order.begin(), kEscapeCode, palette.begin());
    std::copy_n(order.begin() + kEscapeCode, kNumKnown - kEscapeCode,
                palette.begin() + kEscapePalette);
  }
  return palette;
}

/// How many weights have none of the first `num_known` exponents.
template <typename Counts>
std::uint64_t num_others(const Counts& counts, const std::array<std::uint8_t, kNumExponents>& order,
                         std::uint32_t num_known) {
  std::uint64_t others = 0;
  for (std::uint32_t rank = num_known; rank < kNumExponents; ++rank) {
    others += counts[order[rank]];
  }
  return others;
}

template <typename Counts>
std::uint32_t count_escapes(Codec codec, const Counts& counts,
                            const std::array<std::uint8_t, kNumExponents>& order) {
  return codec == Codec::kE33 ? static_cast<std::uint32_t>(num_others(counts, order, kEscapeCode))
                              : 0;
}

template <typename Counts>
std::uint32_t count_patches(Codec codec, const Counts& counts,
                            const std::array<std::uint8_t, kNumExponents>& order) {
  const std::uint32_t num_known = codec == Codec::kE33 ? kNumKnown : kNumPaletteEntries;
  return codec == Codec::kRaw ? 0
                              : static_cast<std::uint32_t>(num_others(counts, order, num_known));
}

[[noreturn]] void refuse_changed() {
  throw StateError(
      "expected the weights to stay as they are while they are packed, got others on the second "
      "reading; edit weights between forwards and from one thread");
}

}  // namespace

/// Writes one chunk. Its escapes may begin within a word that the chunk before has begun: that part
/// is left to whoever joins the chunks.
class UnitEncoder::ChunkWriter {
 public:
  ChunkWriter(const TensorEntry& entry, const Chunk& chunk, const std::byte* source,
              std::byte* data)
      : entry_(entry),
        chunk_(chunk),
        source_(source),
        data_(data),
        sections_(sections_of(entry.codec, entry.size_bytes, entry.num_escapes, entry.num_patches)),
        escape_(chunk.first_escape),
        patch_(chunk.first_patch),
        word_(std::uint64_t{3} * chunk.first_escape / 32),
        num_bits_(static_cast<std::uint32_t>(std::uint64_t{3} * chunk.first_escape % 32)),
        is_first_word_shared_(num_bits_ != 0) {
    std::copy(std::begin(entry.palette), std::end(entry.palette), palette_.begin());
    second_.fill(kUnknown);
    if (entry.codec == Codec::kE33) {
      for (std::uint8_t code = 0; code < kNumPaletteEntries - kEscapePalette; ++code) {
        second_[palette_[kEscapePalette + code]] = code;
      }
    } else {
      for (const std::uint8_t exponent : palette_) {
        second_[exponent] = 0;
      }
    }
  }

  /// Returns what belongs into the word that the chunk before has begun.
  std::uint32_t write() {
    GroupWeights weights{};
    GroupBytes bytes;
    for (std::uint64_t at = 0; at < chunk_.num_weights; at += kGroupWeights) {
      const std::uint64_t first = chunk_.first_weight + at;
      const auto here = static_cast<std::uint32_t>(
          std::min<std::uint64_t>(kGroupWeights, chunk_.num_weights - at));
      weights.fill(0);
      std::memcpy(weights.data(), source_ + 2 * first, std::size_t{2} * here);
      split_bytes(weights, bytes);
      std::memcpy(data_ + first, bytes.data(), bytes.size());
      if (first % kTileWeights == 0) {
        store_word(data_ + sections_.patch_offsets + first / kTileWeights * 4, patch_);
      }
      if (entry_.codec == Codec::kE33) {
        write_e33(weights, first, here);
      } else {
        write_e4p(weights, first, here);
      }
    }
    if (escape_ != chunk_.first_escape + chunk_.num_escapes ||
        patch_ != chunk_.first_patch + chunk_.num_patches) {
      refuse_changed();
    }
    if (num_bits_ != 0) {
      flush();
    }
    return shared_;
  }

 private:
  static constexpr std::uint8_t kUnknown = 0xFF;

  void write_e4p(const GroupWeights& weights, std::uint64_t first, std::uint32_t num_weights) {
    E4pCodes codes;
    encode_e4p(weights, num_weights, palette_, codes);
    std::memcpy(data_ + sections_.codes + first / 2, codes.data(), codes.size());
    for (std::uint32_t i = 0; i < num_weights; ++i) {
      if (second_[exponent_of(weights[i])] == kUnknown) {
        add_patch(first + i, weights[i]);
      }
    }
  }

  void write_e33(const GroupWeights& weights, std::uint64_t first, std::uint32_t num_weights) {
    E33Codes codes;
    encode_e33(weights, num_weights, palette_, codes);
    const std::uint64_t group = first / kGroupWeights;
    std::memcpy(data_ + sections_.codes + group * sizeof(codes), codes.data(), sizeof(codes));
    store_word(data_ + sections_.escape_offsets + group * 4, escape_);
    for_each_escape(codes, [&](std::uint32_t position) {
      const std::uint8_t code = second_[exponent_of(weights[position])];
      add_escape(code == kUnknown ? 0 : code);
      if (code == kUnknown) {
        add_patch(first + position, weights[position]);
      }
    });
  }

  void add_patch(std::uint64_t position, std::uint16_t weight) {
    if (patch_ == chunk_.first_patch + chunk_.num_patches) {
      refuse_changed();
    }
    const auto in_tile = static_cast<std::uint32_t>(position % kTileWeights);
    store_word(data_ + sections_.patches + std::uint64_t{patch_} * 4,
               in_tile | (std::uint32_t{weight} << 16U));
    ++patch_;
  }

  void add_escape(std::uint32_t code) {
    if (escape_ == chunk_.first_escape + chunk_.num_escapes) {
      refuse_changed();
    }
    ++escape_;
    bits_ |= std::uint64_t{code} << num_bits_;
    num_bits_ += 3;
    if (num_bits_ >= 32) {
      flush();
      num_bits_ -= 32;
    }
  }

  void flush() {
    const auto word = static_cast<std::uint32_t>(bits_);
    if (is_first_word_shared_) {
      shared_ = word;
      is_first_word_shared_ = false;
    } else {
      store_word(data_ + sections_.escapes + word_ * 4, word);
    }
    bits_ >>= 32U;
    ++word_;
  }

  const TensorEntry& entry_;
  const Chunk& chunk_;
  const std::byte* source_;
  std::byte* data_;
  Sections sections_;
  Palette palette_{};
  std::array<std::uint8_t, kNumExponents> second_;  // e33: codes of escapes. e4p: 0 if known.
  std::uint32_t escape_;                            // number of the next one
  std::uint32_t patch_;
  std::uint64_t word_;      // where the next escapes go
  std::uint64_t bits_ = 0;  // not yet written; those of the chunk before are zero
  std::uint32_t num_bits_;
  bool is_first_word_shared_;
  std::uint32_t shared_ = 0;
};

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

  // Count all chunks of all tensors that may be packed, unless it was done, then choose a codec for
  // each.
  std::vector<ExponentCounts> counts(chunks_.size());
  parallel_for(chunks_.size(), options_.num_threads, [&](std::size_t index) {
    const Chunk& chunk = chunks_[index];
    if (const ExponentCounts* counted = counted_[chunk.entry]) {
      counts[index] = counted[chunk.first_weight / kCountedWeights];
    } else {
      count_exponents(sources_[chunk.entry] + 2 * chunk.first_weight, chunk.num_weights,
                      counts[index]);
    }
  });
  std::uint64_t end = sizeof(BlobHeader) + entries_.size() * sizeof(TensorEntry);
  std::uint64_t num_tiles = 0;
  std::size_t chunk = 0;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    TensorEntry& entry = entries_[i];
    const std::size_t first_chunk = chunk;
    while (chunk < chunks_.size() && chunks_[chunk].entry == i) {
      ++chunk;
    }
    if (chunk != first_chunk) {
      choose(i, first_chunk, counts);
    }
    entry.first_tile = static_cast<std::uint32_t>(num_tiles);
    num_tiles += num_tiles_of(entry.size_bytes);
    entry.data_offset = round_up(end, kDataAlignmentBytes);
    end =
        entry.data_offset +
        sections_of(entry.codec, entry.size_bytes, entry.num_escapes, entry.num_patches).size_bytes;
    if (num_tiles > kMaxTiles) {
      throw ValueError("expected a unit of at most " + std::to_string(kMaxTiles * kTileBytes) +
                       " bytes, got more; divide it with granularity='module'");
    }
  }
  chunks_.erase(
      std::remove_if(chunks_.begin(), chunks_.end(),
                     [&](const Chunk& one) { return entries_[one.entry].codec == Codec::kRaw; }),
      chunks_.end());
  header_.num_tiles = static_cast<std::uint32_t>(num_tiles);
  header_.blob_bytes = round_up(end, kSectionAlignmentBytes);
}

/// Makes the entries of one tensor, and the chunks to count where it may be packed.
void UnitEncoder::add(const TensorSource& tensor) {
  const bool may_be_packed = tensor.type == ElementType::kBf16 && tensor.size_bytes % 2 == 0 &&
                             options_.codec != Codec::kRaw;
  check_internal(tensor.counts == nullptr || options_.max_entry_weights == kMaxEntryWeights,
                 "exponents counted by other pieces than those to be packed");
  // A piece but the last holds whole tiles, so that none is shared.
  const std::uint64_t piece_bytes =
      2 * std::max<std::uint64_t>(options_.max_entry_weights / kTileWeights, 1) * kTileWeights;
  for (std::uint64_t at = 0; at < tensor.size_bytes; at += piece_bytes) {
    TensorEntry entry;
    entry.place_offset = tensor.place_offset + at;
    entry.size_bytes = std::min(piece_bytes, tensor.size_bytes - at);
    entries_.push_back(entry);
    // Without bytes only sizes are asked for.
    sources_.push_back(tensor.bytes == nullptr ? nullptr : tensor.bytes + at);
    counted_.push_back(tensor.counts == nullptr ? nullptr
                                                : tensor.counts + at / 2 / kCountedWeights);
    const std::uint64_t num_weights = may_be_packed ? entry.size_bytes / 2 : 0;
    for (std::uint64_t first = 0; first < num_weights; first += kCountedWeights) {
      Chunk chunk;
      chunk.entry = entries_.size() - 1;
      chunk.first_weight = first;
      chunk.num_weights = std::min(kCountedWeights, num_weights - first);
      chunks_.push_back(chunk);
    }
  }
}

/// Takes the codec that makes the entry smallest, or the one that was asked for.
void UnitEncoder::choose(std::size_t entry_index, std::size_t first_chunk,
                         const std::vector<ExponentCounts>& counts) {
  std::array<std::uint64_t, kNumExponents> total{};
  std::size_t end = first_chunk;
  for (; end < chunks_.size() && chunks_[end].entry == entry_index; ++end) {
    for (std::size_t i = 0; i < kNumExponents; ++i) {
      total[i] += counts[end][i];
    }
  }
  const auto order = by_frequency(total);
  TensorEntry& entry = entries_[entry_index];
  const auto size_with = [&](Codec codec) {
    return sections_of(codec, entry.size_bytes, count_escapes(codec, total, order),
                       count_patches(codec, total, order))
        .size_bytes;
  };
  if (options_.codec) {
    entry.codec = *options_.codec;
  } else {
    for (const Codec codec : {Codec::kE4p, Codec::kE33}) {
      entry.codec = size_with(codec) < size_with(entry.codec) ? codec : entry.codec;
    }
  }
  entry.num_escapes = count_escapes(entry.codec, total, order);
  entry.num_patches = count_patches(entry.codec, total, order);
  const Palette palette = palette_of(entry.codec, order);
  std::copy(palette.begin(), palette.end(), std::begin(entry.palette));
  std::uint32_t escape = 0;
  std::uint32_t patch = 0;
  for (std::size_t i = first_chunk; i < end; ++i) {
    Chunk& chunk = chunks_[i];
    chunk.first_escape = escape;
    chunk.num_escapes = count_escapes(entry.codec, counts[i], order);
    escape += chunk.num_escapes;
    chunk.first_patch = patch;
    chunk.num_patches = count_patches(entry.codec, counts[i], order);
    patch += chunk.num_patches;
  }
}

void UnitEncoder::encode(std::byte* blob) const {
  BlobHeader header = header_;
  std::memset(blob, 0, sizeof(header));  // no valid blob until all is written
  if (!entries_.empty()) {
    std::memcpy(blob + sizeof(header), entries_.data(), entries_.size() * sizeof(TensorEntry));
  }
  std::uint64_t end = sizeof(header) + entries_.size() * sizeof(TensorEntry);
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const TensorEntry& entry = entries_[i];
    std::memset(blob + end, 0, entry.data_offset - end);
    std::byte* const data = blob + entry.data_offset;
    const Sections sections =
        sections_of(entry.codec, entry.size_bytes, entry.num_escapes, entry.num_patches);
    end = entry.data_offset + sections.size_bytes;
    if (entry.codec == Codec::kRaw) {
      copy_raw(blob, i);
      continue;
    }
    if (entry.codec == Codec::kE33) {
      const std::uint64_t offsets_end =
          sections.escape_offsets + num_groups_of(entry.size_bytes / 2) * 4;
      store_word(data + offsets_end, entry.num_escapes);
      std::memset(data + offsets_end + 4, 0, sections.escapes - offsets_end - 4);
      // The word that two chunks share, and those behind the last escape.
      const std::uint64_t last_word = std::uint64_t{3} * entry.num_escapes / 32;
      const std::uint64_t tail = sections.escapes + last_word * 4;
      std::memset(data + tail, 0, sections.patch_offsets - tail);
    }
    const std::uint64_t offsets_end = sections.patch_offsets + num_tiles_of(entry.size_bytes) * 4;
    store_word(data + offsets_end, entry.num_patches);
    std::memset(data + offsets_end + 4, 0, sections.patches - offsets_end - 4);
  }
  std::memset(blob + end, 0, header.blob_bytes - end);

  std::vector<std::uint32_t> shared(chunks_.size());
  parallel_for(chunks_.size(), options_.num_threads, [&](std::size_t index) {
    const Chunk& chunk = chunks_[index];
    const TensorEntry& entry = entries_[chunk.entry];
    shared[index] =
        ChunkWriter(entry, chunk, sources_[chunk.entry], blob + entry.data_offset).write();
  });
  for (std::size_t index = 0; index < chunks_.size(); ++index) {
    if (shared[index] != 0) {
      const Chunk& chunk = chunks_[index];
      const TensorEntry& entry = entries_[chunk.entry];
      const Sections sections =
          sections_of(entry.codec, entry.size_bytes, entry.num_escapes, entry.num_patches);
      std::byte* const at = blob + entry.data_offset + sections.escapes +
                            std::uint64_t{3} * chunk.first_escape / 32 * 4;
      store_word(at, load_word(at) | shared[index]);
    }
  }
  std::memcpy(blob, &header, sizeof(header));
  header.checksum = blob_checksum(blob, header.blob_bytes, options_.num_threads);
  std::memcpy(blob, &header, sizeof(header));
}

void UnitEncoder::copy_raw(std::byte* blob, std::size_t entry_index) const {
  const TensorEntry& entry = entries_[entry_index];
  const std::uint64_t num_chunks = (entry.size_bytes + kRawChunkBytes - 1) / kRawChunkBytes;
  parallel_for(num_chunks, options_.num_threads, [&](std::size_t chunk) {
    const std::uint64_t begin = chunk * kRawChunkBytes;
    std::memcpy(blob + entry.data_offset + begin, sources_[entry_index] + begin,
                std::min(kRawChunkBytes, entry.size_bytes - begin));
  });
}

}  // namespace torch_offload
