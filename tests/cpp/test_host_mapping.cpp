#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <thread>

#include "core/error.h"
#include "core/host_mapping.h"

namespace torch_offload {
namespace {

const std::size_t kPage = HostMapping::page_bytes();

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

bool is_mapped(void* memory) {
  unsigned char resident = 0;
  return mincore(memory, 1, &resident) == 0 || errno != ENOMEM;
}

TEST(HostMappingTest, HoldsWholePagesOfZeros) {
  HostMapping mapping(kPage + 1);
  EXPECT_EQ(mapping.size_bytes(), 2 * kPage);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(mapping.data()) % kPage, 0U);
  EXPECT_TRUE(std::all_of(mapping.data(), mapping.data() + mapping.size_bytes(),
                          [](std::byte byte) { return byte == std::byte{0}; }));
}

TEST(HostMappingTest, ZeroBytesAreNothing) {
  HostMapping mapping(0);
  EXPECT_EQ(mapping.data(), nullptr);
  EXPECT_EQ(mapping.size_bytes(), 0U);
}

TEST(HostMappingTest, WholePagesRoundsUp) {
  EXPECT_EQ(HostMapping::whole_pages(0), 0U);
  EXPECT_EQ(HostMapping::whole_pages(1), kPage);
  EXPECT_EQ(HostMapping::whole_pages(kPage), kPage);
}

TEST(HostMappingTest, MoreThanThereAreAddressesThrows) {
  EXPECT_THROW(HostMapping(std::size_t{1} << 62), MemoryError);
}

TEST(HostMappingTest, DestructorUnmapsUnlessLeaked) {
  auto mapping = std::make_unique<HostMapping>(kPage);
  std::byte* const memory = mapping->data();
  mapping.reset();
  EXPECT_FALSE(is_mapped(memory));

  auto leaked = std::make_unique<HostMapping>(kPage);
  std::byte* const kept = leaked->data();
  *kept = std::byte{4};
  leaked->leak();
  leaked.reset();
  ASSERT_TRUE(is_mapped(kept));
  EXPECT_EQ(*kept, std::byte{4});
  munmap(kept, kPage);
}

TEST(HostMappingTest, ChildReadsAndWritesToItsOwnCopy) {
  HostMapping mapping(2 * kPage);
  std::byte* const memory = mapping.data();
  memory[0] = std::byte{1};
  const int status = status_of_child([&] {
    if (memory[0] != std::byte{1}) {
      return 1;
    }
    memory[0] = std::byte{2};
    memory[kPage] = std::byte{2};
    return memory[0] == std::byte{2} && memory[kPage] == std::byte{2} ? 0 : 2;
  });
  EXPECT_EQ(status, 0);
  EXPECT_EQ(memory[0], std::byte{1}) << "the child wrote into its parent's memory";
  EXPECT_EQ(memory[kPage], std::byte{0}) << "the child wrote into its parent's memory";
}

TEST(HostMappingTest, ChildReadsWhatADriverKeepsFromChildren) {
  HostMapping mapping(kPage);
  *mapping.data() = std::byte{1};
  ASSERT_EQ(madvise(mapping.data(), kPage, MADV_DONTFORK), 0);
  EXPECT_EQ(status_of_child([&] { return *mapping.data() == std::byte{1} ? 0 : 1; }), 0);
}

TEST(HostMappingTest, GrandchildReadsWhatTheChildWrote) {
  HostMapping mapping(kPage);
  const int status = status_of_child([&] {
    *mapping.data() = std::byte{2};
    const pid_t grandchild = fork();
    if (grandchild == 0) {
      _exit(*mapping.data() == std::byte{2} ? 0 : 1);
    }
    int inner = 1;
    waitpid(grandchild, &inner, 0);
    return WIFEXITED(inner) ? WEXITSTATUS(inner) : 2;
  });
  EXPECT_EQ(status, 0);
}

TEST(HostMappingTest, ForkLeavesTheParentOnThePagesThatADeviceReads) {
  HostMapping mapping(kPage);
  *mapping.data() = std::byte{1};
  // A second mapping of the same pages stands for the device, which knows pages, not addresses.
  void* const alias = mremap(mapping.data(), 0, kPage, MREMAP_MAYMOVE);  // size zero duplicates
  ASSERT_NE(alias, MAP_FAILED);
  EXPECT_EQ(status_of_child([&] { return *mapping.data() == std::byte{1} ? 0 : 1; }), 0);
  *mapping.data() = std::byte{3};
  EXPECT_EQ(*static_cast<std::byte*>(alias), std::byte{3});
  munmap(alias, kPage);
}

TEST(HostMappingTest, ForkAfterAMappingIsGoneTouchesNothing) {
  auto gone = std::make_unique<HostMapping>(kPage);
  HostMapping kept(kPage);
  *kept.data() = std::byte{5};
  std::byte* const memory = gone->data();
  gone.reset();
  void* const other = mmap(memory, kPage, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  ASSERT_EQ(other, memory);
  *memory = std::byte{6};
  const int status = status_of_child(
      [&] { return *memory == std::byte{6} && *kept.data() == std::byte{5} ? 0 : 1; });
  EXPECT_EQ(status, 0);
  munmap(other, kPage);
}

TEST(HostMappingTest, ForksBesideAThreadThatMakesMappingsAreWhole) {
  HostMapping kept(kPage);
  *kept.data() = std::byte{5};
  std::atomic<bool> stop{false};
  std::thread maker([&stop] {
    while (!stop.load()) {
      HostMapping mapping(kPage);
      *mapping.data() = std::byte{1};
    }
  });
  for (int round = 0; round < 50; ++round) {
    const int status = status_of_child([&] {
      HostMapping own(kPage);  // would wait for ever on a lock held by a thread that is not here
      return *kept.data() == std::byte{5} && *own.data() == std::byte{0} ? 0 : 1;
    });
    EXPECT_EQ(status, 0);
  }
  stop.store(true);
  maker.join();
}

}  // namespace
}  // namespace torch_offload
