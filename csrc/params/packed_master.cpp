#include "params/packed_master.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>
#include <utility>

#include "codec/decoder.h"
#include "codec/parallel.h"
#include "core/error.h"

namespace py = pybind11;

namespace torch_offload {

namespace {

constexpr const char* kAttribute = "_torch_offload_packed";

py::object object_of(const at::Tensor& parameter) {
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(parameter));
}

const std::byte* bytes_of(const at::Tensor& tensor) {
  return static_cast<const std::byte*>(tensor.const_data_ptr());
}

/// As try_get_grad_accumulator(), which is three calls deep and asked for every use of a weight.
bool has_grad_accumulator(const at::Tensor& parameter) {
  const auto* const meta = static_cast<const torch::autograd::AutogradMeta*>(
      parameter.unsafeGetTensorImpl()->autograd_meta());
  return meta != nullptr && !meta->grad_accumulator_.expired();
}

/// The storage of a packed master has no memory, and keeps this: it goes by `tensor.data = weight`
/// to tensors that know no master.
void delete_part(void* part) { delete static_cast<PackedMaster::Part*>(part); }

const PackedMaster::Part* part_shown_by(const at::Tensor& tensor) {
  if (!tensor.has_storage()) {
    return nullptr;
  }
  const at::DataPtr& data = tensor.storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks();
  return data.get_deleter() == &delete_part
             ? static_cast<const PackedMaster::Part*>(data.get_context())
             : nullptr;
}

}  // namespace

void show_data(const at::Tensor& parameter, const at::Tensor& data) {
  if (has_grad_accumulator(parameter)) {
    parameter.set_data(data);  // a live graph's accumulator was made for the former data
  } else {
    // What set_data does otherwise, without a dispatched question whether the two are of a kind:
    // both are dense strided tensors.
    parameter.unsafeGetTensorImpl()->shallow_copy_from(data.getIntrusivePtr());
  }
}

PackedBlob::PackedBlob(std::shared_ptr<PinnedArena> memory, std::size_t size_bytes,
                       std::size_t place_bytes)
    : memory_(std::move(memory)),
      view_(BlobView::checked(memory_->piece_memory(0), size_bytes, place_bytes,
                              default_num_threads())) {}

PackedBlob::~PackedBlob() {
  if (Py_IsInitialized() != 0 && PyGILState_Check() != 0) {
    const py::gil_scoped_release no_gil;
    memory_.reset();
  }
}

void PackedBlob::check_process() const {
  if (memory_->in_forked_child()) {
    throw StateError(
        "expected packed weights to be read in the process that called offload(), got a forked "
        "child, which does not inherit page-locked memory; read them before the fork "
        "(weight.clone()), or start the child by spawn");
  }
}

void PackedBlob::unpack(std::size_t place_offset, std::size_t size_bytes,
                        std::byte* destination) const {
  check_process();
  decode_part(view_, place_offset, size_bytes, destination, default_num_threads());
}

bool PackedBlob::holds(std::size_t place_offset, const std::byte* bytes,
                       std::size_t size_bytes) const {
  check_process();
  return torch_offload::holds(view_, place_offset, bytes, size_bytes, default_num_threads());
}

PackedMaster::PackedMaster(Part part, const at::Tensor& parameter,
                           const py::object& packed_class_of)
    : part_(std::move(part)) {
  const std::shared_ptr<PackedMaster> former = shown_by(parameter);
  plain_class_ =
      former != nullptr ? former->plain_class_ : py::object(py::type::of(object_of(parameter)));
  packed_class_ = packed_class_of(plain_class_);
  nothing_ = part_.layout.view_of(nullptr, at::kCPU, nullptr);
  c10::StorageImpl* const storage = nothing_.storage().unsafeGetStorageImpl();
  storage->set_data_ptr_noswap(
      at::DataPtr(nullptr, std::make_unique<Part>(part_).release(), &delete_part, at::kCPU));
  // For whoever goes by the operators: an error, not a null pointer.
  storage->release_data_and_set_meta_custom_data_ptr_error_msg_(
      "torch_offload: expected a weight with memory of its own, got one whose master is packed; "
      "read it by an operator (weight.clone()), or offload with masters='plain'");
}

bool PackedMaster::holds(const at::Tensor& bytes) const {
  return part_.blob->holds(part_.place_offset, bytes_of(bytes), part_.layout.size_bytes());
}

void PackedMaster::set_class(const at::Tensor& parameter, const py::object& type) const {
  object_of(parameter).attr("__class__") = type;
}

void PackedMaster::show(const at::Tensor& parameter) {
  c10::TensorImpl* const impl = parameter.unsafeGetTensorImpl();
  if (holder_ != impl) {
    object_of(parameter).attr(kAttribute) = py::cast(shared_from_this());
    holder_ = impl;
  }
  set_class(parameter, packed_class_);
  show_data(parameter, nothing_);
  impl->set_python_dispatch(true);
}

void PackedMaster::make_plain(const at::Tensor& parameter) {
  parameter.unsafeGetTensorImpl()->set_python_dispatch(false);
  set_class(parameter, plain_class_);
}

void PackedMaster::take_back(const at::Tensor& parameter) {
  if (holder_ != parameter.unsafeGetTensorImpl()) {
    return;
  }
  make_plain(parameter);
  py::delattr(object_of(parameter), kAttribute);
  holder_ = nullptr;
}

bool PackedMaster::is_shown_by(const at::Tensor& parameter) const {
  return holder_ == parameter.unsafeGetTensorImpl() && holder_->is_python_dispatch();
}

std::shared_ptr<PackedMaster> PackedMaster::shown_by(const at::Tensor& parameter) {
  if (!parameter.unsafeGetTensorImpl()->is_python_dispatch()) {
    return nullptr;
  }
  const py::object object = object_of(parameter);
  if (!py::hasattr(object, kAttribute)) {
    return nullptr;
  }
  return object.attr(kAttribute).cast<std::shared_ptr<PackedMaster>>();
}

void PackedMaster::give_memory(const at::Tensor& tensor) {
  if (const std::shared_ptr<PackedMaster> master = shown_by(tensor)) {
    master->unpack(tensor);
  } else if (const Part* const part = part_shown_by(tensor)) {
    const c10::InferenceMode no_inference(false);
    const c10::NoGradGuard no_grad;
    show_data(tensor, part->unpacked().as_strided(tensor.sizes(), tensor.strides(),
                                                  tensor.storage_offset()));
  }
}

at::Tensor PackedMaster::Part::unpacked() const {
  at::Tensor plain = layout.empty_on(at::kCPU);
  blob->unpack(place_offset, layout.size_bytes(),
               static_cast<std::byte*>(plain.mutable_data_ptr()));
  return plain;
}

void PackedMaster::unpack(const at::Tensor& parameter) {
  const at::Tensor plain = unpacked();
  const std::shared_ptr<PackedMaster> alive = shared_from_this();  // the attribute may be the last
  take_back(parameter);
  show_data(parameter, plain);
}

}  // namespace torch_offload
