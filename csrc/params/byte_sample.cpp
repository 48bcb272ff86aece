#include "params/byte_sample.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace torch_offload {

namespace {

/// Where a line begins. The last one ends with the tensor.
std::size_t begin_of_line(std::size_t line, std::size_t num_lines, std::size_t line_bytes,
                          std::size_t size_bytes) {
  const std::size_t last = size_bytes - line_bytes;
  const std::size_t position = last * line / (num_lines - 1);
  return line + 1 < num_lines && line_bytes > 0 ? position / line_bytes * line_bytes : last;
}

}  // namespace

void ByteSample::take(const at::Tensor& data) {
  if (data.is_cpu()) {
    take_from_host(static_cast<const std::byte*>(data.const_data_ptr()), data.nbytes());
  } else {
    take_from_device(data);
  }
}

bool ByteSample::is_equal(const at::Tensor& data) const {
  ByteSample now;
  now.take(data);
  return now.lines_ == lines_;
}

void ByteSample::take_from_host(const std::byte* bytes, std::size_t size_bytes) {
  const std::size_t line_bytes = std::min(size_bytes, kLineBytes);
  for (std::size_t line = 0; line < kNumLines; ++line) {
    std::memcpy(lines_.data() + line * kLineBytes,
                bytes + begin_of_line(line, kNumLines, line_bytes, size_bytes), line_bytes);
  }
}

void ByteSample::take_from_device(const at::Tensor& data) {
  // Past Python's modes and functorch's transforms: this is no part of the forward.
  const c10::impl::ExcludeDispatchKeyGuard aside(
      c10::python_ks.add(c10::DispatchKey::FuncTorchDynamicLayerFrontMode)
          .add(c10::DispatchKey::FuncTorchDynamicLayerBackMode));
  const c10::InferenceMode inference;
  const std::size_t size_bytes = data.nbytes();
  const std::size_t line_bytes = std::min(size_bytes, kLineBytes);
  // Read alone; from_blob takes no const memory.
  const at::Tensor bytes = at::from_blob(
      const_cast<void*>(data.const_data_ptr()), {static_cast<std::int64_t>(size_bytes)},
      at::TensorOptions().dtype(at::kByte).device(data.device()));
  std::vector<at::Tensor> lines;
  for (std::size_t line = 0; line < kNumLines; ++line) {
    const std::size_t begin = begin_of_line(line, kNumLines, line_bytes, size_bytes);
    lines.push_back(
        bytes.narrow(0, static_cast<std::int64_t>(begin), static_cast<std::int64_t>(line_bytes)));
  }
  const at::Tensor on_host = at::stack(lines).cpu();
  const auto* const source = static_cast<const std::byte*>(on_host.const_data_ptr());
  for (std::size_t line = 0; line < kNumLines; ++line) {
    std::memcpy(lines_.data() + line * kLineBytes, source + line * line_bytes, line_bytes);
  }
}

}  // namespace torch_offload
