#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstddef>

namespace torch_offload {

/// Some of a dense tensor's bytes, evenly spread: whole cache lines, as one is read as soon as a
/// word of it is. Of a small tensor every byte.
class ByteSample {
 public:
  /// Nothing yet; `take` fills it. What lies on the device is waited for, on the current stream.
  void take(const at::Tensor& data);
  /// Whether the same bytes would be taken now.
  bool is_equal(const at::Tensor& data) const;

 private:
  static constexpr std::size_t kNumLines = 16;
  static constexpr std::size_t kLineBytes = 64;

  void take_from_host(const std::byte* bytes, std::size_t size_bytes);
  void take_from_device(const at::Tensor& data);

  std::array<std::byte, kNumLines * kLineBytes> lines_{};
};

}  // namespace torch_offload
