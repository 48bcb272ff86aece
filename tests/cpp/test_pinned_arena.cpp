#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/pinned_arena.h"
#include "process_probe.h"

namespace torch_offload {
namespace {

const std::size_t kPage = HostMapping::page_bytes();
/// A device that only registers, and refuses to where it is told.
class RegistrarDevice : public Device {
 public:
  std::map<std::byte*, std::size_t> registered;
  std::size_t max_registrations = SIZE_MAX;
  bool refuses_to_unregister = false;

  const std::string& stream_name(StreamId) const override { return name_; }

 protected:
  StreamId do_create_stream(const StreamOptions&) override { return 0; }
  StreamId do_current_stream() override { return 0; }
  void do_set_current_stream(StreamId) override {}
  EventId do_create_event() override { return 0; }
  void do_record(EventId, StreamId) override {}
  void do_wait(StreamId, EventId) override {}
  bool do_is_done(EventId) override { return true; }
  void do_synchronize(StreamId) override {}
  void do_copy(StreamId, const Copy& copy) override {
    std::memcpy(copy.destination, copy.source, copy.size_bytes);
  }
  void do_fill(StreamId, void*, std::size_t, std::uint8_t) override {}
  void* do_allocate(std::size_t) override { return nullptr; }
  void do_free(void*) override {}
  void do_register_host(void* memory, std::size_t size_bytes) override {
    if (registered.size() >= max_registrations) {
      throw MemoryError("the device refuses " + std::to_string(size_bytes) + " bytes");
    }
    registered.emplace(static_cast<std::byte*>(memory), size_bytes);
  }
  void do_unregister_host(void* memory) override {
    if (refuses_to_unregister) {
      throw MemoryError("the device keeps it");
    }
    registered.erase(static_cast<std::byte*>(memory));
  }

 private:
  std::string name_ = "none";
};

std::vector<std::byte> random_bytes(std::size_t size_bytes, unsigned seed) {
  std::mt19937_64 generator(seed);
  std::vector<std::byte> bytes(size_bytes);
  for (std::size_t index = 0; index + sizeof(std::uint64_t) <= size_bytes;
       index += sizeof(std::uint64_t)) {
    const std::uint64_t word = generator();
    std::memcpy(bytes.data() + index, &word, sizeof(word));
  }
  return bytes;
}

class PinnedArenaTest : public ::testing::Test {
 protected:
  /// Throws if the source crosses from one registration into another.
  void copy(std::byte* destination, const std::byte* source, std::size_t size_bytes) {
    Copy copy;
    copy.destination = destination;
    copy.source = source;
    copy.size_bytes = size_bytes;
    device_->copy(0, copy);
  }

  std::shared_ptr<RegistrarDevice> device_ = std::make_shared<RegistrarDevice>();
};

TEST_F(PinnedArenaTest, SmallPiecesShareOneChunkWithoutGaps) {
  PinnedArena arena(device_, {256, 512, 1024});
  EXPECT_EQ(arena.num_pieces(), 3U);
  EXPECT_EQ(arena.num_chunks(), 1U);
  EXPECT_EQ(arena.size_bytes(), kPage);
  EXPECT_EQ(arena.piece_memory(1), arena.piece_memory(0) + 256);
  EXPECT_EQ(arena.piece_memory(2), arena.piece_memory(1) + 512);
  EXPECT_EQ(arena.piece_bytes(2), 1024U);
}

TEST_F(PinnedArenaTest, ChunkTakesWholePiecesUpToItsLimit) {
  PinnedArena arena(device_, {kPage, kPage - 256, 256, 256}, 2 * kPage);
  ASSERT_EQ(arena.num_chunks(), 2U);
  EXPECT_EQ(arena.piece_memory(3), arena.piece_memory(0) + 2 * kPage);
  arena.seal_up_to(3);
  EXPECT_EQ(device_->registered.at(arena.piece_memory(0)), 2 * kPage);
  EXPECT_EQ(device_->registered.at(arena.piece_memory(3)), kPage);
}

TEST_F(PinnedArenaTest, LargePieceIsOneChunkOfItsOwn) {
  PinnedArena arena(device_, {256, 5 * kPage + 256, 256}, 2 * kPage);
  ASSERT_EQ(arena.num_chunks(), 3U);
  EXPECT_EQ(arena.piece_memory(2), arena.piece_memory(1) + 6 * kPage);
  arena.seal_up_to(2);
  EXPECT_EQ(device_->registered.at(arena.piece_memory(1)), 6 * kPage) << "not in one call";
  const std::vector<CopySegment> segments = arena.segments(1, 2);
  ASSERT_EQ(segments.size(), 1U);
  EXPECT_EQ(segments[0].source, arena.piece_memory(1));
  EXPECT_EQ(segments[0].offset, 0U);
  EXPECT_EQ(segments[0].size_bytes, 5 * kPage + 256);
}

TEST_F(PinnedArenaTest, SegmentsAreOnePerChunkAndSkipTheGapsBetweenChunks) {
  PinnedArena arena(device_, {256, 256, kPage, 512, 0, 256, 2 * kPage}, 2 * kPage);
  ASSERT_EQ(arena.num_chunks(), 2U);
  const std::vector<CopySegment> all = arena.segments(0, 7);
  ASSERT_EQ(all.size(), 2U);
  EXPECT_EQ(all[0].source, arena.piece_memory(0));
  EXPECT_EQ(all[0].size_bytes, kPage + 1280);
  EXPECT_EQ(all[1].source, arena.piece_memory(6));
  EXPECT_EQ(all[1].offset, kPage + 1280);
  const std::vector<CopySegment> some = arena.segments(1, 4);
  ASSERT_EQ(some.size(), 1U);
  EXPECT_EQ(some[0].source, arena.piece_memory(1));
  EXPECT_EQ(some[0].offset, 0U);
  EXPECT_EQ(some[0].size_bytes, kPage + 768);
  EXPECT_TRUE(arena.segments(4, 5).empty()) << "a piece of no bytes";
  EXPECT_TRUE(arena.segments(7, 7).empty());
}

TEST_F(PinnedArenaTest, OneCopyCarriesARunUpToTwiceTheLimit) {
  const std::vector<std::size_t> sizes{kPage, kPage, 3 * kPage, kPage, kPage, 256, 256};
  // Of two pages, of four, and of a page and a bit.
  PinnedArena arena(device_, sizes, 2 * kPage, {0, 2, 4});
  EXPECT_EQ(arena.segments(0, 2).size(), 1U);
  EXPECT_EQ(arena.segments(2, 4).size(), 1U);
  EXPECT_EQ(arena.segments(4, 7).size(), 1U);
  EXPECT_EQ(arena.num_chunks(), 3U);
  arena.seal_up_to(6);
  EXPECT_EQ(device_->registered.at(arena.piece_memory(2)), 4 * kPage);
  // Without their names the same pieces take the chunks as they come.
  const PinnedArena plain(device_, sizes, 2 * kPage);
  EXPECT_EQ(plain.segments(2, 4).size(), 2U);
}

TEST_F(PinnedArenaTest, LargerRunIsSplitBetweenItsPieces) {
  const PinnedArena arena(device_, {kPage, 2 * kPage, 2 * kPage, kPage, kPage}, 2 * kPage, {0, 1});
  EXPECT_EQ(arena.segments(1, 5).size(), 3U);
}

TEST_F(PinnedArenaTest, SmallRunsShareAChunkAndEmptyOnesTakeNone) {
  const PinnedArena arena(device_, {256, 256, 0, 0, 512}, 2 * kPage, {0, 2, 4});
  EXPECT_EQ(arena.num_chunks(), 1U);
  EXPECT_EQ(arena.segments(0, 5).size(), 1U);
}

TEST_F(PinnedArenaTest, RunsOutOfOrderThrow) {
  using Runs = std::vector<PieceIndex>;
  for (const Runs& runs : {Runs{1, 0}, Runs{0, 0}, Runs{0, 2}}) {
    EXPECT_THROW(PinnedArena(device_, {256, 256}, 2 * kPage, runs), IndexError);
  }
}

TEST_F(PinnedArenaTest, EmptyPiecesAndEmptyArena) {
  PinnedArena none(device_, {});
  EXPECT_EQ(none.size_bytes(), 0U);
  EXPECT_TRUE(none.segments(0, 0).empty());
  PinnedArena arena(device_, {0, 256, 0, 0});
  EXPECT_TRUE(arena.is_sealed(0));
  EXPECT_FALSE(arena.is_sealed(1));
  arena.fill(0, nullptr, 0);
  arena.prepare(3);
  EXPECT_TRUE(device_->registered.empty());
  arena.seal_up_to(1);
  EXPECT_TRUE(arena.is_sealed(1));
  EXPECT_TRUE(arena.is_sealed(3));
  EXPECT_EQ(arena.registered_bytes(), kPage);
}

TEST_F(PinnedArenaTest, AnyLayoutCanBeCopiedPieceByPieceAndSegmentBySegment) {
  std::mt19937 generator(7);
  for (int round = 0; round < 30; ++round) {
    std::vector<std::size_t> sizes(1 + generator() % 20);
    std::size_t total = 0;
    for (std::size_t& size : sizes) {
      size = kAlignmentBytes * (generator() % 100);
      total += size;
    }
    const std::size_t chunk_bytes = kPage * (1 + generator() % 4);
    PinnedArena arena(device_, sizes, chunk_bytes);
    EXPECT_LE(arena.size_bytes(), total + arena.num_chunks() * (kPage - 1));
    std::vector<std::byte> originals;
    for (PieceIndex piece = 0; piece < sizes.size(); ++piece) {
      const std::vector<std::byte> original = random_bytes(sizes[piece], piece);
      originals.insert(originals.end(), original.begin(), original.end());
      if (generator() % 4 == 0) {
        arena.prepare(piece);
        EXPECT_TRUE(arena.is_sealed(piece));
      }
      arena.fill(piece, original.data(), sizes[piece]);
      arena.seal_up_to(piece);
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(arena.piece_memory(piece)) % kAlignmentBytes, 0U);
    }
    EXPECT_EQ(arena.registered_bytes(), arena.size_bytes());
    EXPECT_EQ(device_->registered.size(), arena.num_chunks());
    std::vector<std::byte> place(total);
    std::size_t end = 0;
    for (PieceIndex piece = 0; piece < arena.num_pieces(); ++piece) {
      ASSERT_TRUE(arena.is_sealed(piece));
      if (arena.piece_bytes(piece) > 0) {
        copy(place.data() + end, arena.piece_memory(piece), arena.piece_bytes(piece));
      }
      end += arena.piece_bytes(piece);
    }
    EXPECT_EQ(place, originals);

    const PieceIndex first = generator() % sizes.size();
    std::size_t offset = 0;
    for (PieceIndex piece = 0; piece < first; ++piece) {
      offset += sizes[piece];
    }
    std::fill(place.begin(), place.end(), std::byte{0});
    end = 0;
    for (const CopySegment& segment : arena.segments(first, sizes.size())) {
      EXPECT_EQ(segment.offset, end);
      EXPECT_GT(segment.size_bytes, 0U);
      end += segment.size_bytes;
      copy(place.data() + segment.offset, segment.source, segment.size_bytes);
    }
    EXPECT_EQ(end, total - offset);
    EXPECT_EQ(std::memcmp(place.data(), originals.data() + offset, end), 0);
  }
  EXPECT_TRUE(device_->registered.empty()) << "every arena took its registrations with it";
}

TEST_F(PinnedArenaTest, ChunkIsRegisteredWithItsLastPieceAndNotBefore) {
  PinnedArena arena(device_, {kPage, kPage, kPage}, 2 * kPage);
  EXPECT_TRUE(device_->registered.empty());
  arena.seal_up_to(0);
  EXPECT_TRUE(device_->registered.empty());
  EXPECT_FALSE(arena.is_sealed(0));
  arena.seal_up_to(1);
  EXPECT_EQ(device_->registered.size(), 1U);
  EXPECT_TRUE(arena.is_sealed(0));
  EXPECT_FALSE(arena.is_sealed(2));
  arena.seal_up_to(0);  // behind us: nothing to do
  arena.seal_up_to(2);
  arena.seal_up_to(2);
  EXPECT_EQ(device_->registered.size(), 2U);
}

TEST_F(PinnedArenaTest, PreparedChunkIsRegisteredAtOnceAndHoldsWhatItsPiecesHold) {
  const std::vector<std::byte> source = random_bytes(kPage, 1);
  PinnedArena arena(device_, {kPage, kPage, kPage, kPage}, 2 * kPage);
  arena.fill(0, source.data(), kPage);
  arena.prepare(3);
  EXPECT_TRUE(arena.is_sealed(2)) << "of the same chunk";
  EXPECT_FALSE(arena.is_sealed(0)) << "of an earlier chunk";
  arena.prepare(1);
  EXPECT_EQ(device_->registered.size(), 2U);
  arena.prepare(0);  // and again: nothing to do
  arena.seal_up_to(3);
  EXPECT_EQ(device_->registered.size(), 2U);
  EXPECT_EQ(arena.registered_bytes(), 4 * kPage);
  EXPECT_EQ(std::memcmp(arena.piece_memory(0), source.data(), kPage), 0);
  arena.fill(3, source.data(), kPage);
  EXPECT_EQ(std::memcmp(arena.piece_memory(3), source.data(), kPage), 0);
}

TEST_F(PinnedArenaTest, SealingPassesOverAPreparedChunk) {
  PinnedArena arena(device_, {kPage, kPage, kPage}, kPage);
  arena.prepare(1);
  arena.seal_up_to(2);
  EXPECT_EQ(device_->registered.size(), 3U);
}

TEST_F(PinnedArenaTest, PagesAreTakenWithTheirChunkOrAsTheyAreFilledAndNoMore) {
  if (!system_tells_residency()) {
    GTEST_SKIP() << "this system does not tell which pages are there";
  }
  const std::size_t size = std::size_t{32} << 20;
  const std::vector<std::byte> source = random_bytes(size, 2);
  PinnedArena arena(device_, {size, size, size, size}, 2 * size);
  const auto resident = [&arena] {
    return resident_bytes(arena.piece_memory(0), arena.size_bytes());
  };
  EXPECT_EQ(resident(), 0U);
  arena.fill(0, source.data(), size);
  EXPECT_EQ(resident(), size);
  arena.prepare(3);
  EXPECT_EQ(resident(), 3 * size);
}

TEST_F(PinnedArenaTest, FillKeepsToItsPiece) {
  const std::size_t size = (std::size_t{40} << 20) + 3 * kAlignmentBytes;
  const std::vector<std::byte> source = random_bytes(size, 1);
  PinnedArena arena(device_, {256, size, 256});
  arena.fill(1, source.data(), size - 1);
  EXPECT_EQ(std::memcmp(arena.piece_memory(1), source.data(), size - 1), 0);
  EXPECT_EQ(arena.piece_memory(1)[size - 1], std::byte{0}) << "wrote more than it was given";
  EXPECT_EQ(*(arena.piece_memory(1) - 1), std::byte{0}) << "wrote before its begin";
  EXPECT_EQ(*arena.piece_memory(2), std::byte{0}) << "wrote beyond its end";
}

TEST_F(PinnedArenaTest, FillIsLoggedAsAWriteOfTheHost) {
  PinnedArena arena(device_, {256, 512});
  const std::vector<std::byte> source(512);
  OpLog log;
  device_->attach_log(&log);
  arena.fill(1, source.data(), 500);
  device_->attach_log(nullptr);
  ASSERT_EQ(log.ops().size(), 1U);
  EXPECT_EQ(log.ops()[0].kind, OpKind::kHostWrite);
  EXPECT_EQ(log.ops()[0].unit, kNoUnit);
  EXPECT_EQ(log.ops()[0].memory.begin, reinterpret_cast<std::uintptr_t>(arena.piece_memory(1)));
  EXPECT_EQ(log.ops()[0].memory.size_bytes(), 500U);
}

TEST_F(PinnedArenaTest, FillBeyondThePieceThrows) {
  PinnedArena arena(device_, {256, 256});
  std::vector<std::byte> source(512);
  EXPECT_THROW(arena.fill(0, source.data(), 257), InternalError);
  EXPECT_THROW(arena.fill(0, source.data(), SIZE_MAX), InternalError);
}

TEST_F(PinnedArenaTest, UnknownPieceThrows) {
  PinnedArena arena(device_, {256});
  EXPECT_THROW(arena.piece_memory(1), IndexError);
  EXPECT_THROW(arena.piece_bytes(1), IndexError);
  EXPECT_THROW(arena.fill(1, nullptr, 0), IndexError);
  EXPECT_THROW(arena.prepare(1), IndexError);
  EXPECT_THROW(arena.seal_up_to(SIZE_MAX), IndexError);
  EXPECT_THROW(arena.is_sealed(1), IndexError);
  EXPECT_THROW(arena.segments(0, 2), IndexError);
  EXPECT_THROW(arena.segments(1, 0), IndexError);
}

TEST_F(PinnedArenaTest, UnalignedSizesThrow) {
  EXPECT_THROW(PinnedArena(device_, {100}), ValueError);
  EXPECT_THROW(PinnedArena(device_, {256}, kPage + 1), ValueError);
  EXPECT_THROW(PinnedArena(device_, {256}, 0), ValueError);
}

TEST_F(PinnedArenaTest, MoreThanThereAreAddressesThrowsMemoryError) {
  EXPECT_THROW(PinnedArena(device_, {(std::size_t{1} << 62)}, std::size_t{1} << 62), MemoryError);
}

TEST_F(PinnedArenaTest, RefusedRegistrationNamesTheLimitsAndLeavesOrdinaryMemory) {
  device_->max_registrations = 1;
  const std::vector<std::byte> source = random_bytes(kPage, 3);
  {
    PinnedArena arena(device_, {kPage, kPage}, kPage);
    arena.fill(0, source.data(), kPage);
    arena.fill(1, source.data(), kPage);
    try {
      arena.seal_up_to(1);
      FAIL() << "no error";
    } catch (const MemoryError& error) {
      const std::string text = error.what();
      for (const char* piece :
           {"the device refuses 4096 bytes", "of 8.00 KiB", "4.00 KiB are", "ulimit -l"}) {
        EXPECT_NE(text.find(piece), std::string::npos) << piece << " is not in: " << text;
      }
    }
    EXPECT_TRUE(arena.is_sealed(0));
    EXPECT_FALSE(arena.is_sealed(1));
    EXPECT_EQ(std::memcmp(arena.piece_memory(1), source.data(), kPage), 0);
    arena.fill(1, source.data() + 1, kPage - 1);

    device_->max_registrations = 2;  // and the call may be tried again
    arena.seal_up_to(1);
    EXPECT_TRUE(arena.is_sealed(1));
  }
  EXPECT_TRUE(device_->registered.empty());
}

TEST_F(PinnedArenaTest, RefusedLargePieceSaysWhyAndWhatToDo) {
  device_->max_registrations = 0;
  PinnedArena arena(device_, {kPage, 3 * kPage}, kPage);
  const auto text_of = [](auto&& call) -> std::string {
    try {
      call();
    } catch (const MemoryError& error) {
      return error.what();
    }
    return "no error";
  };
  const std::string small = text_of([&] { arena.seal_up_to(0); });
  EXPECT_NE(small.find("offload fewer weights"), std::string::npos) << small;
  EXPECT_EQ(small.find("resident="), std::string::npos) << small;
  const std::string large = text_of([&] { arena.prepare(1); });
  for (const char* piece : {"one parameter of 12.00 KiB", "more than 4 GiB", "resident=[...]"}) {
    EXPECT_NE(large.find(piece), std::string::npos) << piece << " is not in: " << large;
  }
  EXPECT_FALSE(arena.is_sealed(1));
}

TEST_F(PinnedArenaTest, DestructorUnregistersThenUnmaps) {
  void* memory = nullptr;
  {
    PinnedArena arena(device_, {kPage});
    memory = arena.piece_memory(0);
    arena.seal_up_to(0);
    ASSERT_TRUE(is_mapped(memory));
  }
  EXPECT_TRUE(device_->registered.empty());
  EXPECT_FALSE(is_mapped(memory));
}

TEST_F(PinnedArenaTest, MemoryThatCannotBeUnregisteredStaysMappedAndIsReported) {
  device_->refuses_to_unregister = true;
  std::byte* memory = nullptr;
  ::testing::internal::CaptureStderr();
  {
    PinnedArena arena(device_, {kPage});
    memory = arena.piece_memory(0);
    arena.seal_up_to(0);
    *memory = std::byte{7};
  }
  const std::string warning = ::testing::internal::GetCapturedStderr();
  EXPECT_NE(warning.find("the device keeps it"), std::string::npos) << warning;
  ASSERT_TRUE(is_mapped(memory));
  EXPECT_EQ(*memory, std::byte{7});
}

TEST_F(PinnedArenaTest, KeepsItsDeviceAlive) {
  std::weak_ptr<RegistrarDevice> device = device_;
  auto arena = std::make_unique<PinnedArena>(device_, std::vector<std::size_t>{256});
  arena->seal_up_to(0);
  device_.reset();
  EXPECT_FALSE(device.expired());
  arena.reset();
  EXPECT_TRUE(device.expired());
}

TEST_F(PinnedArenaTest, ForkedChildThatReadsAMasterDies) {
  PinnedArena arena(device_, {kPage, kPage});
  const std::vector<std::byte> source(kPage, std::byte{1});
  arena.fill(0, source.data(), kPage);
  arena.seal_up_to(1);
  EXPECT_TRUE(died_of_segv(end_of_child([&] { return read_byte(arena.piece_memory(0)); })));
  EXPECT_EQ(*arena.piece_memory(0), std::byte{1});
}

TEST_F(PinnedArenaTest, ForkedChildIsRefusedAndNeverCallsTheDevice) {
  auto arena =
      std::make_unique<PinnedArena>(device_, std::vector<std::size_t>{kPage, kPage}, kPage);
  arena->seal_up_to(0);
  const std::vector<std::byte> source(kPage);
  const int status = end_of_child([&] {
    int refused = 0;
    const auto attempt = [&refused](auto&& call) {
      try {
        call();
      } catch (const StateError&) {
        ++refused;
      }
    };
    attempt([&] { arena->seal_up_to(1); });
    attempt([&] { arena->prepare(1); });
    attempt([&] { arena->fill(1, source.data(), kPage); });
    arena.reset();
    return refused == 3 && device_->registered.size() == 1 ? 0 : 1;
  });
  EXPECT_TRUE(succeeded(status));
  EXPECT_TRUE(arena->is_sealed(0));
  arena->seal_up_to(1);
  EXPECT_EQ(device_->registered.size(), 2U);
}

}  // namespace
}  // namespace torch_offload
