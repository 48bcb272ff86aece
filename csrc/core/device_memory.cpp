#include "core/device_memory.h"

#include <cstdio>
#include <exception>
#include <utility>

#include "core/device.h"

namespace torch_offload {

DeviceMemory::DeviceMemory(Device& device, std::size_t size_bytes)
    : device_(device),
      memory_(size_bytes == 0 ? nullptr : static_cast<std::byte*>(device.allocate(size_bytes))),
      size_bytes_(size_bytes) {}

DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept
    : device_(other.device_),
      memory_(std::exchange(other.memory_, nullptr)),
      size_bytes_(std::exchange(other.size_bytes_, 0)) {}

DeviceMemory::~DeviceMemory() {
  if (memory_ == nullptr || device_.in_forked_child()) {
    return;
  }
  try {
    device_.free(memory_);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "torch_offload: device memory was not given back: %s\n", error.what());
  }
}

}  // namespace torch_offload
