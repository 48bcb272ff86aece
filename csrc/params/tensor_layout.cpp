#include "params/tensor_layout.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>

#include <utility>

#include "core/error.h"

namespace torch_offload {

namespace {

/// Whether a transform of torch.func has wrapped the tensor. Some wrappers have a storage, with
/// some releases of torch.
bool is_wrapped(const at::Tensor& tensor) {
  const c10::DispatchKeySet keys = tensor.key_set();
  return keys.has(c10::DispatchKey::FuncTorchGradWrapper) ||
         keys.has(c10::DispatchKey::FuncTorchBatched) ||
         (!tensor.has_storage() && tensor.layout() == at::kStrided);
}

/// Whether a dense tensor's storage is as large as the tensor says. One that was freed by
/// `untyped_storage().resize_(0)` is not.
bool has_all_bytes(const at::Tensor& dense) {
  const auto end = static_cast<std::size_t>(dense.storage_offset() + dense.numel());
  return dense.numel() == 0 || end * dense.itemsize() <= dense.storage().nbytes();
}

std::string described(at::ScalarType dtype, at::IntArrayRef sizes) {
  std::string listed;
  for (const std::int64_t size : sizes) {
    listed += (listed.empty() ? "" : ", ") + std::to_string(size);
  }
  return std::string("torch.") + torch::getTHPDtype(dtype)->name + " of shape (" + listed + ")";
}

}  // namespace

TensorLayout::TensorLayout(const at::Tensor& dense)
    : sizes_(dense.sizes().vec()),
      strides_(dense.strides().vec()),
      dtype_(dense.scalar_type()),
      lazy_bits_{dense.is_conj(), dense.is_neg()},
      size_bytes_(dense.nbytes()) {}

bool TensorLayout::is_of(const at::Tensor& data) const {
  return data.scalar_type() == dtype_ && data.sizes() == at::IntArrayRef(sizes_) &&
         data.strides() == at::IntArrayRef(strides_) && data.is_conj() == lazy_bits_.is_conj &&
         data.is_neg() == lazy_bits_.is_neg;
}

bool TensorLayout::fits(const at::Tensor& replacement) const {
  return replacement.has_storage() && replacement.scalar_type() == dtype_ &&
         !replacement.is_meta() && replacement.sizes() == at::IntArrayRef(sizes_) &&
         replacement.layout() == at::kStrided && !replacement.is_inference() &&
         !replacement.unsafeGetTensorImpl()->is_python_dispatch() &&  // DTensor, torchao
         replacement.is_non_overlapping_and_dense() && has_all_bytes(replacement);
}

void TensorLayout::check_fits(const at::Tensor& replacement, const std::string& name) const {
  if (is_wrapped(replacement)) {
    throw StateError("expected parameter '" + name +
                     "' to be replaced by a tensor with memory of its own, got one that a "
                     "transform of torch.func (vmap, jvp) has wrapped; ensembling or "
                     "differentiating over streamed weights: call handle.remove() first");
  }
  if (!fits(replacement)) {
    throw StateError(
        "expected parameter '" + name + "' to be replaced by a dense " + described(dtype_, sizes_) +
        " as before, got " + described(replacement.scalar_type(), replacement.sizes()) +
        (replacement.is_meta() ? " on meta" : "") +
        (replacement.has_storage() && !has_all_bytes(replacement) ? " whose memory was freed"
                                                                  : "") +
        "; call handle.remove() before changing it, and offload() again afterwards");
  }
}

void TensorLayout::take_order_of(const at::Tensor& replacement) {
  strides_ = replacement.strides().vec();
  lazy_bits_ = {replacement.is_conj(), replacement.is_neg()};
}

void TensorLayout::set_lazy_bits_on(const at::Tensor& tensor) const {
  if (lazy_bits_.is_conj) {
    tensor._set_conj(true);
  }
  if (lazy_bits_.is_neg) {
    tensor._set_neg(true);
  }
}

at::Tensor TensorLayout::view_of(void* memory, const at::Device& device,
                                 std::shared_ptr<void> owner) const {
  const c10::InferenceMode no_inference(false);
  at::Tensor view = at::from_blob(
      memory, sizes_, strides_, [owner = std::move(owner)](void*) {},
      at::TensorOptions().dtype(dtype_).device(device), device);
  set_lazy_bits_on(view);
  return view;
}

at::Tensor TensorLayout::empty_on(const at::Device& device) const {
  const c10::InferenceMode no_inference(false);
  at::Tensor empty =
      at::empty_strided(sizes_, strides_, at::TensorOptions().dtype(dtype_).device(device));
  set_lazy_bits_on(empty);
  return empty;
}

at::Tensor TensorLayout::copy_of(const at::Tensor& source, const at::Device& device) const {
  const c10::InferenceMode no_inference(false);
  const c10::NoGradGuard no_grad;
  at::Tensor copy = empty_on(device);
  copy.copy_(source);
  return copy;
}

}  // namespace torch_offload
