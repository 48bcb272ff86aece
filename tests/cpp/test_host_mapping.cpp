#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"
#include "core/host_mapping.h"
#include "process_probe.h"

namespace torch_offload {
namespace {

const std::size_t kPage = HostMapping::page_bytes();
constexpr std::size_t kHugePage = std::size_t{2} << 20;

/// What `key` says in /proc/self/smaps of the mapping that holds `memory`, in bytes.
std::size_t smaps_bytes(const std::byte* memory, const std::string& key) {
  std::ifstream smaps("/proc/self/smaps");
  bool is_ours = false;
  for (std::string line; std::getline(smaps, line);) {
    std::uintptr_t begin = 0;
    std::uintptr_t end = 0;
    if (std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR " ", &begin, &end) == 2) {
      const auto address = reinterpret_cast<std::uintptr_t>(memory);
      is_ours = begin <= address && address < end;
    } else if (is_ours && line.rfind(key + ":", 0) == 0) {
      return std::strtoull(line.c_str() + key.size() + 1, nullptr, 10) * 1024;
    }
  }
  ADD_FAILURE() << "no " << key << " of that memory in /proc/self/smaps";
  return 0;
}

bool system_gives_huge_pages() {
  std::ifstream enabled("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string text;
  std::getline(enabled, text);
  return text.find("[madvise]") != std::string::npos || text.find("[always]") != std::string::npos;
}

TEST(HostMappingTest, TakesPagesOfTheNodeThatWasAskedFor) {
  constexpr int kPreferred = 1;
  HostMapping mapping(kPage, 0);
  mapping.take_pages(mapping.data(), kPage);
  int policy = -1;
  unsigned long mask[16] = {};
  if (syscall(SYS_get_mempolicy, &policy, mask, 16 * 8 * sizeof(unsigned long), mapping.data(),
              2 /* MPOL_F_ADDR */) != 0) {
    GTEST_SKIP() << "this system does not tell where memory is to come from";
  }
  EXPECT_EQ(policy, kPreferred);
  EXPECT_EQ(mask[0], 1UL);
  HostMapping anywhere(kPage);
  ASSERT_EQ(
      syscall(SYS_get_mempolicy, &policy, mask, 16 * 8 * sizeof(unsigned long), anywhere.data(), 2),
      0);
  EXPECT_EQ(policy, 0) << "without a node the system decides";
}

TEST(HostMappingTest, NodeThatIsNotThereIsAWishOnly) {
  for (const int node : {-1, 1000, 100000}) {
    HostMapping mapping(kPage, node);
    EXPECT_EQ(mapping.data()[0], std::byte{0});
  }
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

TEST(HostMappingTest, BeginsOnAHugePage) {
  for (const std::size_t size : {kPage, kHugePage, 3 * kHugePage + kPage}) {
    HostMapping mapping(size);
    EXPECT_EQ(mapping.size_bytes(), size);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(mapping.data()) % kHugePage, 0U);
  }
}

TEST(HostMappingTest, TakesNoMoreMemoryThanItsWholePages) {
  if (!system_tells_residency()) {
    GTEST_SKIP() << "this system does not tell which pages are there";
  }
  HostMapping small(kPage);
  HostMapping large(2 * kHugePage + 3 * kPage);
  EXPECT_EQ(resident_bytes(large.data(), large.size_bytes()), 0U) << "nothing was touched";
  small.take_pages(small.data(), kPage);
  EXPECT_EQ(resident_bytes(small.data(), kPage), kPage);
  large.take_pages(large.data() + 2 * kHugePage + kPage, 1);
  EXPECT_EQ(resident_bytes(large.data(), large.size_bytes()), kPage) << "no huge page at the end";
  large.take_pages(large.data(), large.size_bytes());
  EXPECT_EQ(resident_bytes(large.data(), large.size_bytes()), large.size_bytes());
}

TEST(HostMappingTest, WholeHugePagesAreHuge) {
  if (!system_gives_huge_pages()) {
    GTEST_SKIP() << "this system gives no huge pages";
  }
  HostMapping mapping(8 * kHugePage + kPage);
  mapping.take_pages(mapping.data(), mapping.size_bytes());
  // A system short of memory in one piece may give fewer.
  EXPECT_GT(smaps_bytes(mapping.data(), "AnonHugePages"), 0U);
  EXPECT_EQ(smaps_bytes(mapping.data() + 8 * kHugePage, "AnonHugePages"), 0U);
}

TEST(HostMappingTest, TakingPagesLeavesTheirBytes) {
  HostMapping mapping(10 * kHugePage);  // for several threads
  std::byte* const middle = mapping.data() + 9 * kHugePage + 5;
  *middle = std::byte{7};
  mapping.take_pages(mapping.data() + 1, mapping.size_bytes() - 1);
  EXPECT_EQ(*middle, std::byte{7});
  EXPECT_EQ(resident_bytes(mapping.data(), mapping.size_bytes()), mapping.size_bytes());
}

TEST(HostMappingTest, FillCopiesEveryByteWithSeveralThreads) {
  const std::size_t size = 9 * kHugePage + 12345;
  std::vector<std::byte> source(size);
  std::mt19937_64 generator(1);
  for (std::size_t index = 0; index + 8 <= size; index += 8) {
    const std::uint64_t word = generator();
    std::memcpy(source.data() + index, &word, sizeof(word));
  }
  HostMapping mapping(size + 3 * kPage);
  for (const std::size_t begin : {kPage, kPage + 256, std::size_t{1}}) {
    std::byte* const destination = mapping.data() + begin;
    mapping.fill(destination, source.data(), size);
    EXPECT_EQ(std::memcmp(destination, source.data(), size), 0);
    EXPECT_EQ(destination[-1], std::byte{0}) << "wrote before its begin";
    mapping.fill(destination, std::vector<std::byte>(size).data(), size);
  }
  EXPECT_EQ(mapping.data()[size + kPage + 256], std::byte{0}) << "wrote beyond its end";
}

TEST(HostMappingTest, ChildThatReadsDiesAndTheParentIsUnharmed) {
  HostMapping mapping(2 * kHugePage + kPage);
  mapping.data()[0] = std::byte{1};
  for (const std::size_t offset : {std::size_t{0}, 2 * kHugePage - 1, mapping.size_bytes() - 1}) {
    EXPECT_TRUE(died_of_segv(end_of_child([&] { return read_byte(mapping.data() + offset); })));
  }
  EXPECT_TRUE(died_of_segv(end_of_child([&] {
    *static_cast<volatile std::byte*>(mapping.data()) = std::byte{2};
    return 0;
  })));
  EXPECT_EQ(mapping.data()[0], std::byte{1});
}

TEST(HostMappingTest, NothingElseTakesTheAddressesInAChild) {
  HostMapping mapping(64 * kHugePage);
  const int status = end_of_child([&] {
    // What the child maps goes anywhere but there, although it would fit nowhere better.
    void* const other = mmap(mapping.data(), kPage, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const auto* const begin = static_cast<std::byte*>(other);
    return mapping.data() <= begin && begin < mapping.data() + mapping.size_bytes() ? 1 : 0;
  });
  EXPECT_TRUE(succeeded(status));
}

TEST(HostMappingTest, ForkCopiesNoPage) {
  if (!system_tells_residency()) {
    GTEST_SKIP() << "this system does not tell which pages are there";
  }
  HostMapping mapping(kHugePage);
  mapping.take_pages(mapping.data(), kHugePage);
  const int status =
      end_of_child([&] { return resident_bytes(mapping.data(), kHugePage) == 0 ? 0 : 1; });
  EXPECT_TRUE(succeeded(status));
}

TEST(HostMappingTest, GrandchildThatReadsDies) {
  HostMapping mapping(kPage);
  const int status = end_of_child([&] {
    return died_of_segv(end_of_child([&] { return read_byte(mapping.data()); })) ? 0 : 1;
  });
  EXPECT_TRUE(succeeded(status));
}

TEST(HostMappingTest, DestructorInAChildUnmapsAndLeavesTheParents) {
  auto mapping = std::make_unique<HostMapping>(kPage);
  std::byte* const memory = mapping->data();
  *memory = std::byte{1};
  const int status = end_of_child([&] {
    mapping.reset();
    return is_mapped(memory) ? 1 : 0;
  });
  EXPECT_TRUE(succeeded(status));
  EXPECT_EQ(*memory, std::byte{1});
}

TEST(HostMappingTest, WhatLiesAtTheAddressesInAChildAlreadyIsReportedAndKept) {
  auto mapping = std::make_unique<HostMapping>(kPage);
  std::byte* const memory = mapping->data();
  *memory = std::byte{4};
  // Stands for whatever may be there: a driver that undoes our advice, an earlier fork handler.
  ASSERT_EQ(madvise(memory, kPage, MADV_DOFORK), 0);
  ::testing::internal::CaptureStderr();
  const int status = end_of_child([&] {
    mapping.reset();
    return is_mapped(memory) && *memory == std::byte{4} ? 0 : 1;
  });
  const std::string warning = ::testing::internal::GetCapturedStderr();
  EXPECT_TRUE(succeeded(status));
  EXPECT_NE(warning.find("must not be read"), std::string::npos) << warning;
}

TEST(HostMappingTest, ForkAfterAMappingIsGoneTouchesNothing) {
  auto gone = std::make_unique<HostMapping>(kPage);
  std::byte* const memory = gone->data();
  gone.reset();
  void* const other = mmap(memory, kPage, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  ASSERT_EQ(other, memory);
  *memory = std::byte{6};
  EXPECT_TRUE(succeeded(end_of_child([&] { return *memory == std::byte{6} ? 0 : 1; })));
  munmap(other, kPage);
}

TEST(HostMappingTest, ForksBesideAThreadThatMakesMappingsAreWhole) {
  std::atomic<bool> stop{false};
  std::thread maker([&stop] {
    while (!stop.load()) {
      HostMapping mapping(kPage);
      *mapping.data() = std::byte{1};
    }
  });
  for (int round = 0; round < 50; ++round) {
    const int status = end_of_child([&] {
      HostMapping own(kPage);  // would wait for ever on a lock held by a thread that is not here
      return *own.data() == std::byte{0} ? 0 : 1;
    });
    EXPECT_TRUE(succeeded(status));
  }
  stop.store(true);
  maker.join();
}

}  // namespace
}  // namespace torch_offload
