#pragma once

#include <torch/csrc/utils/pybind.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace torch_offload {

/// How a dense tensor's bytes lie in memory, and what they mean: shape, strides, dtype, and what
/// torch does to them only when they are read (`t.conj()` and its like).
///
/// Makes tensors outside inference mode, whatever mode the caller is in: an inference tensor has no
/// version counter, and a normal parameter cannot show its data.
/// Threads:  any number may read one that nobody changes.
class TensorLayout {
 public:
  explicit TensorLayout(const at::Tensor& dense);

  std::size_t size_bytes() const { return size_bytes_; }
  /// Whether the bytes of such a tensor lie and mean the same.
  bool is_of(const at::Tensor& data) const;

  /// Whether the tensor may take the place of one that lies so: readable bytes of this shape and
  /// dtype, dense in whatever order.
  bool fits(const at::Tensor& replacement) const;
  /// Throws: StateError, with the name of the parameter that is to be replaced, unless it fits.
  void check_fits(const at::Tensor& replacement, const std::string& name) const;
  /// Lies from now on as a tensor that fits.
  void take_order_of(const at::Tensor& replacement);

  /// A tensor over this memory, in a storage of its own: what is saved or shared of it is its
  /// bytes, not all that lie around them. `owner` lives as long as any tensor shows it.
  at::Tensor view_of(void* memory, const at::Device& device, std::shared_ptr<void> owner) const;
  /// Ordinary memory on `device`, not initialized.
  /// Throws: c10::OutOfMemoryError, as copy_of.
  at::Tensor empty_on(const at::Device& device) const;
  /// Ordinary memory on `device` with the same values. Blocks while copying.
  at::Tensor copy_of(const at::Tensor& source, const at::Device& device) const;

 private:
  struct LazyBits {
    bool is_conj = false;
    bool is_neg = false;
  };
  void set_lazy_bits_on(const at::Tensor& tensor) const;

  std::vector<std::int64_t> sizes_;
  std::vector<std::int64_t> strides_;
  at::ScalarType dtype_;
  LazyBits lazy_bits_;
  std::size_t size_bytes_;
};

}  // namespace torch_offload
