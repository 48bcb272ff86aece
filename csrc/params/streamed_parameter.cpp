#include "params/streamed_parameter.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/python_variable.h>

#include <utility>

#include "core/error.h"
#include "core/unit.h"

namespace torch_offload {

const void* storage_address(const at::Tensor& tensor) {
  return tensor.has_storage()
             ? tensor.storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().get()
             : nullptr;
}

namespace {

/// Where a tensor's data begins, whether or not it may be read.
const void* data_address(const at::Tensor& tensor) {
  const auto* const begin = static_cast<const std::byte*>(storage_address(tensor));
  return begin == nullptr
             ? nullptr
             : begin + static_cast<std::size_t>(tensor.storage_offset()) * tensor.itemsize();
}

/// Whether two dense tensors of one storage show a byte of it both.
bool overlap(const at::Tensor& one, const at::Tensor& other) {
  const auto begin = [](const at::Tensor& tensor) {
    return static_cast<std::size_t>(tensor.storage_offset()) * tensor.itemsize();
  };
  return begin(one) < begin(other) + other.nbytes() && begin(other) < begin(one) + one.nbytes();
}

/// Whether anybody shows this memory beside `num_ours` tensors. A storage that Python has once
/// looked at has an object, which is one more reference, and lives on with only ours.
bool is_shown_by_others(const at::Storage& storage, std::size_t num_ours) {
  const c10::impl::PyObjectSlot& slot = *storage.unsafeGetStorageImpl()->pyobj_slot();
  const std::size_t num_by_python = slot.load_pyobj() == nullptr ? 0 : 1;
  return storage.use_count() > num_ours + num_by_python ||
         (num_by_python != 0 && !slot.has_unique_reference());
}

}  // namespace

StreamedParameter::StreamedParameter(std::string name, at::Tensor parameter,
                                     std::vector<ParameterSlot> slots)
    : name_(std::move(name)),
      slots_(std::move(slots)),
      parameter_(std::move(parameter)),
      layout_(parameter_),
      former_device_(parameter_.device()) {
  if (parameter_.layout() != at::kStrided || parameter_.is_inference() ||
      !parameter_.is_non_overlapping_and_dense()) {
    throw ValueError("expected parameter '" + name_ +
                     "' to be a dense strided tensor made outside inference mode, got one that is "
                     "not; keep it on the device with resident=['" +
                     name_ + "']");
  }
}

std::int64_t StreamedParameter::version() const {
  return static_cast<std::int64_t>(
      parameter_.unsafeGetTensorImpl()->version_counter().current_version());
}

void StreamedParameter::bump_version() {
  parameter_.unsafeGetTensorImpl()->bump_version();
  copied_version_ += copied_version_ == version() - 1 ? 1 : 0;
}

void StreamedParameter::move_into(
    std::byte* master, std::shared_ptr<void> owner,
    const std::function<void(const void* source, std::size_t size_bytes)>& fill) {
  if (layout_.fits(parameter_)) {
    take_layout_of(parameter_);  // on the device it may have been given other data
  }
  at::Tensor filled = layout_.view_of(master, at::kCPU, owner);
  if (parameter_.device().is_cpu()) {
    fill(parameter_.const_data_ptr(), size_bytes());
  } else {
    const c10::NoGradGuard no_grad;
    filled.copy_(parameter_);
  }
  // Only now: after a failure above there must be nothing to move out.
  let_go_of_packed();
  owner_ = std::move(owner);
  master_ = std::move(filled);
  was_moved_in_ = true;
  show_master();
}

at::Tensor StreamedParameter::plain_copy(const at::Device& device) const {
  if (!is_moved_in()) {
    PackedMaster::give_memory(parameter_);
  }
  return layout_.copy_of(is_moved_in() ? plain_bytes() : parameter_, device);
}

void StreamedParameter::let_go_of_packed() {
  if (packed_ != nullptr) {
    packed_->take_back(parameter_);
    packed_.reset();
  }
}

void StreamedParameter::move_out(const at::Tensor& plain) {
  let_go();
  parameter_.set_data(plain);
}

void StreamedParameter::let_go() {
  let_go_of_packed();
  master_.reset();
  place_.reset();
  owner_.reset();
}

bool StreamedParameter::shows_other_data() const {
  if (!is_moved_in()) {
    return !layout_.fits(parameter_);  // on the device: nobody has noted which data that is
  }
  return is_packed() ? !packed_->is_shown_by(parameter_)
                     : data_address(parameter_) != shown_ || !layout_.is_of(parameter_);
}

void StreamedParameter::keep_master() {
  const at::Tensor master = master_;
  move_out(master);
}

void StreamedParameter::show_place(std::byte* place, const at::Device& device) {
  if (!place_.defined() || place_.const_data_ptr() != place) {
    place_ = layout_.view_of(place, device, nullptr);
  }
  if (is_packed()) {
    packed_->make_plain(parameter_);
  }
  show(place_);
}

void StreamedParameter::show_master() {
  if (is_packed()) {
    packed_->show(parameter_);
    shown_ = nullptr;
  } else {
    show(master_);
  }
}

StreamedParameter::PlaceRef StreamedParameter::drop_place() {
  // Kernels that are under way keep reading: it is the storage that forgets where it lies.
  place_.storage().unsafeGetStorageImpl()->release_data_and_set_meta_custom_data_ptr_error_msg_(
      "torch_offload: expected streamed weights to be read while their unit runs, got a view of '" +
      name_ +
      "' that is read afterwards, in a backward perhaps (which is not supported): other weights "
      "lie there by then; keep a clone (weight.clone()) or the weight itself on the device with "
      "resident=['" +
      name_ + "']");
  PlaceRef place(place_.storage().getWeakStorageImpl());
  place_.reset();
  return place;
}

void StreamedParameter::show(const at::Tensor& data) {
  show_data(parameter_, data);
  shown_ = data_address(data);
}

const at::Tensor& StreamedParameter::found_parameter() const {
  const at::Tensor* found = &parameter_;
  for (const ParameterSlot& slot : slots_) {
    PyObject* object = PyDict_GetItemWithError(slot.parameters.ptr(), slot.key.ptr());
    if (object == nullptr || !THPVariable_Check(object)) {
      throw StateError("expected parameter '" + name_ +
                       "' to be where it was at offload(), got none; call handle.remove() before "
                       "changing the structure of the model, and offload() again afterwards");
    }
    const at::Tensor& tensor = THPVariable_Unpack(object);
    if (!tensor.is_same(parameter_)) {
      found = &tensor;
    }
  }
  return *found;
}

/// The parameter that is in the slots, which fits and can be read.
at::Tensor StreamedParameter::found_with_memory() const {
  const at::Tensor found = found_parameter();
  PackedMaster::give_memory(found);  // a streamed weight that was put here from elsewhere
  layout_.check_fits(found, name_);
  return found;
}

void StreamedParameter::check_found() const {
  const at::Tensor& found = found_parameter();
  if (PackedMaster::shown_by(found) == nullptr) {
    layout_.check_fits(found, name_);
  }
}

void StreamedParameter::take_found_at_home() {
  parameter_ = found_with_memory();
  take_layout_of(parameter_);
}

StreamedParameter::Edit StreamedParameter::edit_since_copy() const {
  if (is_packed()) {
    return is_packed_at_rest() ? Edit::kNone : Edit::kReplaced;
  }
  if (!found_parameter().is_same(parameter_) ||
      data_address(parameter_) != shown_ ||  // at rest its master
      !layout_.is_of(parameter_)) {
    return Edit::kReplaced;
  }
  return version() == copied_version_ ? Edit::kNone : Edit::kInPlace;
}

bool StreamedParameter::was_changed_in_forward() {
  const bool was_sampled = std::exchange(is_place_sampled_, false);
  return version() != acquired_version_ || data_address(parameter_) != shown_ ||
         (was_sampled && !place_sample_->is_equal(place_));
}

void StreamedParameter::take_place_sample() {
  if (place_sample_ == nullptr) {
    place_sample_ = std::make_unique<ByteSample>();
  }
  place_sample_->take(place_);
  is_place_sampled_ = true;
}

void StreamedParameter::take_sample() {
  if (sample_ == nullptr) {
    sample_ = std::make_unique<ByteSample>();
  }
  sample_->take(master_);
}

/// From now on the bytes are laid out as those of this tensor, which fits.
void StreamedParameter::take_layout_of(const at::Tensor& data) {
  if (!layout_.is_of(data)) {
    layout_.take_order_of(data);
    place_.reset();
  }
}

void StreamedParameter::adopt_replacement() {
  if (!has_locked_master()) {
    take_found();
    return;
  }
  const at::Tensor replacement = found_with_memory();
  const c10::InferenceMode no_inference(false);
  const c10::NoGradGuard no_grad;
  const at::Tensor data = replacement.detach();
  const bool has_own_bytes = data.const_data_ptr() != master_.const_data_ptr();
  const bool shows_master = !parameter_.unsafeGetTensorImpl()->is_python_dispatch() &&
                            data_address(parameter_) == master_.const_data_ptr();
  if (has_own_bytes && !replacement.is_same(parameter_) && shows_master) {
    parameter_.set_data(master_.clone());  // whoever still holds the former object keeps its values
  }
  take_layout_of(data);
  master_ = layout_.view_of(master_.mutable_data_ptr(), at::kCPU, owner_);
  if (has_own_bytes) {
    master_.copy_(data);
  }
  parameter_ = replacement;
  show_master();
}

// --- packed masters ----------------------------------------------------------------------------

void StreamedParameter::take_in_place() {
  const c10::InferenceMode no_inference(false);
  if (parameter_.device().is_cpu()) {
    const c10::NoGradGuard no_grad;
    master_ = parameter_.detach();
  } else {
    master_ = layout_.copy_of(parameter_, at::kCPU);  // what it shows, whatever was packed before
  }
  owner_.reset();
  was_moved_in_ = true;
  show(master_);
}

void StreamedParameter::hold_packed(std::shared_ptr<const PackedBlob> blob,
                                    std::size_t place_offset,
                                    const pybind11::object& packed_class_of) {
  const bool was_packed = is_packed();
  const auto master = std::make_shared<PackedMaster>(
      PackedMaster::Part{std::move(blob), place_offset, layout_}, parameter_, packed_class_of);
  if (packed_ != nullptr) {
    packed_->take_back(parameter_);
  }
  packed_ = master;
  if (was_packed) {
    show_master();
  }
}

bool StreamedParameter::is_shared_beside(const std::vector<at::Tensor>& ours) const {
  if (!master_.defined()) {
    return false;
  }
  const at::Storage& storage = master_.storage();
  std::size_t num_ours = 2;  // the parameter's own and the master's
  for (const at::Tensor& one : ours) {
    const bool is_in_storage =
        one.has_storage() && one.storage().unsafeGetStorageImpl() == storage.unsafeGetStorageImpl();
    if (is_in_storage && !one.is_same(parameter_) && !one.is_same(master_) &&
        one.is_non_overlapping_and_dense() && !overlap(one, master_)) {
      ++num_ours;
    }
  }
  return is_shown_by_others(storage, num_ours);
}

bool StreamedParameter::is_part_of_storage() const {
  return master_.defined() && master_.storage().nbytes() > size_bytes();
}

void StreamedParameter::show_packed() {
  master_.reset();
  owner_.reset();
  show_master();
}

bool StreamedParameter::is_packed_at_rest() const {
  return is_packed() && found_parameter().is_same(parameter_) && packed_->is_shown_by(parameter_);
}

void StreamedParameter::unpack() {
  if (!is_packed()) {
    return;
  }
  packed_->unpack(parameter_);
  packed_.reset();
  take_in_place();
}

bool StreamedParameter::take_found() {
  const at::Tensor found = found_with_memory();
  const bool is_same = found.is_same(parameter_);
  if (!is_same && packed_ != nullptr && packed_->is_shown_by(parameter_)) {
    packed_->unpack(parameter_);  // whoever still holds the former object keeps its values
  }
  parameter_ = found;
  const bool has_same_layout = layout_.is_of(found);
  take_layout_of(found);
  take_in_place();
  if (!is_same || !has_same_layout) {
    packed_.reset();
  }
  return packed_ != nullptr;
}

}  // namespace torch_offload
