#pragma once

#include <torch/csrc/utils/pybind.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "params/byte_sample.h"
#include "params/packed_master.h"
#include "params/tensor_layout.h"

namespace torch_offload {

/// One entry of a module's `_parameters`: where the user's Parameter object is looked up.
struct ParameterSlot {
  pybind11::dict parameters;
  pybind11::str key;
};

/// Where a tensor's storage begins, whether or not it may be read; null without one.
const void* storage_address(const at::Tensor& tensor);

/// A parameter whose bytes wait in a master and pass through a place.
///
/// The user's Parameter object stays the same for good; what changes is the data that it shows. At
/// rest it *is* its master, a CPU tensor with a storage of its own over its bytes of the arena, or
/// it shows that its master is packed (see Note [Packed masters]). While its unit is in use it
/// shows the place on the device.
///
/// Threads: as Pipeline; calls that say so need the GIL.
class StreamedParameter {
 public:
  /// Takes note of the parameter; nothing is moved yet.
  /// Throws: ValueError unless it is a plain, dense, strided tensor.
  StreamedParameter(std::string name, at::Tensor parameter, std::vector<ParameterSlot> slots);

  const std::string& name() const { return name_; }
  std::size_t size_bytes() const { return layout_.size_bytes(); }
  const at::Tensor& parameter() const { return parameter_; }

  /// Moves the bytes into `master` and shows it from now on.
  ///
  /// Blocking:  copies on the calling thread through `fill`, or from the device, waiting for it.
  /// Lifetime:  `owner` keeps the master's memory alive for as long as any tensor shows it.
  void move_into(std::byte* master, std::shared_ptr<void> owner,
                 const std::function<void(const void* source, std::size_t size_bytes)>& fill);

  bool is_moved_in() const { return master_.defined() || packed_ != nullptr; }
  /// Whether it is where we have put it: in its master, or on the device after it was in one.
  bool is_moved() const { return was_moved_in_; }
  const at::Device& former_device() const { return former_device_; }
  /// Copies the bytes into ordinary memory on `device`. Blocks while copying.
  /// Throws: c10::OutOfMemoryError if they do not fit there.
  at::Tensor plain_copy(const at::Device& device) const;
  /// Shows such a copy from now on, and lets go of the master.
  void move_out(const at::Tensor& plain);

  /// Whether it has been given other data, which is not taken as its master.
  bool shows_other_data() const;
  /// Lets go of the master, and leaves what it shows as it is.
  void let_go();

  /// Shows its master for good, as ordinary memory that lives on with whoever shows it.
  void keep_master();

  /// Takes what is found in its slots for itself, and how that lies in memory, while it has no
  /// master: it is what moves into one next. Needs the GIL.
  /// Throws: StateError as adopt_replacement.
  void take_found_at_home();
  /// Throws: StateError as adopt_replacement would for what is found in its slots. Needs the GIL.
  void check_found() const;

  // Note [Packed masters] (engine_packed_masters.cpp) says when which of these holds.

  /// Takes what the parameter shows as its master, where it is; what lies on a device comes to the
  /// CPU. It is ordinary memory until it is packed or moved.
  void take_in_place();
  /// Takes a part of this blob for its master from now on. It shows that from the next call of
  /// show_packed() on. Needs the GIL.
  void hold_packed(std::shared_ptr<const PackedBlob> blob, std::size_t place_offset,
                   const pybind11::object& packed_class_of);
  const PackedMaster* packed_master() const { return packed_.get(); }
  /// Whether somebody else shows its unpacked bytes as well: he may write to them. Tensors of
  /// `ours` that lie elsewhere in the same storage are nobody else's. Needs the GIL.
  bool is_shared_beside(const std::vector<at::Tensor>& ours) const;
  /// Whether its unpacked bytes are a part of a storage, in which others may lie.
  bool is_part_of_storage() const;
  /// Lets go of the unpacked bytes and shows its packed master. Needs the GIL.
  void show_packed();
  /// Goes on showing the unpacked bytes, as memory of whoever else shows them: no copy reads it.
  void stay_unpacked() { owner_.reset(); }
  /// Its bytes, where they are not packed only; or undefined.
  const at::Tensor& master() const { return master_; }
  /// Whether it shows a packed master that nobody has unpacked or replaced. Needs the GIL.
  /// Throws: StateError if the parameter is gone.
  bool is_packed_at_rest() const;
  /// Whether its only bytes are packed.
  bool is_packed() const { return packed_ != nullptr && !master_.defined(); }
  /// Lets it show ordinary memory, with the bytes that were packed. Needs the GIL.
  void unpack();
  /// Takes what is found in its slots as its master, ordinary memory. Returns whether it is the
  /// same object, laid out in memory as before. Needs the GIL.
  /// Throws: StateError as adopt_replacement.
  bool take_found();
  /// Whether copies may read the master: page-locked memory.
  bool has_locked_master() const { return owner_ != nullptr; }
  /// Its bytes, unpacked where they have to be: then into memory that the tensor owns.
  at::Tensor plain_bytes() const { return is_packed() ? packed_->unpacked() : master_; }

  /// Shows the place at this address.
  void show_place(std::byte* place, const at::Device& device);
  /// Shows what it is at rest.
  void show_master();
  using PlaceRef = c10::weak_intrusive_ptr<c10::StorageImpl>;
  /// Whether more than our own tensor shows the place, or Python has once looked at its storage.
  /// Asked while the parameter does not show it.
  bool place_may_be_shared() const { return place_.defined() && place_.storage().use_count() > 1; }
  /// Lets go of our tensor, and makes it an error to read anybody else's: by then the place may
  /// hold another unit. What is returned lives on as long as those do. Needs the GIL.
  PlaceRef drop_place();

  /// What an edit between two forwards did to the parameter.
  enum class Edit {
    kNone,      ///< Shows its master, at the version that was copied last.
    kInPlace,   ///< The version has moved: the master's bytes are new.
    kReplaced,  ///< Another Parameter object, or other data: they must be adopted first.
  };
  /// Compares object, pointer, shape, strides, dtype, conjugate and negative bits, version. Needs
  /// the GIL.
  /// Throws: StateError if the parameter is gone.
  Edit edit_since_copy() const;
  /// Makes the replaced parameter's bytes the master's. Needs the GIL.
  /// Throws: StateError if they have another shape, dtype or layout in memory.
  void adopt_replacement();

  /// Notes version, taken as what the copy issued now will hold.
  void note_copied() { copied_version_ = version(); }
  /// Takes a sample of the master's bytes, to be compared later.
  void take_sample();
  /// False as well where there is no sample: one was not taken of what was read from a file.
  bool sample_is_equal() const { return sample_ != nullptr && sample_->is_equal(master_); }

  /// Notes what the forward of the unit must leave alone.
  void note_acquired() { acquired_version_ = version(); }
  /// Takes a sample of the place's bytes, to be compared at the end of this use: it finds what
  /// moves no version, as `weight.data *= 2`. Waits for the current stream unless that is the host.
  void take_place_sample();
  /// Whether anyone but us changed the parameter's version since, the data that it shows, or
  /// sampled bytes of its place. Asked once, while it is still shown.
  bool was_changed_in_forward();
  /// Counts as an in-place change for autograd, so that a backward through this use raises instead
  /// of reading whatever the place holds by then. It is not an edit.
  void bump_version();

 private:
  std::int64_t version() const;
  const at::Tensor& found_parameter() const;  // as long as the slots stay as they are
  void show(const at::Tensor& data);
  at::Tensor found_with_memory() const;
  void take_layout_of(const at::Tensor& data);
  void let_go_of_packed();

  std::string name_;
  std::vector<ParameterSlot> slots_;
  at::Tensor parameter_;  // the user's object
  at::Tensor master_;
  at::Tensor place_;
  std::shared_ptr<void> owner_;  // of the master's memory; none while that is ordinary
  std::shared_ptr<PackedMaster> packed_;
  const void* shown_ = nullptr;  // the data that we let the parameter show last
  TensorLayout layout_;
  at::Device former_device_;
  bool was_moved_in_ = false;
  std::int64_t copied_version_ = -1;
  std::int64_t acquired_version_ = -1;
  bool is_place_sampled_ = false;
  // Apart: every use of the unit reads what is above.
  std::unique_ptr<ByteSample> sample_;        // of the master
  std::unique_ptr<ByteSample> place_sample_;  // at the beginning of this use
};

}  // namespace torch_offload
