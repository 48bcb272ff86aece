#include "codec/chunk_writer.h"

#include <algorithm>
#include <cstring>

#include "codec/checksum.h"
#include "codec/escape_writer.h"
#include "codec/words.h"
#include "core/error.h"

namespace torch_offload {

namespace {

static_assert(kDataAlignmentBytes % kSumBlockBytes == 0, "data begin with a block");
static_assert(kGroupWeights % kSumBlockBytes == 0, "a group's bytes are whole blocks");
static_assert(std::size_t{kGroupsPerTile} * kE33WordsPerGroup * 4 % kSumBlockBytes == 0,
              "a tile's codes are whole blocks");

constexpr std::uint64_t whole_blocks(std::uint64_t size_bytes) {
  return size_bytes / kSumBlockBytes * kSumBlockBytes;
}

std::uint32_t code_bytes_of(Codec codec) {  // of a group
  return codec == Codec::kE33 ? kE33WordsPerGroup * 4 : kGroupWeights / 2;
}

[[noreturn]] void refuse_changed() {
  throw StateError(
      "expected the weights to stay as they are while they are packed, got others on the second "
      "reading; edit weights between forwards and from one thread");
}

class PackedChunkWriter {
 public:
  PackedChunkWriter(const TensorEntry& entry, const Chunk& chunk, const std::byte* source,
                    std::byte* blob)
      : codec_(entry.codec),
        chunk_(chunk),
        source_(source),
        num_weights_(entry.size_bytes / 2),
        data_(blob + entry.data_offset),
        first_block_(entry.data_offset / kSumBlockBytes),
        sections_(sections_of(entry)),
        escapes_(blob + escape_block_offset(entry, chunk.first_escape), chunk.first_escape),
        escape_(chunk.first_escape),
        patch_(chunk.first_patch) {
    if (codec_ == Codec::kE4p) {
      codes_ = CodeTable(entry.palette, kNumPaletteEntries, kNoCode);
      return;
    }
    codes_ = CodeTable(entry.palette, kEscapeCode, kEscapeCode);
    escape_codes_.fill(kNoCode);
    for (std::uint8_t code = 0; code < kNumPaletteEntries - kEscapePalette; ++code) {
      escape_codes_[entry.palette[kEscapePalette + code]] = code;
    }
  }

  WrittenChunk write() {
    for (std::uint64_t tile = chunk_.first_tile; tile < chunk_.first_tile + chunk_.num_tiles;
         ++tile) {
      store_word(data_ + sections_.patch_offsets + tile * 4, patch_);
      const std::uint64_t end = std::min((tile + 1) * kGroupsPerTile, num_groups_of(num_weights_));
      for (std::uint64_t group = tile * kGroupsPerTile; group < end; ++group) {
        write_group(group);
      }
      sum_groups(tile * kGroupsPerTile, end);
    }
    if (escape_ != chunk_.first_escape + chunk_.num_escapes ||
        patch_ != chunk_.first_patch + chunk_.num_patches) {
      refuse_changed();
    }
    if (codec_ == Codec::kE33) {
      written_.shared = escapes_.finish();
    }
    return written_;
  }

 private:
  void write_group(std::uint64_t group) {
    const std::uint64_t first = group * kGroupWeights;
    const auto here =
        static_cast<std::size_t>(std::min<std::uint64_t>(kGroupWeights, num_weights_ - first));
    std::memcpy(group_.weights.data(), source_ + 2 * first, 2 * here);
    if (codec_ == Codec::kE33) {
      write_e33(group, here);
    } else {
      write_e4p(group, here);
    }
    std::memcpy(data_ + first, group_.bytes.data(), sizeof(group_.bytes));
  }

  void write_e4p(std::uint64_t group, std::size_t num_weights) {
    E4pCodes nibbles;
    if (encode_e4p(codes_, num_weights, group_, nibbles)) {
      for (std::uint32_t position = 0; position < kGroupWeights; ++position) {
        if (group_.codes[position] == kNoCode) {
          add_patch(group, position);
        }
      }
    }
    std::memcpy(data_ + sections_.codes + group * sizeof(nibbles), nibbles.data(), sizeof(nibbles));
  }

  void write_e33(std::uint64_t group, std::size_t num_weights) {
    E33Codes words;
    EscapeMasks masks;
    encode_e33(codes_, num_weights, group_, words, masks);
    std::memcpy(data_ + sections_.codes + group * sizeof(words), words.data(), sizeof(words));
    store_word(data_ + sections_.escape_offsets + group * 4, escape_);
    std::uint8_t* const found = escapes_.next();
    const std::uint32_t count = gather_escapes(masks, group_.exponents, escape_codes_, found);
    if (count > chunk_.first_escape + chunk_.num_escapes - escape_) {
      refuse_changed();
    }
    if (std::find(found, found + count, kNoCode) != found + count) {
      for_each_escape(masks, [&](std::uint32_t position) {
        if (escape_codes_[group_.exponents[position]] == kNoCode) {
          add_patch(group, position);
        }
      });
    }
    escapes_.add(count);
    escape_ += count;
  }

  void add_patch(std::uint64_t group, std::uint32_t position) {
    if (patch_ == chunk_.first_patch + chunk_.num_patches) {
      refuse_changed();
    }
    const auto in_tile =
        static_cast<std::uint32_t>(group % kGroupsPerTile) * kGroupWeights + position;
    store_word(data_ + sections_.patches + std::uint64_t{patch_} * 4,
               in_tile | (std::uint32_t{group_.weights[position]} << 16U));
    ++patch_;
  }

  /// What a tile's groups have just written is in the cache still.
  void sum_groups(std::uint64_t begin, std::uint64_t end) {
    const std::uint64_t code_bytes = code_bytes_of(codec_);
    sum(begin * kGroupWeights, (end - begin) * kGroupWeights);
    sum(sections_.codes + begin * code_bytes, whole_blocks((end - begin) * code_bytes));
  }

  void sum(std::uint64_t begin, std::uint64_t size_bytes) {
    written_.sum += sum_of_blocks(data_ + begin, size_bytes, first_block_ + begin / kSumBlockBytes);
  }

  Codec codec_;
  const Chunk& chunk_;
  const std::byte* source_;
  std::uint64_t num_weights_;
  std::byte* data_;
  std::uint64_t first_block_;
  Sections sections_;
  CodeTable codes_;
  EscapeCodes escape_codes_{};
  EscapeWriter escapes_;
  std::uint32_t escape_;  // number of the next one
  std::uint32_t patch_;
  SplitGroup group_{};  // being written
  WrittenChunk written_;
};

WrittenChunk write_raw(const TensorEntry& entry, const Chunk& chunk, const std::byte* source,
                       std::byte* blob) {
  WrittenChunk written;
  const std::uint64_t begin = chunk.first_tile * kTileBytes;
  const std::uint64_t end = std::min(begin + chunk.num_tiles * kTileBytes, entry.size_bytes);
  for (std::uint64_t at = begin; at < end; at += kTileBytes) {
    const std::uint64_t here = std::min<std::uint64_t>(kTileBytes, end - at);
    std::byte* const out = blob + entry.data_offset + at;
    std::memcpy(out, source + at, here);
    written.sum +=
        sum_of_blocks(out, whole_blocks(here), (entry.data_offset + at) / kSumBlockBytes);
  }
  return written;
}

}  // namespace

std::uint64_t summed_bytes(const TensorEntry& entry) {
  if (entry.codec == Codec::kRaw) {
    return whole_blocks(entry.size_bytes);
  }
  return whole_blocks(num_groups_of(entry.size_bytes / 2) *
                      (kGroupWeights + code_bytes_of(entry.codec)));
}

std::uint64_t escape_block_offset(const TensorEntry& entry, std::uint32_t number) {
  return entry.data_offset + sections_of(entry).escapes +
         number / kEscapeBlock * sizeof(EscapeWords);
}

WrittenChunk write_chunk(const TensorEntry& entry, const Chunk& chunk, const std::byte* source,
                         std::byte* blob) {
  return entry.codec == Codec::kRaw ? write_raw(entry, chunk, source, blob)
                                    : PackedChunkWriter(entry, chunk, source, blob).write();
}

}  // namespace torch_offload
