#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/pinned_arena.h"

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

bool is_mapped(void* memory) {
  unsigned char resident = 0;
  return mincore(memory, 1, &resident) == 0 || errno != ENOMEM;
}

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

std::size_t shared_resident_bytes() {
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word) {
    if (word == "RssShmem:") {
      std::size_t kib = 0;
      status >> kib;
      return kib * 1024;
    }
  }
  ADD_FAILURE() << "no RssShmem in /proc/self/status";
  return 0;
}

class PinnedArenaTest : public ::testing::Test {
 protected:
  std::shared_ptr<RegistrarDevice> device_ = std::make_shared<RegistrarDevice>();
};

TEST_F(PinnedArenaTest, SmallUnitsShareOneChunkWithoutGaps) {
  PinnedArena arena(device_, {256, 512, 1024});
  EXPECT_EQ(arena.num_units(), 3U);
  EXPECT_EQ(arena.num_chunks(), 1U);
  EXPECT_EQ(arena.size_bytes(), kPage);
  EXPECT_EQ(arena.unit_memory(1), arena.unit_memory(0) + 256);
  EXPECT_EQ(arena.unit_memory(2), arena.unit_memory(1) + 512);
  EXPECT_EQ(arena.unit_bytes(2), 1024U);
}

TEST_F(PinnedArenaTest, ChunkTakesWholeUnitsUpToItsLimit) {
  PinnedArena arena(device_, {kPage, kPage - 256, 256, 256}, 2 * kPage);
  ASSERT_EQ(arena.num_chunks(), 2U);
  EXPECT_EQ(arena.unit_memory(3), arena.unit_memory(0) + 2 * kPage);
  arena.seal_up_to(3);
  EXPECT_EQ(device_->registered.at(arena.unit_memory(0)), 2 * kPage);
  EXPECT_EQ(device_->registered.at(arena.unit_memory(3)), kPage);
}

TEST_F(PinnedArenaTest, LargeUnitSpansChunksOfItsOwn) {
  PinnedArena arena(device_, {256, 5 * kPage + 256, 256}, 2 * kPage);
  EXPECT_EQ(arena.num_chunks(), 5U);  // one, three of the large unit, one
  const auto& segments = arena.segments(1);
  ASSERT_EQ(segments.size(), 3U);
  EXPECT_EQ(segments[0].size_bytes, 2 * kPage);
  EXPECT_EQ(segments[2].offset, 4 * kPage);
  EXPECT_EQ(segments[2].size_bytes, kPage + 256);
  EXPECT_EQ(arena.segments(0).size(), 1U);
  EXPECT_EQ(arena.segments(2).size(), 1U);
  EXPECT_EQ(arena.unit_memory(2), arena.unit_memory(1) + 6 * kPage);
}

TEST_F(PinnedArenaTest, UnitOfExactlyOneChunkIsOneSegment) {
  PinnedArena arena(device_, {2 * kPage, 4 * kPage}, 2 * kPage);
  EXPECT_EQ(arena.num_chunks(), 3U);
  EXPECT_EQ(arena.segments(0).size(), 1U);
  EXPECT_EQ(arena.segments(1).size(), 2U);
}

TEST_F(PinnedArenaTest, EmptyUnitsAndEmptyArena) {
  PinnedArena none(device_, {});
  EXPECT_EQ(none.size_bytes(), 0U);
  PinnedArena arena(device_, {0, 256, 0, 0});
  EXPECT_TRUE(arena.segments(0).empty());
  EXPECT_TRUE(arena.is_sealed(0));
  EXPECT_FALSE(arena.is_sealed(1));
  arena.fill(0, 0, nullptr, 0);
  arena.seal_up_to(1);
  EXPECT_TRUE(arena.is_sealed(3));
  EXPECT_EQ(arena.registered_bytes(), kPage);
}

TEST_F(PinnedArenaTest, AnyLayoutCanBeCopiedSegmentBySegment) {
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
    std::vector<std::vector<std::byte>> originals;
    for (UnitIndex unit = 0; unit < sizes.size(); ++unit) {
      originals.push_back(random_bytes(sizes[unit], unit));
      arena.fill(unit, 0, originals.back().data(), sizes[unit]);
      arena.seal_up_to(unit);
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(arena.unit_memory(unit)) % kAlignmentBytes, 0U);
    }
    EXPECT_EQ(arena.registered_bytes(), arena.size_bytes());
    EXPECT_EQ(device_->registered.size(), arena.num_chunks());
    for (UnitIndex unit = 0; unit < sizes.size(); ++unit) {
      ASSERT_TRUE(arena.is_sealed(unit));
      std::vector<std::byte> place(sizes[unit]);
      std::size_t end = 0;
      for (const CopySegment& segment : arena.segments(unit)) {
        EXPECT_EQ(segment.offset, end);
        EXPECT_GT(segment.size_bytes, 0U);
        end += segment.size_bytes;
        Copy copy;
        copy.destination = place.data() + segment.offset;
        copy.source = segment.source;
        copy.size_bytes = segment.size_bytes;
        device_->copy(0, copy);  // throws if the source crosses a registration
      }
      EXPECT_EQ(end, sizes[unit]);
      EXPECT_EQ(place, originals[unit]);
    }
  }
  EXPECT_TRUE(device_->registered.empty()) << "every arena took its registrations with it";
}

TEST_F(PinnedArenaTest, ChunkIsRegisteredWithItsLastUnitAndNotBefore) {
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

TEST_F(PinnedArenaTest, FillCopiesEveryByteWithSeveralThreads) {
  const std::size_t size = (std::size_t{40} << 20) + 3 * kAlignmentBytes;
  const std::vector<std::byte> source = random_bytes(size + 1, 1);
  PinnedArena arena(device_, {256, size, 256});
  arena.fill(1, 1, source.data(), size - 1);  // both ends unaligned
  EXPECT_EQ(std::memcmp(arena.unit_memory(1) + 1, source.data(), size - 1), 0);
  EXPECT_EQ(*arena.unit_memory(1), std::byte{0});
  EXPECT_EQ(*(arena.unit_memory(1) - 1), std::byte{0}) << "wrote before its begin";
  EXPECT_EQ(*arena.unit_memory(2), std::byte{0}) << "wrote beyond its end";
}

TEST_F(PinnedArenaTest, PagesAreTakenAsTheyAreFilledAndNoMore) {
  const std::size_t size = std::size_t{32} << 20;
  const std::vector<std::byte> source = random_bytes(size, 2);
  const std::size_t before = shared_resident_bytes();
  PinnedArena arena(device_, {size, size});
  EXPECT_LT(shared_resident_bytes() - before, std::size_t{1} << 20);
  arena.fill(0, 0, source.data(), size);
  const std::size_t half = shared_resident_bytes() - before;
  // A huge page may have come with the last bytes, where the system gives huge pages.
  EXPECT_GE(half, size);
  EXPECT_LE(half, size + (std::size_t{2} << 20));
}

TEST_F(PinnedArenaTest, FillBeyondTheUnitThrows) {
  PinnedArena arena(device_, {256, 256});
  std::vector<std::byte> source(512);
  EXPECT_THROW(arena.fill(0, 1, source.data(), 256), InternalError);
  EXPECT_THROW(arena.fill(0, 257, source.data(), 0), InternalError);
  EXPECT_THROW(arena.fill(0, 1, source.data(), SIZE_MAX), InternalError);
}

TEST_F(PinnedArenaTest, UnknownUnitThrows) {
  PinnedArena arena(device_, {256});
  EXPECT_THROW(arena.unit_memory(1), IndexError);
  EXPECT_THROW(arena.segments(1), IndexError);
  EXPECT_THROW(arena.seal_up_to(kNoUnit), IndexError);
  EXPECT_THROW(arena.is_sealed(1), IndexError);
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
    arena.fill(0, 0, source.data(), kPage);
    arena.fill(1, 0, source.data(), kPage);
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
    EXPECT_EQ(std::memcmp(arena.unit_memory(1), source.data(), kPage), 0);
    arena.fill(1, 0, source.data() + 1, kPage - 1);

    device_->max_registrations = 2;  // and the call may be tried again
    arena.seal_up_to(1);
    EXPECT_TRUE(arena.is_sealed(1));
  }
  EXPECT_TRUE(device_->registered.empty());
}

TEST_F(PinnedArenaTest, DestructorUnregistersThenUnmaps) {
  void* memory = nullptr;
  {
    PinnedArena arena(device_, {kPage});
    memory = arena.unit_memory(0);
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
    memory = arena.unit_memory(0);
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

/// Runs `body` in a forked child and returns the status that it returns.
template <typename Body>
int status_of_child(Body body) {
  const pid_t child = fork();
  if (child == 0) {
    _exit(body());
  }
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << "killed by signal " << WTERMSIG(status);
  return WEXITSTATUS(status);
}

TEST_F(PinnedArenaTest, ForkedChildReadsMastersAndFillsItsOwnCopy) {
  PinnedArena arena(device_, {kPage, kPage});
  const std::vector<std::byte> source(kPage, std::byte{1});
  arena.fill(0, 0, source.data(), kPage);
  arena.seal_up_to(1);
  const int status = status_of_child([&] {
    if (std::memcmp(arena.unit_memory(0), source.data(), kPage) != 0) {
      return 1;
    }
    arena.fill(1, 0, source.data(), kPage);
    return std::memcmp(arena.unit_memory(1), source.data(), kPage) == 0 ? 0 : 2;
  });
  EXPECT_EQ(status, 0);
  EXPECT_EQ(*arena.unit_memory(1), std::byte{0}) << "the child wrote into its parent's weights";
}

TEST_F(PinnedArenaTest, ForkedChildNeverCallsTheDevice) {
  auto arena =
      std::make_unique<PinnedArena>(device_, std::vector<std::size_t>{kPage, kPage}, kPage);
  arena->seal_up_to(0);
  const int status = status_of_child([&] {
    try {
      arena->seal_up_to(1);
      return 1;
    } catch (const StateError&) {
    }
    arena.reset();
    return device_->registered.size() == 1 ? 0 : 2;
  });
  EXPECT_EQ(status, 0);
  EXPECT_TRUE(arena->is_sealed(0));
  arena->seal_up_to(1);
  EXPECT_EQ(device_->registered.size(), 2U);
}

}  // namespace
}  // namespace torch_offload
