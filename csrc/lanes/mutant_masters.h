#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "core/device.h"
#include "core/unit.h"

namespace torch_offload::lanes {

/// Masters of units in page-locked memory, and what each of them holds.
class MutantMasters {
 public:
  MutantMasters(Device& device, std::vector<Unit> units)
      : device_(device), units_(std::move(units)) {
    std::size_t size_bytes = kPageBytes;
    std::size_t largest = 0;
    for (const Unit& unit : units_) {
      offsets_.push_back(size_bytes);
      size_bytes += unit.size_bytes;
      largest = std::max(largest, unit.size_bytes);
    }
    offsets_.push_back(size_bytes);
    memory_.resize(size_bytes + largest);
    device_.register_host(memory_.data(), memory_.size());
    for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
      edit(unit);
    }
  }
  MutantMasters(const MutantMasters&) = delete;
  MutantMasters& operator=(const MutantMasters&) = delete;

  const std::vector<Unit>& units() const { return units_; }
  std::size_t size_bytes(UnitIndex unit) const { return units_.at(unit).size_bytes; }
  std::byte* memory(UnitIndex unit) { return memory_.data() + offsets_[unit]; }
  /// Room for any unit, which all share.
  std::byte* shared() { return memory_.data() + offsets_.back(); }
  std::shared_ptr<const std::vector<std::byte>> bytes(UnitIndex unit) const {
    return bytes_.at(unit);
  }

  /// Gives the master new bytes; whoever has the unit in its place already does not see them.
  void edit(UnitIndex unit) {
    auto bytes = std::make_shared<std::vector<std::byte>>(size_bytes(unit));
    ++num_edits_;
    const std::size_t first = std::size_t{unit} * 31 + num_edits_ * 17;
    for (std::size_t i = 0; i < bytes->size(); ++i) {
      (*bytes)[i] = static_cast<std::byte>((first + i * 7) % 251);
    }
    device_.host_write(memory(unit), bytes->size(), unit);
    std::memcpy(memory(unit), bytes->data(), bytes->size());
    bytes_[unit] = std::move(bytes);
  }

  /// Gives the memory to its next owner, who writes to it.
  void give_up() {
    std::memset(memory_.data(), 0, memory_.size());
    device_.unregister_host(memory_.data());
  }

 private:
  static constexpr std::size_t kPageBytes = 4096;

  Device& device_;
  const std::vector<Unit> units_;
  std::vector<std::size_t> offsets_;  // by unit, then that of the shared room
  std::vector<std::byte> memory_;
  std::map<UnitIndex, std::shared_ptr<const std::vector<std::byte>>> bytes_;
  std::size_t num_edits_ = 0;
};

}  // namespace torch_offload::lanes
