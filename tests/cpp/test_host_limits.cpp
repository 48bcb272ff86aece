#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <locale>
#include <string>

#include "core/error.h"
#include "core/host_limits.h"

namespace torch_offload {
namespace {

constexpr std::size_t kGiB = std::size_t{1} << 30;

/// A folder that stands for "/", with the files that a test puts there.
class HostLimitsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "host_limits_XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    root_ = name;
    // The environment of whoever runs the tests must not decide them.
    unsetenv("TORCH_OFFLOAD_HOST_MEMORY_CHECK");
    write("/proc/meminfo", "MemTotal:       67108864 kB\nMemAvailable:   33554432 kB\n");
  }
  void TearDown() override {
    unsetenv("TORCH_OFFLOAD_HOST_MEMORY_CHECK");
    std::filesystem::remove_all(root_);
  }

  void write(const std::string& path, const std::string& text) {
    const std::filesystem::path file = root_ + path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }
  HostLimits limits() const { return read_host_limits(root_); }

  std::string root_;
};

TEST_F(HostLimitsTest, ReadsMeminfo) {
  EXPECT_EQ(limits().total_bytes, 64 * kGiB);
  EXPECT_EQ(limits().available_bytes, 32 * kGiB);
  EXPECT_FALSE(limits().cgroup_limit_bytes.has_value());
}

TEST_F(HostLimitsTest, ReadsTheNodeOfADevice) {
  write("/sys/bus/pci/devices/0000:1a:00.0/numa_node", "1\n");
  write("/sys/bus/pci/devices/0000:02:00.0/numa_node", "-1\n");
  EXPECT_EQ(read_pci_node("0000:1A:00.0", root_), 1) << "CUDA writes addresses in capitals";
  EXPECT_EQ(read_pci_node("0000:02:00.0", root_), std::nullopt);
  EXPECT_EQ(read_pci_node("0000:03:00.0", root_), std::nullopt);
}

TEST_F(HostLimitsTest, MissingFilesAreAbsentAndNotZero) {
  const HostLimits none = read_host_limits(root_ + "/nowhere");
  EXPECT_FALSE(none.total_bytes.has_value());
  EXPECT_FALSE(none.available_bytes.has_value());
  EXPECT_FALSE(none.cgroup_available_bytes.has_value());
  EXPECT_NO_THROW(check_host_memory(1000 * kGiB, 0, none));
}

TEST_F(HostLimitsTest, MachineOfNoMemoryIsUnknown) {
  write("/proc/meminfo", "MemTotal:       0 kB\nMemAvailable:   0 kB\n");
  EXPECT_FALSE(limits().total_bytes.has_value());
  EXPECT_FALSE(limits().available_bytes.has_value());
  EXPECT_NO_THROW(check_host_memory(1000 * kGiB, 0, limits()));
}

TEST_F(HostLimitsTest, FullMachineHasNothingAvailable) {
  write("/proc/meminfo", "MemTotal:       1024 kB\nMemAvailable:   0 kB\n");
  EXPECT_EQ(limits().available_bytes, std::size_t{0});
  EXPECT_THROW(check_host_memory(1, 0, limits()), MemoryError);
}

TEST_F(HostLimitsTest, ValuesWithoutDigitsAreAbsentAndNotZero) {
  write("/proc/meminfo", "MemTotal:\nMemAvailable:   many kB\n");
  EXPECT_FALSE(limits().total_bytes.has_value());
  EXPECT_FALSE(limits().available_bytes.has_value());
}

TEST_F(HostLimitsTest, KeysAreComparedWholeAndLastLinesNeedNoEnd) {
  write("/proc/meminfo",
        "MemTotalOther: 1 kB\nMemTotal: 2048 kB\nOther: 3 kB\nMemAvailable:\t1024");
  EXPECT_EQ(limits().total_bytes, std::size_t{2} << 20);
  EXPECT_EQ(limits().available_bytes, std::size_t{1} << 20);
}

TEST_F(HostLimitsTest, NumbersAreReadInAnyLocale) {
  // A facet that reads every number as zero and says nothing, as was seen in a Python process.
  struct NothingGet : std::num_get<char> {
    iter_type do_get(iter_type begin, iter_type, std::ios_base&, std::ios_base::iostate&,
                     unsigned long& value) const override {
      value = 0;
      return begin;
    }
  };
  const std::locale before = std::locale::global(std::locale(std::locale(), new NothingGet));
  const HostLimits read = limits();
  std::locale::global(before);
  EXPECT_EQ(read.total_bytes, 64 * kGiB);
  EXPECT_EQ(read.available_bytes, 32 * kGiB);
}

TEST_F(HostLimitsTest, CgroupV2CountsPageCacheAsFree) {
  write("/proc/self/cgroup", "0::/job\n");
  write("/sys/fs/cgroup/job/memory.max", std::to_string(8 * kGiB) + "\n");
  write("/sys/fs/cgroup/job/memory.current", std::to_string(6 * kGiB) + "\n");
  write("/sys/fs/cgroup/job/memory.stat",
        "anon 1\ninactive_file " + std::to_string(kGiB) + "\nactive_file 7\n");
  EXPECT_EQ(limits().cgroup_limit_bytes, 8 * kGiB);
  EXPECT_EQ(limits().cgroup_available_bytes, 3 * kGiB);
}

TEST_F(HostLimitsTest, CgroupV2WithoutLimitIsAbsent) {
  write("/proc/self/cgroup", "0::/job\n");
  write("/sys/fs/cgroup/job/memory.max", "max\n");
  write("/sys/fs/cgroup/job/memory.current", "4096\n");
  EXPECT_FALSE(limits().cgroup_limit_bytes.has_value());
}

TEST_F(HostLimitsTest, TightestAncestorCounts) {
  write("/proc/self/cgroup", "0::/outer/inner\n");
  write("/sys/fs/cgroup/outer/inner/memory.max", std::to_string(8 * kGiB));
  write("/sys/fs/cgroup/outer/inner/memory.current", std::to_string(kGiB));
  write("/sys/fs/cgroup/outer/memory.max", std::to_string(10 * kGiB));
  write("/sys/fs/cgroup/outer/memory.current", std::to_string(9 * kGiB));
  EXPECT_EQ(limits().cgroup_limit_bytes, 10 * kGiB);
  EXPECT_EQ(limits().cgroup_available_bytes, kGiB);
}

TEST_F(HostLimitsTest, UsageAboveTheLimitLeavesNothing) {
  write("/proc/self/cgroup", "0::/\n");
  write("/sys/fs/cgroup/memory.max", std::to_string(kGiB));
  write("/sys/fs/cgroup/memory.current", std::to_string(2 * kGiB));
  EXPECT_EQ(limits().cgroup_available_bytes, std::size_t{0});
}

TEST_F(HostLimitsTest, CgroupV1IsFoundByItsController) {
  write("/proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/box\n0::/\n");
  write("/sys/fs/cgroup/memory/box/memory.limit_in_bytes", std::to_string(4 * kGiB));
  write("/sys/fs/cgroup/memory/box/memory.usage_in_bytes", std::to_string(3 * kGiB));
  write("/sys/fs/cgroup/memory/box/memory.stat",
        "inactive_file 1\ntotal_inactive_file " + std::to_string(kGiB) + "\n");
  EXPECT_EQ(limits().cgroup_limit_bytes, 4 * kGiB);
  EXPECT_EQ(limits().cgroup_available_bytes, 2 * kGiB);
}

TEST_F(HostLimitsTest, CgroupV1NoLimitIsAbsent) {
  write("/proc/self/cgroup", "4:memory:/box\n");
  write("/sys/fs/cgroup/memory/box/memory.limit_in_bytes", "9223372036854771712\n");
  write("/sys/fs/cgroup/memory/box/memory.usage_in_bytes", "4096\n");
  EXPECT_FALSE(limits().cgroup_limit_bytes.has_value());
}

TEST_F(HostLimitsTest, ContainerSeesItsGroupAtTheMount) {
  write("/proc/self/cgroup", "4:memory:/docker/0123abc\n");
  write("/sys/fs/cgroup/memory/memory.limit_in_bytes", std::to_string(4 * kGiB));
  write("/sys/fs/cgroup/memory/memory.usage_in_bytes", std::to_string(kGiB));
  EXPECT_EQ(limits().cgroup_available_bytes, 3 * kGiB);
}

TEST_F(HostLimitsTest, CheckAcceptsExactlyWhatIsThere) {
  EXPECT_NO_THROW(check_host_memory(30 * kGiB, 2 * kGiB, limits()));
  EXPECT_THROW(check_host_memory(30 * kGiB, 2 * kGiB + 1, limits()), MemoryError);
  EXPECT_THROW(check_host_memory(SIZE_MAX, SIZE_MAX, limits()), MemoryError);
}

TEST_F(HostLimitsTest, CheckTakesTheTighterOfMachineAndGroup) {
  HostLimits tight = limits();
  tight.cgroup_limit_bytes = 2 * kGiB;
  tight.cgroup_available_bytes = kGiB;
  EXPECT_NO_THROW(check_host_memory(kGiB, 0, tight));
  EXPECT_THROW(check_host_memory(kGiB + 1, 0, tight), MemoryError);
}

TEST_F(HostLimitsTest, ErrorNamesAskedGotLimitsAndTheWayOut) {
  try {
    check_host_memory(40 * kGiB, 2 * kGiB, limits());
    FAIL() << "no error";
  } catch (const MemoryError& error) {
    const std::string text = error.what();
    for (const char* piece : {"40.00 GiB", "2.00 GiB", "got 32.00 GiB", "64.00 GiB", "no limit",
                              "ulimit -l", "TORCH_OFFLOAD_HOST_MEMORY_CHECK=0"}) {
      EXPECT_NE(text.find(piece), std::string::npos) << piece << " is not in: " << text;
    }
  }
}

TEST_F(HostLimitsTest, EnvironmentSwitchesTheCheckOff) {
  setenv("TORCH_OFFLOAD_HOST_MEMORY_CHECK", "0", 1);
  EXPECT_NO_THROW(check_host_memory(1000 * kGiB, 0, limits()));
  setenv("TORCH_OFFLOAD_HOST_MEMORY_CHECK", "1", 1);
  EXPECT_THROW(check_host_memory(1000 * kGiB, 0, limits()), MemoryError);
}

TEST_F(HostLimitsTest, ThisMachineHasMemory) {
  const HostLimits own = read_host_limits();
  ASSERT_TRUE(own.total_bytes.has_value());
  ASSERT_TRUE(own.available_bytes.has_value());
  EXPECT_GT(*own.available_bytes, std::size_t{0});
  EXPECT_LE(*own.available_bytes, *own.total_bytes);
}

TEST(FormatBytesTest, ChoosesTheUnit) {
  EXPECT_EQ(format_bytes(0), "0 bytes");
  EXPECT_EQ(format_bytes(1023), "1023 bytes");
  EXPECT_EQ(format_bytes(1536), "1.50 KiB");
  EXPECT_EQ(format_bytes(3 << 20), "3.00 MiB");
  EXPECT_EQ(format_bytes(2000 * kGiB), "2000.00 GiB");
}

}  // namespace
}  // namespace torch_offload
