#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "checkpoint_file.h"
#include "core/file_mapping.h"
#include "core/host_mapping.h"
#include "core/read_ahead.h"

namespace torch_offload {
namespace {

const std::size_t kPage = HostMapping::page_bytes();
constexpr std::size_t kPages = 64;

class ReadAheadTest : public ::testing::Test {
 protected:
  /// Which pages of the file are in memory.
  std::size_t num_cached() const {
    std::vector<unsigned char> found(kPages);
    auto* const begin = const_cast<std::byte*>(mapping_->data());
    EXPECT_EQ(mincore(begin, kPages * kPage, found.data()), 0);
    return static_cast<std::size_t>(
        std::count_if(found.begin(), found.end(), [](unsigned char page) { return page & 1U; }));
  }

  /// Leaves none of them in memory. Skips the test where the file system keeps them there.
  void forget_all() {
    const int descriptor = open(file_.path().c_str(), O_RDONLY | O_CLOEXEC);
    EXPECT_EQ(fdatasync(descriptor), 0);
    close(descriptor);
    mapping_->forget_pages(mapping_->data(), kPages * kPage);
  }

  CheckpointFile file_{kPages * kPage};
  std::shared_ptr<const FileMapping> mapping_ = std::make_shared<FileMapping>(file_.path());
};

TEST_F(ReadAheadTest, PagesComeBackThatWereForgotten) {
  forget_all();
  if (num_cached() != 0) {
    GTEST_SKIP() << "this file system keeps its pages in memory";
  }
  {
    ReadAhead reader;
    reader.ask(mapping_, mapping_->data(), kPages / 2 * kPage);
    reader.ask(mapping_, mapping_->data() + kPages / 2 * kPage, kPages / 2 * kPage);
    reader.drain();
    mapping_->read_pages(mapping_->data(), kPages * kPage);  // waits for what the disk was asked
    EXPECT_EQ(num_cached(), kPages);
  }
  EXPECT_TRUE(std::equal(file_.bytes().begin(), file_.bytes().end(), mapping_->data()));
}

TEST_F(ReadAheadTest, ForgettingKeepsThePagesOfOtherMappings) {
  const auto other = std::make_shared<FileMapping>(file_.path());
  mapping_->read_pages(mapping_->data(), kPages * kPage);
  other->read_pages(other->data(), kPages * kPage);
  mapping_->forget_pages(mapping_->data(), kPages * kPage);
  EXPECT_EQ(num_cached(), kPages) << "another process would have to read them anew";
}

TEST_F(ReadAheadTest, FileThatWasCutShortIsNoError) {
  ReadAhead reader;
  ASSERT_EQ(truncate(file_.path().c_str(), 1), 0);
  reader.ask(mapping_, mapping_->data(), kPages * kPage);
  reader.drain();
  mapping_->forget_pages(mapping_->data(), kPages * kPage);
}

TEST_F(ReadAheadTest, FileLivesUntilItIsAskedFor) {
  ReadAhead reader;
  for (int i = 0; i < 50; ++i) {
    auto mapping = std::make_shared<FileMapping>(file_.path());
    const std::byte* const begin = mapping->data();
    reader.ask(std::move(mapping), begin, kPages * kPage);
  }
}

TEST_F(ReadAheadTest, DrainingOrClosingOneThatWasNeverAskedDoesNothing) {
  ReadAhead reader;
  reader.drain();
}

TEST_F(ReadAheadTest, ForkedChildAsksInVainAndLeavesTheThreadAlone) {
  auto reader = std::make_unique<ReadAhead>();
  reader->ask(mapping_, mapping_->data(), kPage);
  const pid_t child = fork();
  if (child == 0) {
    reader->ask(mapping_, mapping_->data(), kPage);
    reader->drain();
    reader.reset();
    _exit(7);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 7);
  reader->ask(mapping_, mapping_->data(), kPage);
  reader->drain();
}

}  // namespace
}  // namespace torch_offload
