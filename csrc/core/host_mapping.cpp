#include "core/host_mapping.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/host_limits.h"

namespace torch_offload {

/// The half of Note [Page-locked memory and fork] that runs at a fork: all mappings of this
/// process, and what is done to them in a child.
struct ForkHandlers {
  std::mutex mutex;  // guards `live`; held across fork, so that a child finds it whole
  std::vector<HostMapping*> live;

  /// Never destroyed, on purpose: a fork may come after static destructors have begun.
  static ForkHandlers& instance() {
    static ForkHandlers* handlers = [] {
      auto* made = new ForkHandlers;
      const int error = pthread_atfork([] { instance().mutex.lock(); },
                                       [] { instance().mutex.unlock(); }, &ForkHandlers::in_child);
      if (error != 0) {
        delete made;
        throw MemoryError(std::string("expected to prepare host memory for forks, got: ") +
                          std::strerror(error));
      }
      return made;
    }();
    return *handlers;
  }

  static void in_child() {
    for (const HostMapping* mapping : instance().live) {
      mapping->make_private();
    }
    // From here on they are ordinary memory, which the child's own children inherit as it then is.
    instance().live.clear();
    instance().mutex.unlock();
  }

  void add(HostMapping* mapping) {
    const std::lock_guard<std::mutex> lock(mutex);
    live.push_back(mapping);
  }
  void remove(HostMapping* mapping) {
    const std::lock_guard<std::mutex> lock(mutex);
    live.erase(std::remove(live.begin(), live.end(), mapping), live.end());
  }
};

namespace {

[[noreturn]] void throw_system_error(std::size_t size_bytes, const char* call) {
  const int error = errno;
  throw MemoryError("expected to reserve " + format_bytes(size_bytes) + " of host memory, got " +
                    call + ": " + std::strerror(error) + " (" + describe(read_host_limits()) + ")");
}

}  // namespace

std::size_t HostMapping::page_bytes() {
  static const auto bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

std::size_t HostMapping::whole_pages(std::size_t size_bytes) {
  return (size_bytes + page_bytes() - 1) / page_bytes() * page_bytes();
}

HostMapping::HostMapping(std::size_t size_bytes) : size_bytes_(whole_pages(size_bytes)) {
  if (size_bytes_ == 0) {
    return;
  }
  ForkHandlers& handlers = ForkHandlers::instance();
  file_ = memfd_create("torch_offload", MFD_CLOEXEC);
  if (file_ < 0) {
    throw_system_error(size_bytes_, "memfd_create");
  }
  if (ftruncate(file_, static_cast<off_t>(size_bytes_)) != 0) {
    const int error = errno;
    close(file_);
    errno = error;
    throw_system_error(size_bytes_, "ftruncate");
  }
  void* data = mmap(nullptr, size_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file_, 0);
  if (data == MAP_FAILED) {
    const int error = errno;
    close(file_);
    errno = error;
    throw_system_error(size_bytes_, "mmap");
  }
  data_ = static_cast<std::byte*>(data);
  // Huge pages where the system gives them to shared memory (shmem_enabled; often it does not):
  // fewer faults while filling. A wish, so the answer does not matter.
  static_cast<void>(madvise(data, size_bytes_, MADV_HUGEPAGE));
  try {
    handlers.add(this);
  } catch (...) {
    munmap(data, size_bytes_);
    close(file_);
    throw;
  }
}

HostMapping::~HostMapping() {
  if (data_ == nullptr) {
    return;
  }
  ForkHandlers::instance().remove(this);
  if (!leaked_ && munmap(data_, size_bytes_) != 0) {
    std::fprintf(stderr, "torch_offload: warning: could not unmap %zu bytes of host memory: %s\n",
                 size_bytes_, std::strerror(errno));
  }
  close(file_);
}

/// Runs in a child, between fork and its return: system calls only, no allocation, no throw.
void HostMapping::make_private() const {
  void* const data = mmap(data_, size_bytes_, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, file_, 0);
  if (data != MAP_FAILED) {
    return;
  }
  // Better a child that dies when it writes than one that edits its parent's weights unseen.
  static_cast<void>(mprotect(data_, size_bytes_, PROT_READ));
  constexpr char kWarning[] =
      "torch_offload: warning: offloaded weights are read-only in this forked process\n";
  static_cast<void>(!write(STDERR_FILENO, kWarning, sizeof(kWarning) - 1));
}

}  // namespace torch_offload
