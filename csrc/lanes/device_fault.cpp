#include "lanes/device_fault.h"

#include <array>
#include <utility>

#include "core/error.h"

namespace torch_offload {

DeviceFaultKind parse_device_fault(const std::string& name) {
  static const std::array<std::pair<const char*, DeviceFaultKind>, 6> kNames{{
      {"none", DeviceFaultKind::kNone},
      {"compute_waits", DeviceFaultKind::kComputeWaits},
      {"copy_waits", DeviceFaultKind::kCopyWaits},
      {"handovers", DeviceFaultKind::kHandovers},
      {"records", DeviceFaultKind::kRecords},
      {"synchronizes", DeviceFaultKind::kSynchronizes},
  }};
  std::string listed;
  for (const auto& [known, kind] : kNames) {
    if (name == known) {
      return kind;
    }
    listed += listed.empty() ? known : std::string(", ") + known;
  }
  throw ValueError("expected a planted fault to be one of " + listed + ", got '" + name + "'");
}

}  // namespace torch_offload
