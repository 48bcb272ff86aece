#include <gtest/gtest.h>

#include <random>
#include <string>

#include "codec/blob.h"
#include "codec/decoder.h"
#include "codec/unit_packer.h"
#include "core/error.h"
#include "packed_fixture.h"

namespace torch_offload {
namespace {

using testing::Bytes;
using testing::normal_weights;
using testing::odd_lengths;
using testing::PackedCase;
using testing::random_bits;

class UnitPackerTest : public ::testing::Test {
 protected:
  UnitPackerTest() {
    unit_.add(normal_weights(9000, random_));
    unit_.add(random_bits(300, random_));
    unit_.add(normal_weights(4097, random_));
    sound_ = unit_.pack({});
  }

  /// Offers `kept` for `unit`, and expects the unit's own bytes whatever becomes of it.
  static bool takes(const PackedCase& unit, const Bytes& kept) {
    UnitPacker packer(unit.sources(), unit.place_bytes(), {}, {kept.data(), kept.size()});
    Bytes blob(packer.blob_bytes() + 4096);
    EXPECT_TRUE(packer.write(blob.data(), blob.size()));
    Bytes place(unit.place_bytes());
    decode(blob.data(), packer.blob_bytes(), place.data(), place.size());
    EXPECT_EQ(place, unit.place(std::byte{0}));
    EXPECT_EQ(BlobView::header_of(blob.data(), packer.blob_bytes(), place.size()).num_tiles,
              packer.num_tiles());
    return packer.took_kept();
  }

  std::mt19937 random_{7};
  PackedCase unit_;
  Bytes sound_;
};

TEST_F(UnitPackerTest, PacksWhereNothingWasKept) {
  UnitPacker packer(unit_.sources(), unit_.place_bytes(), {});
  EXPECT_EQ(packer.blob_bytes(), sound_.size());
  Bytes blob(sound_.size());
  EXPECT_TRUE(packer.write(blob.data(), blob.size()));
  EXPECT_EQ(blob, sound_);
  EXPECT_FALSE(packer.took_kept());
}

TEST_F(UnitPackerTest, TakesASoundBlobWithoutReadingTheTensors) {
  PackedCase unit = unit_;
  std::vector<TensorSource> sources = unit.sources();
  for (TensorSource& source : sources) {
    source.bytes = nullptr;
  }
  UnitPacker packer(sources, unit.place_bytes(), {}, {sound_.data(), sound_.size()});
  Bytes blob(packer.blob_bytes());
  EXPECT_TRUE(packer.write(blob.data(), blob.size()));
  EXPECT_TRUE(packer.took_kept());
  EXPECT_EQ(blob, sound_);
}

TEST_F(UnitPackerTest, PacksAnewWhateverIsDamaged) {
  for (std::size_t i = 0; i < 400; ++i) {
    Bytes kept = sound_;
    kept[i < 192 ? i : random_() % kept.size()] ^= std::byte{0x04};
    EXPECT_FALSE(takes(unit_, kept)) << i;
  }
  for (const std::size_t size : {std::size_t{0}, std::size_t{63}, sound_.size() - 1}) {
    Bytes kept(sound_.begin(), sound_.begin() + static_cast<std::ptrdiff_t>(size));
    kept.reserve(1);
    EXPECT_FALSE(takes(unit_, kept)) << size;
  }
}

TEST_F(UnitPackerTest, PacksAnewWhatWasPackedForAnotherLayout) {
  PackedCase other;  // of the same size
  other.add(normal_weights(4097, random_));
  other.add(random_bits(300, random_));
  other.add(normal_weights(9000, random_));
  ASSERT_EQ(other.place_bytes(), unit_.place_bytes());
  EXPECT_FALSE(takes(unit_, other.pack({})));
  EXPECT_TRUE(takes(other, other.pack({})));
}

TEST_F(UnitPackerTest, SaysWhereThereIsNoRoom) {
  Bytes kept = sound_;
  kept.back() ^= std::byte{1};
  UnitPacker packer(unit_.sources(), unit_.place_bytes(), {}, {kept.data(), kept.size()});
  Bytes blob(sound_.size());
  EXPECT_FALSE(packer.write(blob.data(), sound_.size() - 1));
  UnitPacker other(unit_.sources(), unit_.place_bytes(), {});
  EXPECT_FALSE(other.write(blob.data(), sound_.size() - 1));
}

TEST_F(UnitPackerTest, PartsAreDecodedAndComparedAlone) {
  PackedCase unit;
  for (const std::size_t length : odd_lengths()) {
    unit.add(normal_weights(length, random_));
    unit.add(random_bits(length, random_));
  }
  EncodeOptions options;
  options.max_entry_weights = 4096;  // so that tensors are several entries
  const Bytes blob = unit.pack(options);
  const BlobView view = BlobView::checked(blob.data(), blob.size(), unit.place_bytes());
  const std::vector<TensorSource> sources = unit.sources();
  for (std::size_t i = 0; i < sources.size(); ++i) {
    const TensorSource& source = sources[i];
    Bytes part(source.size_bytes + 1, std::byte{0x5C});
    decode_part(view, source.place_offset, source.size_bytes, part.data(), 2);
    EXPECT_EQ(part.back(), std::byte{0x5C}) << i;
    part.pop_back();
    EXPECT_EQ(part, unit.tensors[i]) << i;
    EXPECT_TRUE(holds(view, source.place_offset, part.data(), part.size(), 2)) << i;
    if (!part.empty()) {
      part[random_() % part.size()] ^= std::byte{0x80};
      EXPECT_FALSE(holds(view, source.place_offset, part.data(), part.size(), 2)) << i;
    }
  }
  const TensorSource& last = sources.back();
  Bytes part(last.size_bytes);
  EXPECT_THROW(decode_part(view, last.place_offset, last.size_bytes - 1, part.data()),
               InternalError);
}

}  // namespace
}  // namespace torch_offload
