#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#include "checkpoint_file.h"
#include "core/error.h"
#include "core/host_mapping.h"
#include "core/locked_files.h"
#include "core/masters.h"
#include "gated_device.h"
#include "host/host_device.h"

namespace torch_offload {
namespace {

const std::size_t kPage = HostMapping::page_bytes();

/// Refuses to lock more than so many bytes at a time, as a driver does that has met its limit.
class LimitedDevice : public HostDevice {
 public:
  std::size_t limit_bytes = SIZE_MAX;
  std::function<void(StreamId)> when_synchronized;

 protected:
  void do_synchronize(StreamId stream) override {
    if (when_synchronized) {
      when_synchronized(stream);
    }
    HostDevice::do_synchronize(stream);
  }
  void do_register_read_only(void* /*memory*/, std::size_t size_bytes) override {
    if (counters().registered_bytes + size_bytes > limit_bytes) {
      throw MemoryError("the device refuses " + std::to_string(size_bytes) + " bytes");
    }
  }
};

class LockedFilesTest : public ::testing::Test {
 protected:
  LockedFilesTest() {
    StreamOptions options;
    options.name = "copies";
    stream_ = device_->create_stream(options);
  }

  /// Submits copies to such a place.
  LockedFiles::Submit copies_to(std::byte* place, StreamId stream) {
    return [this, place, stream](const CopySegment& segment) {
      Copy copy;
      copy.destination = place + segment.offset;
      copy.source = segment.source;
      copy.size_bytes = segment.size_bytes;
      device_->copy(stream, copy);
    };
  }

  std::vector<CopySegment> page_at(std::size_t page) const {
    return {{mapping_->data() + page * kPage, 0, kPage}};
  }

  /// Copies one page of each of `pages` as a unit would, and compares.
  void copy_pages(LockedFiles& files, const std::vector<std::size_t>& pages) {
    std::vector<CopySegment> segments;
    std::size_t offset = 0;
    for (const std::size_t page : pages) {
      append_segment(segments, {mapping_->data() + page * kPage, offset, kPage});
      offset += kPage;
    }
    segments = files.cut(segments);
    files.lock(segments);
    std::vector<std::byte> place(pages.size() * kPage);
    files.submit(segments, stream_, copies_to(place.data(), stream_));
    device_->synchronize(stream_);
    for (std::size_t i = 0; i < pages.size(); ++i) {
      EXPECT_TRUE(std::equal(place.begin() + static_cast<std::ptrdiff_t>(i * kPage),
                             place.begin() + static_cast<std::ptrdiff_t>((i + 1) * kPage),
                             mapping_->data() + pages[i] * kPage));
    }
  }

  std::uint64_t locked() const { return device_->counters().registered_bytes; }

  CheckpointFile file_{32 * kPage};
  std::shared_ptr<FileMapping> mapping_ = std::make_shared<FileMapping>(file_.path());
  std::shared_ptr<LimitedDevice> device_ = std::make_shared<LimitedDevice>();
  StreamId stream_ = kNoStream;
};

TEST_F(LockedFilesTest, LocksOnlyTheChunksThatCopiesNeed) {
  LockedFiles files(device_, {mapping_}, LockedFiles::kNoLimit, 4 * kPage);
  EXPECT_EQ(locked(), 0U);
  copy_pages(files, {0});
  EXPECT_EQ(locked(), 4 * kPage);
  copy_pages(files, {3, 9});
  EXPECT_EQ(locked(), 8 * kPage);
  EXPECT_FALSE(files.takes_turns());
}

/// The first copies of a unit are under way before its last pages are locked.
TEST_F(LockedFilesTest, LoadsAUnitBatchByBatch) {
  LockedFiles files(device_, {mapping_}, LockedFiles::kNoLimit, kPage);
  const std::vector<CopySegment> segments = files.cut({{mapping_->data(), 0, 10 * kPage}});
  std::vector<std::byte> place(10 * kPage);
  std::vector<std::uint64_t> locked_at;
  const auto submit = [&](const CopySegment& segment) {
    locked_at.push_back(locked() / kPage);
    Copy copy;
    copy.destination = place.data() + segment.offset;
    copy.source = segment.source;
    copy.size_bytes = segment.size_bytes;
    device_->copy(stream_, copy);
  };
  files.load(segments, stream_, submit);
  device_->synchronize(stream_);
  EXPECT_EQ(locked_at, (std::vector<std::uint64_t>{4, 4, 4, 4, 8, 8, 8, 8, 10, 10}));
  EXPECT_TRUE(std::equal(place.begin(), place.end(), mapping_->data()));
}

/// Within a limit that makes chunks take turns no batch unlocks what another has still to read.
TEST_F(LockedFilesTest, LoadsAUnitInOneWhereChunksTakeTurns) {
  LockedFiles files(device_, {mapping_}, 8 * kPage, kPage);
  std::vector<std::byte> place(6 * kPage);
  for (std::size_t first = 0; first + 6 <= 32; first += 6) {
    const auto* const begin = mapping_->data() + first * kPage;
    std::vector<std::uint64_t> locked_at;
    files.load(files.cut({{begin, 0, 6 * kPage}}), stream_, [&](const CopySegment& segment) {
      locked_at.push_back(locked() / kPage);
      Copy copy;
      copy.destination = place.data() + segment.offset;
      copy.source = segment.source;
      copy.size_bytes = segment.size_bytes;
      device_->copy(stream_, copy);
    });
    device_->synchronize(stream_);
    EXPECT_TRUE(std::equal(place.begin(), place.end(), begin));
    ASSERT_EQ(locked_at.size(), 6U);
    EXPECT_EQ(locked_at.front(), locked_at.back());
    EXPECT_LE(locked_at.back(), 8U);
  }
}

/// A driver that refuses in the middle of a unit: what it has locked takes turns, and bytes are
/// right.
TEST_F(LockedFilesTest, LimitMetWithinAUnitLeavesEarlierBatchesWhole) {
  device_->limit_bytes = 7 * kPage;
  LockedFiles files(device_, {mapping_}, LockedFiles::kNoLimit, kPage);
  for (const std::size_t first : {0U, 6U, 12U, 0U}) {
    const auto* const begin = mapping_->data() + first * kPage;
    std::vector<std::byte> place(6 * kPage);
    files.load(files.cut({{begin, 0, 6 * kPage}}), stream_, [&](const CopySegment& segment) {
      Copy copy;
      copy.destination = place.data() + segment.offset;
      copy.source = segment.source;
      copy.size_bytes = segment.size_bytes;
      device_->copy(stream_, copy);
    });
    device_->synchronize(stream_);
    EXPECT_TRUE(std::equal(place.begin(), place.end(), begin));
  }
  EXPECT_TRUE(files.takes_turns());
}

TEST_F(LockedFilesTest, CutsCopiesAtTheBordersOfChunks) {
  const LockedFiles files(device_, {mapping_}, LockedFiles::kNoLimit, 4 * kPage);
  const std::vector<CopySegment> cut =
      files.cut({{mapping_->data() + 2 * kPage, 64, 7 * kPage}, {file_.bytes().data(), 0, 12}});
  ASSERT_EQ(cut.size(), 4U);
  EXPECT_EQ(cut[0].size_bytes, 2 * kPage);
  EXPECT_EQ(cut[1].size_bytes, 4 * kPage);
  EXPECT_EQ(cut[2].offset, 64 + 6 * kPage);
  EXPECT_EQ(cut[2].size_bytes, kPage);
  EXPECT_EQ(cut[3].size_bytes, 12U) << "what is in no file stays whole";
}

TEST_F(LockedFilesTest, StaysWithinItsLimitInEveryPass) {
  LockedFiles files(device_, {mapping_}, 16 * kPage, 2 * kPage);
  EXPECT_TRUE(files.takes_turns());
  std::uint64_t after_first_pass = 0;
  for (int pass = 0; pass < 3; ++pass) {
    for (std::size_t page = 0; page < 32; page += 2) {
      copy_pages(files, {page, page + 1});
      ASSERT_LE(locked(), 16 * kPage);
    }
    if (pass == 0) {
      after_first_pass = device_->counters().registrations;
      EXPECT_EQ(locked(), 16 * kPage);
    }
  }
  EXPECT_EQ(device_->counters().registrations, after_first_pass);
}

TEST_F(LockedFilesTest, KeepsMostOfTheLimitLockedForGood) {
  OpLog log;
  LockedFiles files(device_, {mapping_}, 16 * kPage, 2 * kPage);
  const auto pass = [&] {
    for (std::size_t page = 0; page < 32; page += 2) {
      copy_pages(files, {page});
    }
  };
  pass();
  device_->attach_log(&log);
  pass();
  device_->attach_log(nullptr);
  const auto registered = std::count_if(log.ops().begin(), log.ops().end(),
                                        [](const Op& op) { return op.kind == OpKind::kRegister; });
  EXPECT_EQ(registered, 10) << "12 of 32 pages stay, the other 20 are locked anew";
}

TEST_F(LockedFilesTest, FindsALimitThatNobodyTold) {
  device_->limit_bytes = 8 * kPage;
  LockedFiles files(device_, {mapping_}, LockedFiles::kNoLimit, 2 * kPage);
  for (int pass = 0; pass < 2; ++pass) {
    for (std::size_t page = 0; page < 32; page += 2) {
      copy_pages(files, {page, page + 1});
    }
  }
  EXPECT_EQ(files.limit_bytes(), 8 * kPage);
  EXPECT_LE(locked(), 8 * kPage);
}

TEST_F(LockedFilesTest, LimitMetLateKeepsMostLockedAndWaitsForCopiesUnderWay) {
  device_->limit_bytes = 16 * kPage;
  LockedFiles files(device_, {mapping_}, LockedFiles::kNoLimit, kPage);
  for (std::size_t page = 0; page < 16; ++page) {
    copy_pages(files, {page});
  }
  EXPECT_FALSE(files.takes_turns());
  const std::uint64_t waits = device_->counters().host_synchronizes;
  copy_pages(files, {16});
  EXPECT_TRUE(files.takes_turns());
  EXPECT_EQ(files.limit_bytes(), 16 * kPage);
  EXPECT_GT(device_->counters().host_synchronizes, waits + 1)  // copy_pages itself waits once
      << "a chunk was unlocked whose copies nobody had waited for";
  // From now on three quarters stay, and a pass locks the other twenty pages, each once.
  const auto pass = [&] {
    const std::uint64_t before = files.bytes_brought_in();
    for (std::size_t page = 0; page < 32; ++page) {
      copy_pages(files, {page});
      EXPECT_LE(locked(), 16 * kPage);
    }
    return files.bytes_brought_in() - before;
  };
  pass();
  EXPECT_EQ(pass(), 20 * kPage);
  EXPECT_EQ(pass(), 20 * kPage);
}

TEST_F(LockedFilesTest, PagesThatTakeTurnsAreReadAheadAndGivenBack) {
  HostLimits small;
  small.available_bytes = 16 * kPage;
  LockedFiles files(device_, {mapping_}, 16 * kPage, kPage, small);
  EXPECT_TRUE(files.forgets_pages());
  EXPECT_EQ(files.read_ahead_bytes(), 2 * kPage);
  for (std::size_t page = 0; page < 32; ++page) {
    copy_pages(files, {page});
    files.read_ahead({{mapping_->data() + (page + 1) % 32 * kPage, 0, kPage}});
    EXPECT_TRUE(mapping_->data() != nullptr);
  }
  EXPECT_EQ(files.bytes_brought_in(), 32 * kPage);
  for (std::size_t page = 0; page < 32; ++page) {
    copy_pages(files, {page});
  }
  EXPECT_EQ(files.bytes_brought_in(), 52 * kPage) << "twelve pages were locked for good";
}

TEST_F(LockedFilesTest, ReadAheadIsBoundedUntilPagesAreLockedAndForgottenIfGuessedWrong) {
  LockedFiles files(device_, {mapping_}, 16 * kPage, kPage);
  const auto ask = [&](std::size_t page) {
    return files.read_ahead({{mapping_->data() + page * kPage, 0, kPage}});
  };
  EXPECT_TRUE(ask(1));
  EXPECT_TRUE(ask(2));
  EXPECT_TRUE(ask(2)) << "once is enough";
  EXPECT_FALSE(ask(3)) << "two pages are an eighth of the limit";
  copy_pages(files, {1});
  EXPECT_TRUE(ask(3));
  EXPECT_FALSE(ask(4));
  copy_pages(files, {9});  // nobody foresaw it
  EXPECT_TRUE(ask(4));
  EXPECT_TRUE(ask(5));
  EXPECT_FALSE(ask(6));
}

TEST_F(LockedFilesTest, WhatIsCopiedOnceIsUnlockedAndLeavesTheLimitToPasses) {
  for (const std::size_t limit : {LockedFiles::kNoLimit, 16 * kPage}) {
    LockedFiles files(device_, {mapping_}, limit, kPage);
    for (std::size_t page = 0; page < 8; ++page) {
      files.lock(page_at(page), LockedFiles::Hold::kOnce);
      files.submit(page_at(page), stream_, [](const CopySegment&) {});
    }
    copy_pages(files, {3});  // a unit begins in that page
    EXPECT_EQ(locked(), 8 * kPage);
    files.unlock_once();
    EXPECT_EQ(locked(), kPage);
    files.unlock_once();
    EXPECT_EQ(locked(), kPage);
    for (std::size_t page = 0; page < 32; ++page) {
      copy_pages(files, {page});
    }
    const std::uint64_t before = files.bytes_brought_in();
    for (std::size_t page = 0; page < 32; ++page) {
      copy_pages(files, {page});
    }
    EXPECT_EQ(files.bytes_brought_in() - before, limit == LockedFiles::kNoLimit ? 0 : 20 * kPage);
  }
}

TEST_F(LockedFilesTest, ChunkIsUnlockedBehindItsCopiesOfEveryStream) {
  StreamOptions options;
  options.name = "other copies";
  const StreamId other = device_->create_stream(options);
  LockedFiles files(device_, {mapping_}, 4 * kPage, 2 * kPage);
  std::vector<std::byte> place(2 * kPage);
  files.lock(page_at(4));  // this chunk stays
  files.lock(page_at(0));  // this one takes turns
  testing::Gate gate;
  gate.hold(*device_, stream_);
  files.submit(page_at(0), stream_, copies_to(place.data(), stream_));
  files.submit(page_at(1), other, copies_to(place.data() + kPage, other));
  device_->synchronize(other);
  bool is_waited_for = false;
  device_->when_synchronized = [&](StreamId stream) {
    is_waited_for = is_waited_for || stream == stream_;
    gate.open();
  };
  files.lock(page_at(8));
  EXPECT_TRUE(is_waited_for);
  gate.open();
  device_->synchronize(stream_);
}

TEST_F(LockedFilesTest, CopiesBeforeAFailedOneAreWaitedFor) {
  LockedFiles files(device_, {mapping_}, LockedFiles::kNoLimit, kPage);
  const std::vector<CopySegment> segments = files.cut({{mapping_->data(), 0, 2 * kPage}});
  files.lock(segments, LockedFiles::Hold::kOnce);
  std::vector<std::byte> place(2 * kPage);
  const LockedFiles::Submit copy = copies_to(place.data(), stream_);
  EXPECT_THROW(files.submit(segments, stream_,
                            [&](const CopySegment& segment) {
                              if (segment.offset != 0) {
                                throw testing::InjectedFault();
                              }
                              copy(segment);
                            }),
               testing::InjectedFault);
  const std::uint64_t waits = device_->counters().host_synchronizes;
  files.unlock_once();
  EXPECT_EQ(device_->counters().host_synchronizes, waits + 1);
  EXPECT_EQ(locked(), 0U);
}

TEST_F(LockedFilesTest, LargeUnitLeavesLockedWhatItHasNoNeedOf) {
  LockedFiles files(device_, {mapping_}, 12 * kPage, kPage);
  const std::vector<std::vector<std::size_t>> units = {
      {0}, {1, 2, 3, 4, 5, 6, 7}, {8}, {9, 10, 11, 12, 13, 14, 15}, {16}, {17, 18, 19, 20}};
  const auto pass = [&] {
    const std::uint64_t before = files.bytes_brought_in();
    for (const std::vector<std::size_t>& unit : units) {
      copy_pages(files, unit);
      EXPECT_LE(locked(), 12 * kPage);
    }
    return (files.bytes_brought_in() - before) / kPage;
  };
  EXPECT_EQ(pass(), 21U);
  pass();
  for (int i = 0; i < 3; ++i) {
    EXPECT_LE(pass(), 21U - 5U) << "five pages are beside the largest unit";
  }
}

TEST_F(LockedFilesTest, PagesThatFitTheHostAreKept) {
  HostLimits roomy;
  roomy.available_bytes = 32 * kPage;
  EXPECT_FALSE(LockedFiles(device_, {mapping_}, 16 * kPage, kPage, roomy).forgets_pages());
  roomy.cgroup_available_bytes = 31 * kPage;
  EXPECT_TRUE(LockedFiles(device_, {mapping_}, 16 * kPage, kPage, roomy).forgets_pages());
  EXPECT_FALSE(LockedFiles(device_, {mapping_}, 16 * kPage, kPage, HostLimits{}).forgets_pages())
      << "a host that says nothing";
}

TEST_F(LockedFilesTest, RefusalOfTheFirstChunkFailsAndLeavesNothingLocked) {
  device_->limit_bytes = kPage;
  LockedFiles files(device_, {mapping_}, LockedFiles::kNoLimit, 2 * kPage);
  EXPECT_THROW(files.lock({{mapping_->data(), 0, 9 * kPage}}), MemoryError);
  EXPECT_EQ(locked(), 0U);
}

TEST_F(LockedFilesTest, UnitLargerThanTheLimitFails) {
  LockedFiles files(device_, {mapping_}, 4 * kPage, 2 * kPage);
  EXPECT_THROW(files.lock(files.cut({{mapping_->data(), 0, 6 * kPage}})), MemoryError);
  EXPECT_NO_THROW(copy_pages(files, {0, 3})) << "and the next one is served";
}

TEST_F(LockedFilesTest, UnlocksAllAtTheEnd) {
  {
    LockedFiles files(device_, {mapping_}, LockedFiles::kNoLimit, 4 * kPage);
    copy_pages(files, {0, 31});
  }
  EXPECT_EQ(device_->counters().registrations, 0U);
}

TEST_F(LockedFilesTest, PagesThatCannotBeReadAreAnError) {
  LockedFiles files(device_, {mapping_}, LockedFiles::kNoLimit, 4 * kPage);
  ASSERT_EQ(truncate(file_.path().c_str(), static_cast<off_t>(8 * kPage)), 0);
  EXPECT_NO_THROW(files.lock({{mapping_->data(), 0, kPage}}));
  EXPECT_THROW(files.lock({{mapping_->data() + 12 * kPage, 0, kPage}}), StateError);
  EXPECT_EQ(locked(), 4 * kPage);
  EXPECT_THROW(files.check_unchanged(), StateError);
}

TEST_F(LockedFilesTest, ChunksSuitTheLimit) {
  constexpr std::size_t kMiB = std::size_t{1} << 20;
  EXPECT_EQ(LockedFiles::chunk_bytes_within(LockedFiles::kNoLimit), LockedFiles::kChunkBytes);
  EXPECT_EQ(LockedFiles::chunk_bytes_within(100 * kMiB), 3 * kMiB);
  EXPECT_EQ(LockedFiles::chunk_bytes_within(5), kMiB);
}

TEST_F(LockedFilesTest, OddChunksFail) {
  EXPECT_THROW(LockedFiles(device_, {mapping_}, 0, kPage + 1), ValueError);
  EXPECT_THROW(LockedFiles(device_, {mapping_}, 0, 0), ValueError);
}

// --- masters: pieces of an arena and views beside each other ------------------------------------

TEST_F(LockedFilesTest, MastersJoinNeighboursOfTheFileIntoOneCopy) {
  const auto view = [this](std::size_t offset, std::size_t size) {
    return std::make_shared<FileView>(std::vector<FileBlock>{{mapping_, offset, size}});
  };
  Masters masters(device_, {512, 512, 256, 1024}, {0},
                  {view(40, 512), view(552, 512), nullptr, view(4000, 1000)},
                  LockedFiles::kNoLimit);
  const std::vector<CopySegment> segments = masters.segments(0, 4, {0, 512, 1024, 1280});
  ASSERT_EQ(segments.size(), 3U);
  EXPECT_EQ(segments[0].size_bytes, 1024U);
  EXPECT_EQ(segments[0].source, mapping_->data() + 40);
  EXPECT_EQ(segments[1].offset, 1024U);
  EXPECT_EQ(segments[1].source, masters.arena(2).piece_memory(2));
  EXPECT_EQ(segments[2].size_bytes, 1024U) << "up to the end of its place";
  EXPECT_EQ(segments[2].offset, 1280U);
}

TEST_F(LockedFilesTest, EditedMasterLeavesTheFileAtTheSameAddress) {
  const auto view = std::make_shared<FileView>(std::vector<FileBlock>{{mapping_, 40, 5 * kPage}});
  {
    Masters masters(device_, {5 * kPage}, {0}, {view}, LockedFiles::kNoLimit);
    std::byte* const memory = masters.memory(0);
    EXPECT_FALSE(masters.is_edited(0));
    memory[77] ^= std::byte{1};
    EXPECT_TRUE(masters.is_edited(0));
    masters.make_own(0);
    EXPECT_FALSE(masters.is_in_file(0));
    EXPECT_EQ(masters.memory(0), memory);
    const std::vector<CopySegment> segments = masters.segments(0, 1, {0});
    ASSERT_EQ(segments.size(), 1U);
    EXPECT_EQ(segments[0].source, memory);
    EXPECT_EQ(memory[77], file_.bytes()[117] ^ std::byte{1});
    EXPECT_EQ(locked(), 6 * kPage);
  }
  EXPECT_EQ(locked(), 0U);
  EXPECT_EQ(view->data()[0], file_.bytes()[40]);
}

TEST_F(LockedFilesTest, LookForEditsReadsNoPagesThatTookTheirTurn) {
  const auto view =
      std::make_shared<FileView>(std::vector<FileBlock>{{mapping_, kPage, 30 * kPage}});
  Masters masters(device_, {30 * kPage}, {0}, {view}, 8 * kPage);
  ASSERT_TRUE(masters.files().takes_turns());
  const auto forget = [this] {
    const int descriptor = open(file_.path().c_str(), O_RDONLY | O_CLOEXEC);
    EXPECT_EQ(fdatasync(descriptor), 0);
    close(descriptor);
    mapping_->forget_pages(mapping_->data(), 32 * kPage);
  };
  const auto num_cached = [this] {
    std::vector<unsigned char> found(32);
    EXPECT_EQ(mincore(const_cast<std::byte*>(mapping_->data()), 32 * kPage, found.data()), 0);
    return std::count_if(found.begin(), found.end(),
                         [](unsigned char page) { return (page & 1U) != 0; });
  };
  forget();
  if (num_cached() != 0) {
    GTEST_SKIP() << "this file system keeps its pages in memory";
  }
  EXPECT_FALSE(masters.looks_edited(0));
  EXPECT_EQ(num_cached(), 0);
  // What no sample of words would find.
  masters.memory(0)[17 * kPage + 3] ^= std::byte{1};
  EXPECT_TRUE(masters.looks_edited(0));
}

}  // namespace
}  // namespace torch_offload
