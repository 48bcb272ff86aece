#pragma once

#include <cstddef>

namespace torch_offload {

class Device;

/// Device memory that is given back at the end of the scope; none at all for zero bytes.
///
/// Lifetime: the device must outlive it, and nothing may be in flight to or from it at its end.
class DeviceMemory {
 public:
  /// Throws: MemoryError.
  DeviceMemory(Device& device, std::size_t size_bytes);
  DeviceMemory(DeviceMemory&& other) noexcept;
  DeviceMemory& operator=(DeviceMemory&&) = delete;
  ~DeviceMemory();

  std::byte* memory() const { return memory_; }
  /// Leaves the memory to the device for good, since something may still write to it.
  void leak() { memory_ = nullptr; }

  std::size_t size_bytes() const { return size_bytes_; }

 private:
  Device& device_;
  std::byte* memory_ = nullptr;
  std::size_t size_bytes_ = 0;
};

}  // namespace torch_offload
