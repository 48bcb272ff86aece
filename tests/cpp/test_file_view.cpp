#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <memory>
#include <numeric>

#include "checkpoint_file.h"
#include "core/error.h"
#include "core/file_view.h"
#include "core/host_mapping.h"

namespace torch_offload {
namespace {

const std::size_t kPage = HostMapping::page_bytes();

std::vector<std::byte> expected_bytes(const std::vector<FileBlock>& blocks) {
  std::vector<std::byte> bytes;
  for (const FileBlock& block : blocks) {
    bytes.insert(bytes.end(), block.data(), block.data() + block.size_bytes);
  }
  return bytes;
}

bool shows(const FileView& view, const std::vector<std::byte>& bytes) {
  return view.size_bytes() == bytes.size() && std::equal(bytes.begin(), bytes.end(), view.data());
}

class FileViewTest : public ::testing::Test {
 protected:
  FileBlock block(std::size_t offset, std::size_t size_bytes) const {
    return {mapping_, offset, size_bytes};
  }

  CheckpointFile file_{64 * kPage + 100};
  std::shared_ptr<FileMapping> mapping_ = std::make_shared<FileMapping>(file_.path());
};

TEST_F(FileViewTest, ShowsOneBlockWithoutCopyingIt) {
  const FileView view({block(24, 20 * kPage + 13)});
  EXPECT_TRUE(shows(view, expected_bytes(view.blocks())));
  EXPECT_EQ(view.copied_bytes(), 0U);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(view.data()) % kPage, 24U);
  EXPECT_FALSE(view.is_edited());
  EXPECT_FALSE(view.looks_edited());
}

TEST_F(FileViewTest, JoinsBlocksAndCopiesOnlyWhereTheyMeet) {
  // As experts lie: apart in the file, of whole pages, askew by the length of the header.
  const FileView view(
      {block(40 + 8 * kPage, 4 * kPage), block(40, 4 * kPage), block(40 + 20 * kPage, 4 * kPage)});
  EXPECT_TRUE(shows(view, expected_bytes(view.blocks())));
  EXPECT_EQ(view.copied_bytes(), 2 * (kPage - 40));
  EXPECT_FALSE(view.is_edited()) << "a page that two blocks share is no edit";
}

TEST_F(FileViewTest, CopiesBlocksThatDoNotContinueModuloAPage) {
  const FileView view({block(0, 3 * kPage), block(kPage + 8, 2 * kPage), block(7, 5)});
  EXPECT_TRUE(shows(view, expected_bytes(view.blocks())));
  EXPECT_EQ(view.copied_bytes(), 2 * kPage + 5);
  EXPECT_FALSE(view.is_edited());
}

TEST_F(FileViewTest, ShowsAnyBlocksInAnyOrder) {
  std::mt19937 generator(7);
  const auto below = [&generator](std::size_t end) { return generator() % end; };
  for (int round = 0; round < 300; ++round) {
    std::vector<FileBlock> blocks;
    const std::size_t count = 1 + below(6);
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t size =
          below(3) == 0 ? below(200) : below(6) * kPage + below(2) * below(kPage);
      const std::size_t lead = below(2) == 0 ? 40 : below(kPage);
      blocks.push_back(block(lead + below(40) * kPage, size));
    }
    blocks.push_back(block(3, 1));  // so that there is something to show
    FileView view(blocks);
    ASSERT_TRUE(shows(view, expected_bytes(blocks))) << "round " << round;
    ASSERT_FALSE(view.is_edited()) << "round " << round;
    std::byte& edited = view.data()[below(view.size_bytes())];
    const std::byte before = edited;
    edited ^= std::byte{1};
    ASSERT_TRUE(view.is_edited()) << "round " << round;
    edited = before;
    ASSERT_FALSE(view.is_edited()) << "the same bytes again are no edit, round " << round;
  }
}

TEST_F(FileViewTest, FindsEveryEditOfOneByteAndKeepsItFromTheFile) {
  FileView view({block(24, 16 * kPage), block(24 + 30 * kPage, 8 * kPage)});
  for (const std::size_t at : {std::size_t{0}, kPage, 16 * kPage - 1, 16 * kPage, 24 * kPage - 1}) {
    view.data()[at] ^= std::byte{0xff};
    EXPECT_TRUE(view.is_edited()) << at;
    view.data()[at] ^= std::byte{0xff};
  }
  view.data()[5] ^= std::byte{1};
  EXPECT_EQ(file_.read_all(), file_.bytes());
  EXPECT_EQ(view.blocks().front().data()[5], file_.bytes()[29]);
}

TEST_F(FileViewTest, LooksEditedIfAllOfItIs) {
  FileView view({block(24, 16 * kPage)});
  view.data()[100] ^= std::byte{1};  // between two of the words: missed, as documented
  EXPECT_FALSE(view.looks_edited());
  std::for_each(view.data(), view.data() + view.size_bytes(),
                [](std::byte& byte) { byte ^= std::byte{1}; });
  EXPECT_TRUE(view.looks_edited());
}

TEST_F(FileViewTest, TakingAllPagesChangesNoByte) {
  FileView view({block(24, 16 * kPage), block(24 + 30 * kPage, 8 * kPage)});
  view.data()[3] ^= std::byte{1};
  std::vector<std::byte> bytes(view.data(), view.data() + view.size_bytes());
  view.take_all_pages();
  EXPECT_TRUE(shows(view, bytes));
  EXPECT_TRUE(view.is_edited());
}

TEST_F(FileViewTest, BlockBeyondTheFileFails) {
  EXPECT_THROW(FileView({block(file_.bytes().size() - 3, 4)}), ValueError);
  EXPECT_THROW(FileView({block(SIZE_MAX, 4)}), ValueError);
  EXPECT_THROW(FileView(std::vector<FileBlock>{}), ValueError);
  EXPECT_THROW(FileView({block(8, 0)}), ValueError);
}

TEST_F(FileViewTest, LivesOnWithoutTheMappingItWasMadeFrom) {
  const FileView view({block(24, 4 * kPage)});
  mapping_.reset();
  unlink(file_.path().c_str());
  EXPECT_TRUE(shows(view, std::vector<std::byte>(file_.bytes().begin() + 24,
                                                 file_.bytes().begin() + 24 +
                                                     static_cast<std::ptrdiff_t>(4 * kPage))));
}

TEST_F(FileViewTest, MappingNoticesAFileThatChanged) {
  EXPECT_NO_THROW(mapping_->check_unchanged());
  const struct timespec later[2] = {{0, UTIME_OMIT}, {4102444800, 1}};
  ASSERT_EQ(utimensat(AT_FDCWD, file_.path().c_str(), later, 0), 0);
  EXPECT_THROW(mapping_->check_unchanged(), StateError);
}

TEST_F(FileViewTest, MappingNoticesAFileThatWasCutShort) {
  ASSERT_EQ(truncate(file_.path().c_str(), static_cast<off_t>(2 * kPage)), 0);
  EXPECT_THROW(mapping_->check_unchanged(), StateError);
  EXPECT_NO_THROW(mapping_->read_pages(mapping_->data(), 2 * kPage));
  EXPECT_THROW(mapping_->read_pages(mapping_->data(), 8 * kPage), StateError);
}

TEST_F(FileViewTest, MappingKeepsAFileThatWasReplacedByRenaming) {
  const CheckpointFile other(kPage, 2);
  ASSERT_EQ(rename(other.path().c_str(), file_.path().c_str()), 0);
  EXPECT_NO_THROW(mapping_->check_unchanged());
  EXPECT_EQ(mapping_->data()[99], file_.bytes()[99]);
}

TEST(FileMappingTest, WhatIsNoFileFails) {
  EXPECT_THROW(FileMapping("/nowhere/at all"), ValueError);
  EXPECT_THROW(FileMapping("/tmp"), ValueError);
  const CheckpointFile empty(0);
  EXPECT_THROW(FileMapping(empty.path()), ValueError);
}

}  // namespace
}  // namespace torch_offload
