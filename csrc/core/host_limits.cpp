#include "core/host_limits.h"

#include <sys/resource.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>

#include "core/error.h"

namespace torch_offload {

namespace {

constexpr char kOverride[] = "TORCH_OFFLOAD_HOST_MEMORY_CHECK";

/// All of a small file; empty if it cannot be read.
///
/// Note [No numbers through iostreams]
/// Inside a Python process another library may bring its own copy of the C++ runtime, and its
/// locale facets take the place of ours: `stream >> number` was seen to give zero and call it good,
/// and `stream << number` to end in SIGSEGV. So files are read as bytes, numbers by from_chars and
/// written by to_chars and to_string, which know no locale.
std::string text_of(const std::string& path) {
  std::string text;
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "re"),
                                                             &std::fclose);
  std::array<char, 4096> block{};
  while (file != nullptr) {
    const std::size_t length = std::fread(block.data(), 1, block.size(), file.get());
    if (length == 0) {
      break;
    }
    text.append(block.data(), length);
  }
  return text;
}

/// Takes the first line off `text`.
std::string_view next_line(std::string_view& text) {
  const std::size_t length = std::min(text.find('\n'), text.size());
  const std::string_view line = text.substr(0, length);
  text.remove_prefix(std::min(length + 1, text.size()));
  return line;
}

/// The number that `text` begins with, blanks passed over; absent if it begins otherwise ("max").
std::optional<std::size_t> leading_number(std::string_view text) {
  text.remove_prefix(std::min(text.find_first_not_of(" \t"), text.size()));
  std::size_t value = 0;
  const auto read = std::from_chars(text.data(), text.data() + text.size(), value);
  return read.ec == std::errc() ? std::optional<std::size_t>(value) : std::nullopt;
}

std::optional<std::size_t> number_in(const std::string& path) {
  return leading_number(text_of(path));
}

/// The value behind `key` in a file of lines such as "MemTotal:  24682416 kB".
std::optional<std::size_t> value_of(const std::string& path, std::string_view key) {
  const std::string text = text_of(path);
  for (std::string_view rest = text; !rest.empty();) {
    const std::string_view line = next_line(rest);
    if (line.size() > key.size() && line.substr(0, key.size()) == key &&
        (line[key.size()] == ' ' || line[key.size()] == '\t')) {
      return leading_number(line.substr(key.size()));
    }
  }
  return std::nullopt;
}

std::optional<std::size_t> meminfo_bytes(const std::string& root, std::string_view key) {
  const auto kib = value_of(root + "/proc/meminfo", key);
  return kib ? std::optional<std::size_t>(*kib * 1024) : std::nullopt;
}

/// The names under which the two versions of control groups tell the same things.
struct CgroupFiles {
  const char* mount;
  const char* limit;
  const char* usage;
  const char* reclaimable;  // page cache that the kernel gives up before it kills
};
constexpr CgroupFiles kVersion1 = {"/sys/fs/cgroup/memory", "memory.limit_in_bytes",
                                   "memory.usage_in_bytes", "total_inactive_file"};
constexpr CgroupFiles kVersion2 = {"/sys/fs/cgroup", "memory.max", "memory.current",
                                   "inactive_file"};

/// Version 1 writes "no limit" as the largest multiple of the page size.
constexpr std::size_t kNoLimit = std::size_t{1} << 62;

/// Narrows `limits` by one group.
void apply_group(const CgroupFiles& files, const std::string& directory, HostLimits& limits) {
  const auto limit = number_in(directory + "/" + files.limit);
  const auto usage = number_in(directory + "/" + files.usage);
  if (!limit || *limit >= kNoLimit || !usage) {
    return;
  }
  const std::size_t reclaimable =
      value_of(directory + "/memory.stat", files.reclaimable).value_or(0);
  const std::size_t held = *usage - std::min(*usage, reclaimable);
  const std::size_t available = *limit - std::min(*limit, held);
  if (!limits.cgroup_available_bytes || available < *limits.cgroup_available_bytes) {
    limits.cgroup_limit_bytes = limit;
    limits.cgroup_available_bytes = available;
  }
}

/// Narrows `limits` by the group at `path` and by all its ancestors. Groups that are not there are
/// passed over: inside a container the path may be the host's name for what is the root here.
void apply_groups(const std::string& root, const CgroupFiles& files, std::string path,
                  HostLimits& limits) {
  while (true) {
    while (!path.empty() && path.back() == '/') {
      path.pop_back();
    }
    apply_group(files, root + files.mount + path, limits);
    if (path.empty()) {
      return;
    }
    const auto slash = path.rfind('/');
    path.resize(slash == std::string::npos ? 0 : slash);
  }
}

/// /proc/self/cgroup: "0::/path" for version 2, "4:cpu,memory:/path" for version 1.
void apply_cgroups(const std::string& root, HostLimits& limits) {
  const std::string text = text_of(root + "/proc/self/cgroup");
  for (std::string_view rest = text; !rest.empty();) {
    const std::string line(next_line(rest));
    const auto first = line.find(':');
    const auto second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) {
      continue;
    }
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    if (controllers == ",,") {
      apply_groups(root, kVersion2, line.substr(second + 1), limits);
    } else if (controllers.find(",memory,") != std::string::npos) {
      apply_groups(root, kVersion1, line.substr(second + 1), limits);
    }
  }
}

std::string format_or(const std::optional<std::size_t>& size_bytes, const char* otherwise) {
  return size_bytes ? format_bytes(*size_bytes) : otherwise;
}

}  // namespace

HostLimits read_host_limits(const std::string& root) {
  HostLimits limits;
  limits.total_bytes = meminfo_bytes(root, "MemTotal:");
  limits.available_bytes = meminfo_bytes(root, "MemAvailable:");
  if (limits.total_bytes == std::size_t{0}) {
    limits.total_bytes.reset();  // no machine has none: what says so does not know
    limits.available_bytes.reset();
  }
  apply_cgroups(root, limits);
  rlimit locked{};
  if (getrlimit(RLIMIT_MEMLOCK, &locked) == 0 && locked.rlim_cur != RLIM_INFINITY) {
    limits.locked_limit_bytes = locked.rlim_cur;
  }
  return limits;
}

void check_host_memory(std::size_t needed_bytes, std::size_t reserve_bytes,
                       const HostLimits& limits) {
  const char* override_value = std::getenv(kOverride);
  if (override_value != nullptr && std::string(override_value) == "0") {
    return;
  }
  std::optional<std::size_t> available = limits.available_bytes;
  if (limits.cgroup_available_bytes &&
      (!available || *limits.cgroup_available_bytes < *available)) {
    available = limits.cgroup_available_bytes;
  }
  // Written so that no sum can overflow.
  if (!available || (needed_bytes <= *available && reserve_bytes <= *available - needed_bytes)) {
    return;
  }
  throw MemoryError("expected " + format_bytes(needed_bytes) +
                    " of free host memory for the weights and " + format_bytes(reserve_bytes) +
                    " in reserve, got " + format_bytes(*available) + " (" + describe(limits) +
                    "); offload fewer weights, free host memory or raise the container's limit, "
                    "or, where this machine's memory grows as it is touched, set " +
                    kOverride + "=0 in the environment to go on regardless");
}

std::optional<int> read_pci_node(const std::string& address, const std::string& root) {
  std::string name = address;  // CUDA writes it in capitals, the system does not
  std::transform(name.begin(), name.end(), name.begin(), [](char letter) {
    return letter >= 'A' && letter <= 'F' ? static_cast<char>(letter - 'A' + 'a') : letter;
  });
  // "-1" where the system has no nodes: that is no number of one.
  const auto node = number_in(root + "/sys/bus/pci/devices/" + name + "/numa_node");
  return node ? std::optional<int>(static_cast<int>(*node)) : std::nullopt;
}

std::string describe(const HostLimits& limits) {
  return "host memory: " + format_or(limits.available_bytes, "unknown") + " available of " +
         format_or(limits.total_bytes, "unknown") + "; control group: " +
         (limits.cgroup_limit_bytes ? format_or(limits.cgroup_available_bytes, "unknown") +
                                          " left of " + format_bytes(*limits.cgroup_limit_bytes)
                                    : "no limit") +
         "; locked-memory limit (ulimit -l): " + format_or(limits.locked_limit_bytes, "none");
}

std::string format_bytes(std::size_t size_bytes) {
  constexpr std::array<const char*, 3> kNames = {"KiB", "MiB", "GiB"};
  if (size_bytes < 1024) {
    return std::to_string(size_bytes) + " bytes";
  }
  double value = static_cast<double>(size_bytes) / 1024;
  std::size_t name = 0;
  while (value >= 1024 && name + 1 < kNames.size()) {
    value /= 1024;
    ++name;
  }
  std::array<char, 48> text{};
  std::snprintf(text.data(), text.size(), "%.2f %s", value, kNames[name]);
  return text.data();
}

}  // namespace torch_offload
