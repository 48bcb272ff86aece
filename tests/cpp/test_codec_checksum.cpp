#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "codec/checksum.h"
#include "packed_fixture.h"

namespace torch_offload {
namespace {

using testing::Bytes;

class ChecksumTest : public ::testing::Test {
 protected:
  Bytes random_bytes(std::size_t size_bytes) {
    Bytes bytes(size_bytes);
    std::generate(bytes.begin(), bytes.end(), [&] { return static_cast<std::byte>(random_()); });
    return bytes;
  }
  static std::uint64_t sum(const Bytes& bytes) {
    return checksum_of(bytes.data(), bytes.size(), 1);
  }

  std::mt19937 random_{7};
};

TEST_F(ChecksumTest, ThreadsChangeNothing) {
  const Bytes bytes = random_bytes(std::size_t{5} << 20U);
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{255}, std::size_t{256},
                                 std::size_t{257}, bytes.size() - 3, bytes.size()}) {
    EXPECT_EQ(checksum_of(bytes.data(), size, 1), checksum_of(bytes.data(), size, 4)) << size;
  }
}

TEST_F(ChecksumTest, BlocksMayBeSummedInAnyOrder) {
  const Bytes bytes = random_bytes(40 * kSumBlockBytes + 77);
  std::vector<std::size_t> cuts{0, 1, 2, 7, 19, 20, 40};  // in blocks
  std::vector<std::uint64_t> sums;
  for (std::size_t i = 0; i < cuts.size(); ++i) {
    const std::size_t begin = cuts[i] * kSumBlockBytes;
    const std::size_t end = i + 1 < cuts.size() ? cuts[i + 1] * kSumBlockBytes : bytes.size();
    sums.push_back(sum_of_blocks(bytes.data() + begin, end - begin, cuts[i]));
  }
  std::shuffle(sums.begin(), sums.end(), random_);
  std::uint64_t all = 0;
  for (const std::uint64_t one : sums) {
    all += one;
  }
  EXPECT_EQ(checksum_of_sum(all, bytes.size()), sum(bytes));
}

TEST_F(ChecksumTest, EveryFlippedBitChangesIt) {
  Bytes bytes = random_bytes(3 * kSumBlockBytes + 21);
  const std::uint64_t sound = sum(bytes);
  for (std::size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
    const std::byte mask = std::byte{1} << (bit % 8);
    bytes[bit / 8] ^= mask;
    EXPECT_NE(sum(bytes), sound) << bit;
    bytes[bit / 8] ^= mask;
  }
}

// A product's low half carries nothing down: a highest bit that flips must not be made up for by
// one or two bits of the lane's next word, whatever the words hold.
TEST_F(ChecksumTest, BitsOfTheNextWordDoNotMakeUpForAHighestBit) {
  Bytes bytes = random_bytes(2 * kSumBlockBytes);
  const std::uint64_t sound = sum(bytes);
  const auto flip = [&](std::size_t word, unsigned bit) {
    bytes[8 * word + bit / 8] ^= std::byte{1} << (bit % 8);
  };
  for (const std::size_t word : {std::size_t{0}, std::size_t{9}, std::size_t{35}}) {
    for (unsigned high = 60; high < 64; ++high) {
      flip(word, high);
      for (unsigned first = 0; first < 64; ++first) {
        flip(word + 4, first);
        EXPECT_NE(sum(bytes), sound) << word << ' ' << high << ' ' << first;
        for (unsigned second = first + 1; second < 64; ++second) {
          flip(word + 4, second);
          EXPECT_NE(sum(bytes), sound) << word << ' ' << high << ' ' << first << ' ' << second;
          flip(word + 4, second);
        }
        flip(word + 4, first);
      }
      flip(word, high);
    }
  }
}

TEST_F(ChecksumTest, WordsAndBlocksThatChangePlacesChangeIt) {
  const Bytes bytes = random_bytes(8 * kSumBlockBytes);
  const std::uint64_t sound = sum(bytes);
  for (const std::size_t size : {std::size_t{8}, std::size_t{32}, kSumBlockBytes}) {
    for (std::size_t at = 0; at + 2 * size <= bytes.size(); at += size) {
      for (std::size_t other = at + size; other < bytes.size(); other += size) {
        Bytes swapped = bytes;
        std::swap_ranges(swapped.begin() + static_cast<std::ptrdiff_t>(at),
                         swapped.begin() + static_cast<std::ptrdiff_t>(at + size),
                         swapped.begin() + static_cast<std::ptrdiff_t>(other));
        EXPECT_NE(sum(swapped), sound) << size << " bytes at " << at << " and " << other;
      }
    }
  }
}

TEST_F(ChecksumTest, ZerosAtTheEndCount) {
  for (const std::size_t size :
       {std::size_t{0}, std::size_t{65}, std::size_t{255}, std::size_t{256}, std::size_t{511}}) {
    EXPECT_NE(sum(Bytes(size)), sum(Bytes(size + 1))) << size;
  }
}

}  // namespace
}  // namespace torch_offload
