#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "codec/group_encoder.h"
#include "codec/words.h"

namespace torch_offload {

/// Writes the escapes of one chunk, in blocks of words that no other escape lies in. The block that
/// the chunk before has begun is not written but given back.
class EscapeWriter {
 public:
  /// `first_block` is where the block of escape number `first` lies.
  EscapeWriter(std::byte* first_block, std::uint32_t first)
      : at_(first_block), num_waiting_(first % kEscapeBlock), is_shared_(num_waiting_ != 0) {}

  /// Where the codes of a group may be written, with room for all of them; `add` takes them.
  std::uint8_t* next() { return codes_.data() + num_waiting_; }

  void add(std::uint32_t num_codes) {
    num_waiting_ += num_codes;
    std::size_t done = 0;
    for (; num_waiting_ - done >= kEscapeBlock; done += kEscapeBlock) {
      write(pack_escapes(codes_.data() + done), std::tuple_size_v<EscapeWords>);
    }
    num_waiting_ -= done;
    std::copy_n(codes_.begin() + static_cast<std::ptrdiff_t>(done), num_waiting_, codes_.begin());
  }

  /// Writes what is left, and returns what the chunk has of a block that it did not begin.
  EscapeWords finish() {
    std::fill_n(next(), kEscapeBlock - num_waiting_, std::uint8_t{0});
    write(pack_escapes(codes_.data()), (3 * num_waiting_ + 31) / 32);
    return shared_;
  }

 private:
  void write(const EscapeWords& words, std::size_t num_words) {
    if (is_shared_) {
      shared_ = words;
      is_shared_ = false;
    } else {
      for (std::size_t i = 0; i < num_words; ++i) {
        store_word(at_ + 4 * i, words[i]);
      }
    }
    at_ += sizeof(words);
  }

  std::byte* at_;            // of the block that is written next
  std::size_t num_waiting_;  // codes; those of the chunk before are zero
  bool is_shared_;
  EscapeWords shared_{};
  std::array<std::uint8_t, kEscapeBlock + kGroupWeights + kGatherSlack> codes_{};
};

}  // namespace torch_offload
