#pragma once

#include <cstddef>
#include <optional>
#include <string>

namespace torch_offload {

/// How much host memory this process may still take, as far as the system says. A value that the
/// system does not tell, or does not limit, is absent.
struct HostLimits {
  std::optional<std::size_t> total_bytes;             ///< Of the machine.
  std::optional<std::size_t> available_bytes;         ///< Of the machine, without swapping.
  std::optional<std::size_t> cgroup_limit_bytes;      ///< Of the tightest group around us ...
  std::optional<std::size_t> cgroup_available_bytes;  ///< ... and what it leaves, page cache freed.
  std::optional<std::size_t> locked_limit_bytes;      ///< RLIMIT_MEMLOCK; never enforced here.
};

/// Reads the limits of this process, now.
///
/// `root` stands before /proc and /sys, so that a test can show other files; RLIMIT_MEMLOCK is
/// always the process's own. Control groups of both versions are read where every distribution
/// mounts them, /sys/fs/cgroup; every ancestor counts, since each of them limits.
///
/// Blocking:  reads a few small files.
/// Throws:    nothing of its own: what cannot be read is absent.
HostLimits read_host_limits(const std::string& root = "");

/// Makes sure that the host can give `needed_bytes` and keep `reserve_bytes` for everybody else.
///
/// To be asked first: running out of host memory is a kill without a message. The answer can be
/// wrong, since a machine's memory may grow as it is touched, so the environment variable
/// TORCH_OFFLOAD_HOST_MEMORY_CHECK=0 switches the check off. RLIMIT_MEMLOCK is not checked: CUDA's
/// kernel driver pins pages without asking for it, and containers commonly say 64 KiB and pin
/// hundreds of GiB. Where a platform does heed it, registering fails and the error quotes it.
///
/// Throws:    MemoryError with asked, got, the limits and the way out.
void check_host_memory(std::size_t needed_bytes, std::size_t reserve_bytes,
                       const HostLimits& limits);

/// The node of host memory that a device of this PCI address ("0000:17:00.0") is attached to; none
/// where the system has one node only or does not say. `root` as above.
std::optional<int> read_pci_node(const std::string& address, const std::string& root = "");

/// One line for an error: each limit by name and value.
std::string describe(const HostLimits& limits);

/// "27.40 GiB", "512 bytes": for people.
std::string format_bytes(std::size_t size_bytes);

}  // namespace torch_offload
