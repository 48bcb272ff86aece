#pragma once

#include <string>

namespace torch_offload {

/// What a device with a planted fault does not do, while that is switched on.
enum class DeviceFaultKind {
  kNone,
  kComputeWaits,  ///< Kernels do not wait for copies.
  kCopyWaits,     ///< Copies do not wait for kernels.
  kHandovers,     ///< Kernels of one stream do not wait for those of another.
  kRecords,       ///< Events are recorded on a stream on which nothing happens.
  kSynchronizes,  ///< The host does not wait for streams.
};

/// Throws: ValueError that lists the names there are.
DeviceFaultKind parse_device_fault(const std::string& name);

/// A switch for one fault. Threads: those of its device's caller.
struct DeviceFault {
  DeviceFaultKind kind = DeviceFaultKind::kNone;
  bool is_armed = false;

  bool is(DeviceFaultKind other) const { return is_armed && kind == other; }
};

}  // namespace torch_offload
