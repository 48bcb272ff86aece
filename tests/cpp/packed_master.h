#pragma once

#include <cstddef>
#include <cstdlib>
#include <random>

#include "codec/encoder.h"
#include "core/device.h"
#include "core/packed_loader.h"
#include "packed_fixture.h"

namespace torch_offload::testing {

/// Page-locked memory of one packed unit, and the weights that it holds.
class PackedMaster {
 public:
  PackedMaster(Device& device, std::size_t size_bytes, std::mt19937& random) : device_(device) {
    constexpr std::size_t kPageBytes = 4096;
    unit_.add(weights_with_escapes(size_bytes / 2, 60, random));
    EncodeOptions options;
    options.codec = Codec::kE33;
    const UnitEncoder encoder(unit_.sources(), unit_.place_bytes(), options);
    reserved_bytes_ = (encoder.blob_bytes() / kPageBytes + 1) * kPageBytes;
    memory_ = static_cast<std::byte*>(std::aligned_alloc(kPageBytes, reserved_bytes_));
    encoder.encode(memory_);
    source = {memory_, encoder.blob_bytes(), unit_.place_bytes(), encoder.num_tiles()};
    device_.register_host(memory_, reserved_bytes_);
  }
  PackedMaster(const PackedMaster&) = delete;
  PackedMaster& operator=(const PackedMaster&) = delete;
  ~PackedMaster() {
    device_.unregister_host(memory_);
    std::free(memory_);
  }

  void damage() { memory_[source.packed_bytes / 2] ^= std::byte{1}; }
  Bytes weights() const { return unit_.place(std::byte{0}); }

  PackedSource source;

 private:
  Device& device_;
  PackedCase unit_;
  std::byte* memory_ = nullptr;
  std::size_t reserved_bytes_ = 0;
};

}  // namespace torch_offload::testing
