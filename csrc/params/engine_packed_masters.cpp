// Masters that are packed: how units come to be held so, and what an edit of their weights means.
//
// Note [Packed masters]
// A unit's blob in page-locked memory is the only place on the host where its weights are, and what
// copies read; of one that stays packed on the device it is what is brought there, once and after
// each edit. Each of its parameters shows at rest that it is packed (PackedMaster). The states of
// one:
//
//   packed      it shows its part of the blob. Nobody can have written to it.
//   unpacked    somebody has read or written it in a way that needs memory: an alias (a view,
//               `.data`, numpy), an operator in place, other data, another Parameter. It shows that
//               memory, which no copy may read: it is not page-locked.
//   plain       it shows a locked master in the arena, as with masters="plain": its unit was not
//               worth packing, or there was no room for it.
//
// Before a unit is used all its parameters are looked at. What is unpacked is compared with the
// blob, all of it: if they are equal it becomes packed again, else the unit is packed anew. Where
// somebody else still shows the unpacked memory, a parameter stays unpacked and is compared before
// every use: an edit through that alias must not be lost. Other weights of the model that lie
// elsewhere in the same storage, as slices of one buffer do, are nobody else.
//
// Memory: units are packed one by one, each into an arena of its own, and the former bytes of one
// are freed before the next is packed. So there is never more than the weights and one packed unit.

#include <algorithm>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "params/engine.h"

namespace py = pybind11;

namespace torch_offload {

bool Engine::is_plain(const UnitParameters& entry) const {
  for (std::size_t i = entry.range.begin; i < entry.range.end; ++i) {
    if (!parameters_[i].has_locked_master()) {
      return false;
    }
  }
  return true;
}

std::vector<TensorSource> Engine::sources_of(const UnitParameters& entry,
                                             std::vector<at::Tensor>& unpacked) const {
  std::vector<TensorSource> tensors;
  auto offset = entry.offsets.begin();
  for (std::size_t i = entry.range.begin; i < entry.range.end; ++i) {
    const StreamedParameter& parameter = parameters_[i];
    const std::byte* bytes = nullptr;
    if (parameter.has_locked_master()) {
      bytes = masters_->memory(i);
    } else {
      unpacked.push_back(parameter.plain_bytes());
      bytes = static_cast<const std::byte*>(unpacked.back().const_data_ptr());
    }
    tensors.push_back({bytes, parameter.size_bytes(), *offset++,
                       parameter.parameter().scalar_type() == at::kBFloat16 ? ElementType::kBf16
                                                                            : ElementType::kOther,
                       counts_of(i)});
  }
  return tensors;
}

/// What users did at rest becomes what there is to be packed.
void Engine::take_found(const UnitParameters& entry) {
  for (StreamedParameter& parameter : parameters_of(entry)) {
    if (!parameter.has_locked_master() &&
        parameter.edit_since_copy() == StreamedParameter::Edit::kReplaced) {
      parameter.take_found();
    }
  }
}

void Engine::pack_masters(bool keeps_shared) {
  std::vector<std::size_t> rooms(units_.size(), 0);
  for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
    UnitParameters& entry = units_[unit];
    if (pipeline_->plan().is_resident(unit)) {
      continue;
    }
    take_found(entry);
    if (pipeline_->plan().transport(unit) == Transport::kRaw || !hold(unit, keeps_shared)) {
      make_plain(unit);
    } else {
      rooms[unit] = std::min(packed_room_bytes(entry.blob->size_bytes()), most_packed_bytes_[unit]);
    }
  }
  if (packed_ == nullptr) {
    const py::gil_scoped_release no_gil;
    make_room_for(rooms);
  }
  for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
    if (units_[unit].blob != nullptr && !is_packed(unit)) {
      load_from_blob(unit);
    }
  }
  are_masters_ready_ = true;
}

/// Packs masters that are to be packed, where memory was missing when that was tried.
void Engine::make_masters_ready() {
  if (packs_masters() && !are_masters_ready_) {
    pack_masters(/*keeps_shared=*/true);
  }
}

/// What the unit's blob may take, by the plan or by the room that there is for it by now.
std::size_t Engine::most_blob_bytes(UnitIndex unit) const {
  if (packed_ == nullptr) {
    return most_packed_bytes_[unit];
  }
  return packed_->has_room(unit) ? packed_->room_bytes(unit) : packed_->slot_bytes();
}

/// From now on its blob, for which there is room, is what is copied or stays on the device.
void Engine::load_from_blob(UnitIndex unit) {
  UnitParameters& entry = units_[unit];
  const PackedBlob& blob = *entry.blob;
  {
    const py::gil_scoped_release no_gil;
    set_packed_source(unit,
                      {blob.bytes(), blob.size_bytes(), blob.place_bytes(), blob.num_tiles()});
  }
  pipeline_->invalidate(unit);
  entry.is_sampled = true;  // the blob tells more than a sample
}

/// Nothing reads the unit's blob from now on. Blocks until what is in flight has done so.
void Engine::drop_blob(UnitIndex unit) {
  if (is_packed(unit)) {
    const py::gil_scoped_release no_gil;
    pipeline_->synchronize_onload(unit);
    packed_->drop_source(unit);
  }
  units_[unit].blob.reset();
}

/// Packs the unit, unless it is. Returns false where its blob would be too large.
bool Engine::hold(UnitIndex unit, bool keeps_shared) {
  UnitParameters& entry = units_[unit];
  if (adopt_blob(unit)) {
    return entry.blob->size_bytes() <= most_blob_bytes(unit);
  }
  drop_blob(unit);
  std::shared_ptr<PackedBlob> blob;
  {
    const py::gil_scoped_release no_gil;
    std::vector<at::Tensor> unpacked;
    UnitPacker packer = packer_of(unit, unpacked);
    const std::size_t room = aligned_size(packer.blob_bytes());
    if (packer.blob_bytes() > most_blob_bytes(unit)) {
      return false;
    }
    const auto memory = std::make_shared<PinnedArena>(device_, std::vector<std::size_t>{room});
    memory->prepare(0);
    device_->host_write(memory->piece_memory(0), room, unit);
    if (!packer.write(memory->piece_memory(0), room)) {
      return false;
    }
    if (packer.took_kept()) {
      blobs_taken_.push_back(unit);
    }
    blob = std::make_shared<PackedBlob>(memory, packer.blob_bytes(),
                                        pipeline_->plan().units[unit].size_bytes);
  }
  auto offset = entry.offsets.begin();
  for (StreamedParameter& parameter : parameters_of(entry)) {
    parameter.hold_packed(blob, *offset++, packed_class_of_);
  }
  show_packed(entry, keeps_shared);
  entry.blob = std::move(blob);
  return true;
}

/// Lets the unit's parameters show what is packed; where `keeps_shared`, those stay unpacked whose
/// memory somebody else shows. What they had in the arena is given back.
void Engine::show_packed(const UnitParameters& entry, bool keeps_shared) {
  std::optional<std::vector<at::Tensor>> ours;  // asked for where it matters
  for (StreamedParameter& parameter : parameters_of(entry)) {
    bool is_shared = keeps_shared && parameter.is_shared_beside({});
    if (is_shared && parameter.is_part_of_storage()) {
      if (!ours) {
        ours = our_tensors();
      }
      is_shared = parameter.is_shared_beside(*ours);
    }
    if (is_shared) {
      parameter.stay_unpacked();
    } else {
      parameter.show_packed();
    }
  }
  const py::gil_scoped_release no_gil;
  for (std::size_t i = entry.range.begin; i < entry.range.end; ++i) {
    masters_->release(i);
  }
}

/// What the model and we show, each tensor once.
std::vector<at::Tensor> Engine::our_tensors() const {
  std::vector<at::Tensor> ours = tensors_of_model_
                                     ? tensors_of_model_().cast<std::vector<at::Tensor>>()
                                     : std::vector<at::Tensor>{};
  for (const StreamedParameter& parameter : parameters_) {
    ours.push_back(parameter.parameter());
    if (parameter.master().defined()) {
      ours.push_back(parameter.master());
    }
  }
  const auto impl = [](const at::Tensor& tensor) { return tensor.unsafeGetTensorImpl(); };
  std::sort(ours.begin(), ours.end(),
            [&](const auto& a, const auto& b) { return std::less<>()(impl(a), impl(b)); });
  ours.erase(std::unique(ours.begin(), ours.end(),
                         [&](const auto& a, const auto& b) { return impl(a) == impl(b); }),
             ours.end());
  return ours;
}

/// Whether the parameters are packed as this unit already, as they are where another plan has left
/// the unit as it was.
bool Engine::adopt_blob(UnitIndex unit) {
  UnitParameters& entry = units_[unit];
  std::shared_ptr<const PackedBlob> blob;
  auto offset = entry.offsets.begin();
  for (const StreamedParameter& parameter : parameters_of(entry)) {
    const PackedMaster* const master = parameter.packed_master();
    if (!parameter.is_packed() || (blob != nullptr && master->blob() != blob) ||
        master->place_offset() != *offset++) {
      return false;
    }
    blob = master->blob();
  }
  if (blob == nullptr || blob->place_bytes() != pipeline_->plan().units[unit].size_bytes) {
    return false;
  }
  entry.blob = std::move(blob);
  if (offered_blob(unit).bytes != nullptr) {
    blobs_taken_.push_back(unit);
  }
  return true;
}

/// Gives the unit locked masters in the arena, from which it is copied raw.
void Engine::make_plain(UnitIndex unit) {
  UnitParameters& entry = units_[unit];
  if (pipeline_->plan().transport(unit) != Transport::kRaw) {
    pipeline_->set_transport(unit, Transport::kRaw);
  }
  if (is_plain(entry)) {
    return;
  }
  drop_blob(unit);
  std::vector<std::size_t> sizes(parameters_.size(), 0);
  for (std::size_t i = entry.range.begin; i < entry.range.end; ++i) {
    sizes[i] = aligned_size(parameters_[i].size_bytes());
  }
  {
    const py::gil_scoped_release no_gil;
    masters_->reserve(std::move(sizes));
  }
  for (std::size_t i = entry.range.begin; i < entry.range.end; ++i) {
    StreamedParameter& parameter = parameters_[i];
    if (parameter.has_locked_master()) {
      continue;
    }
    parameter.unpack();
    parameter.move_into(masters_->memory(i), masters_->owner(i),
                        [&](const void* source, std::size_t size_bytes) {
                          const py::gil_scoped_release no_gil;
                          masters_->arena(i).fill(i, source, size_bytes);
                        });
  }
  {
    const py::gil_scoped_release no_gil;
    for (std::size_t i = entry.range.begin; i < entry.range.end; ++i) {
      masters_->seal(i, i + 1);
    }
  }
  entry.segments.clear();
  entry.is_sampled = false;
  pipeline_->invalidate(unit);
}

void Engine::adopt_packed_edits(UnitIndex unit) {
  UnitParameters& entry = units_[unit];
  bool is_touched = false;
  bool differs = entry.blob == nullptr;
  for (StreamedParameter& parameter : parameters_of(entry)) {
    if (parameter.is_packed_at_rest()) {
      continue;
    }
    is_touched = true;
    const bool may_be_equal = parameter.take_found();
    differs = differs || !may_be_equal || parameter.packed_master()->blob() != entry.blob ||
              !parameter.packed_master()->holds(parameter.plain_bytes());
  }
  if (differs) {
    are_masters_ready_ = false;  // unless all goes well
    if (hold(unit, /*keeps_shared=*/true)) {
      load_from_blob(unit);
    } else {
      make_plain(unit);
    }
    are_masters_ready_ = true;
  } else if (is_touched) {
    show_packed(entry, /*keeps_shared=*/true);
  }
}

}  // namespace torch_offload
