// Damaged blobs: each is refused or gives the right bits, and nothing outside is read or written.
//
// TORCH_OFFLOAD_FUZZ=<number> sets how many there are of each sort; the default is a slice. Bytes
// outside are only seen to be read when this is built with the address sanitizer: blob and place
// lie in blocks of exactly their size.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "codec/checksum.h"
#include "codec/decoder.h"
#include "core/error.h"
#include "packed_fixture.h"

namespace torch_offload {
namespace {

using testing::Bytes;
using testing::normal_weights;
using testing::PackedCase;
using testing::random_bits;
using testing::weights_with_escapes;

constexpr std::byte kFiller{0x5C};

unsigned num_mutations() {
  constexpr unsigned kSlice = 100000;
  const char* asked = std::getenv("TORCH_OFFLOAD_FUZZ");
  return asked == nullptr ? kSlice : static_cast<unsigned>(std::stoul(asked));
}

class CodecFuzzTest : public ::testing::Test {
 protected:
  struct Sample {
    PackedCase unit;
    Bytes blob;
  };

  CodecFuzzTest() {
    const std::vector<std::optional<Codec>> codecs{std::nullopt, Codec::kE4p, Codec::kE33};
    for (const auto& codec : codecs) {
      EncodeOptions options;
      options.codec = codec;
      for (const std::size_t length : {1U, 40U, 1500U, 4500U}) {
        Sample sample;
        sample.unit.add(weights_with_escapes(length, 200, random_));
        sample.unit.add(random_bits(length / 8, random_));
        sample.unit.add(Bytes(length % 37, std::byte{4}), ElementType::kOther);
        sample.blob = sample.unit.pack(options);
        samples_.push_back(std::move(sample));
      }
    }
  }

  std::size_t draw(std::size_t bound) { return random_() % bound; }

  /// Places where damage tells most: header, table, offsets; else anywhere.
  std::size_t draw_position(const Bytes& blob) {
    const std::size_t head = std::min<std::size_t>(blob.size(), 64 * (1 + draw(4)));
    return draw(3) == 0 ? draw(blob.size()) : draw(head);
  }

  void mutate(Bytes& blob) {
    for (std::size_t left = 1 + draw(3); left > 0; --left) {
      const std::size_t at = draw_position(blob);
      switch (draw(6)) {
        case 0:
          blob[at] ^= std::byte{1} << static_cast<unsigned>(draw(8));
          break;
        case 1:
          blob[at] = static_cast<std::byte>(random_());
          break;
        case 2: {  // a word of a remarkable size
          const std::uint64_t words[] = {0, 1, UINT32_MAX, UINT64_MAX, blob.size(), 1ULL << 31U};
          const std::size_t size = std::min<std::size_t>(draw(2) == 0 ? 4 : 8, blob.size() - at);
          std::memcpy(blob.data() + at, &words[draw(6)], size);
          break;
        }
        case 3: {  // a piece of the blob in another place
          const std::size_t from = draw_position(blob);
          const std::size_t size = std::min(1 + draw(64), blob.size() - std::max(from, at));
          std::memmove(blob.data() + at, blob.data() + from, size);
          break;
        }
        case 4:
          blob.resize(draw(2) == 0 ? draw(blob.size()) + 1 : blob.size() + 1 + draw(300));
          break;
        default: {  // a neighbouring value
          blob[at] = static_cast<std::byte>(std::to_integer<unsigned>(blob[at]) +
                                            (draw(2) == 0 ? 1U : 255U));
          break;
        }
      }
    }
  }

  /// Makes header and checksum fit again, so that all that remains is checked by itself.
  void reseal(Bytes& blob) {
    if (blob.size() < sizeof(BlobHeader)) {
      return;
    }
    BlobHeader header;
    std::memcpy(&header, blob.data(), sizeof(header));
    header.magic = kBlobMagic;
    if (draw(4) != 0) {
      header.blob_bytes = blob.size();
      header.version = kBlobVersion;
    }
    std::memcpy(blob.data(), &header, sizeof(header));
    header.checksum = blob_checksum(blob.data(), blob.size(), 1);
    std::memcpy(blob.data(), &header, sizeof(header));
  }

  /// Decodes into a block of just that size. Returns whether it was accepted.
  static bool accepts(const Bytes& blob, Bytes& place) {
    const std::unique_ptr<std::byte[]> exact_blob(new std::byte[blob.size()]);
    const std::unique_ptr<std::byte[]> exact_place(new std::byte[place.size()]);
    if (!blob.empty()) {
      std::memcpy(exact_blob.get(), blob.data(), blob.size());
    }
    std::memcpy(exact_place.get(), place.data(), place.size());
    bool accepted = true;
    try {
      decode(exact_blob.get(), blob.size(), exact_place.get(), place.size());
    } catch (const ValueError&) {
      accepted = false;
    } catch (const NotImplementedError&) {
      accepted = false;
    }
    std::memcpy(place.data(), exact_place.get(), place.size());
    return accepted;
  }

  std::mt19937 random_{20};
  std::vector<Sample> samples_;
};

TEST_F(CodecFuzzTest, DamagedBlobIsRefusedOrHarmless) {
  unsigned refused = 0;
  for (unsigned i = 0; i < num_mutations(); ++i) {
    const Sample& sample = samples_[draw(samples_.size())];
    Bytes blob = sample.blob;
    mutate(blob);
    Bytes place(sample.unit.place_bytes(), kFiller);
    if (accepts(blob, place)) {
      ASSERT_EQ(place, sample.unit.place(kFiller)) << "mutation " << i;
    } else {
      ASSERT_EQ(place, Bytes(sample.unit.place_bytes(), kFiller)) << "mutation " << i;
      ++refused;
    }
  }
  EXPECT_GT(refused, num_mutations() / 10 * 9);  // the others changed nothing
}

TEST_F(CodecFuzzTest, ForgedBlobDoesNotReachOutside) {
  unsigned refused = 0;
  for (unsigned i = 0; i < num_mutations(); ++i) {
    const Sample& sample = samples_[draw(samples_.size())];
    Bytes blob = sample.blob;
    mutate(blob);
    reseal(blob);
    Bytes place(sample.unit.place_bytes(), kFiller);
    if (!accepts(blob, place)) {
      ASSERT_EQ(place, Bytes(sample.unit.place_bytes(), kFiller)) << "mutation " << i;
      ++refused;
    }
  }
  // Both happen: damage to the table is found, damage to the planes cannot be.
  EXPECT_GT(refused, num_mutations() / 4);
  EXPECT_LT(refused, num_mutations());
}

}  // namespace
}  // namespace torch_offload
