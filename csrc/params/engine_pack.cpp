// Units that are copied packed: when they are packed, and what an edit of their weights means.
//
// Note [Packed units and edits]
// A raw unit is read from its master at every copy. A packed one is what the master was when it was
// packed, so it is compared with that, version and samples, in every pass, and packed anew on the
// spot when it differs: the call that notices blocks for as long as that takes. A unit for which
// there is no room any more is raw from then on.

#include <algorithm>
#include <optional>
#include <utility>

#include "codec/parallel.h"
#include "core/error.h"
#include "params/engine.h"

namespace py = pybind11;

namespace torch_offload {

namespace {

/// Room for weights that pack a little worse after an edit.
constexpr std::size_t with_slack(std::size_t packed_bytes) {
  return aligned_size(packed_bytes + packed_bytes / 64);
}

}  // namespace

UnitPacker Engine::packer_of(UnitIndex unit) const {
  std::vector<at::Tensor> unpacked;  // none: masters are plain here
  std::vector<TensorSource> tensors = sources_of(units_[unit], unpacked);
  EncodeOptions options;
  options.num_threads = default_num_threads();
  return {std::move(tensors), pipeline_->plan().units[unit].size_bytes, options,
          offered_blob(unit)};
}

void Engine::pack(double max_share) {
  check_at_rest("pack()");
  const Plan& plan = pipeline().plan();
  if (packed_ != nullptr) {
    throw StateError("expected units that are not packed yet, got a second call of pack()");
  }
  if (!device_->can_decode()) {
    throw NotImplementedError(
        "expected a device that decodes packed weights, got one for which this build has no "
        "decoder; use transport='raw', or build torch_offload where there is a CUDA compiler of "
        "torch's own major version");
  }
  if (packs_masters()) {
    pack_masters(max_share);
    return;
  }
  try {
    const py::gil_scoped_release no_gil;
    std::vector<std::optional<UnitPacker>> packers(units_.size());
    std::vector<std::size_t> sizes(units_.size(), 0);
    for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
      if (plan.is_resident(unit)) {
        continue;
      }
      const std::size_t unit_bytes = plan.units[unit].size_bytes;
      UnitPacker packer = packer_of(unit);
      const std::size_t room = with_slack(packer.blob_bytes());
      if (static_cast<double>(room) <= max_share * static_cast<double>(unit_bytes)) {
        sizes[unit] = room;
        packers[unit].emplace(std::move(packer));
      }
    }
    const std::size_t largest = *std::max_element(sizes.begin(), sizes.end());
    if (largest == 0) {
      return;  // nothing here is worth packing
    }
    PackedLoader::Options options;
    options.slot_bytes = largest;
    options.has_decode_stream = policy_of(pipeline_->options().mode).has_copy_stream;
    blobs_ = std::make_shared<PinnedArena>(device_, sizes);
    packed_ = std::make_unique<PackedLoader>(*device_, units_.size(), options);
    for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
      if (std::optional<UnitPacker>& packer = packers[unit]) {
        blobs_->prepare(unit);
        write_packed(unit, *packer);
      }
      blobs_->seal_up_to(unit);
    }
  } catch (...) {
    const py::gil_scoped_release no_gil;
    drop_packed();
    throw;
  }
  for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
    if (is_packed(unit)) {
      pipeline_->invalidate(unit);
      note_content(units_[unit]);
    }
  }
}

/// Leaves the unit raw where its blob needs more room than there is.
void Engine::write_packed(UnitIndex unit, UnitPacker& packer) {
  std::byte* const memory = blobs_->piece_memory(unit);
  const std::size_t room = blobs_->piece_bytes(unit);
  device_->host_write(memory, room, unit);
  if (!packer.write(memory, room)) {
    return;
  }
  if (packer.took_kept()) {
    blobs_taken_.push_back(unit);
  }
  packed_->set_source(unit, {memory, packer.blob_bytes(), pipeline_->plan().units[unit].size_bytes,
                             packer.num_tiles()});
}

/// Takes what the masters hold now as what is packed.
void Engine::note_content(UnitParameters& entry) {
  for (StreamedParameter& parameter : parameters_of(entry)) {
    parameter.note_copied();
    parameter.take_sample();
  }
  entry.is_sampled = true;
  entry.is_to_be_packed = false;
}

void Engine::pack_anew(UnitIndex unit) {
  {
    const py::gil_scoped_release no_gil;
    pipeline_->synchronize_onload(unit);  // a copy may still read what is packed
    packed_->drop_source(unit);           // raw, unless all goes well
    UnitPacker packer = packer_of(unit);
    write_packed(unit, packer);
  }
  note_content(units_[unit]);
}

/// Nothing may be in flight.
void Engine::drop_packed() {
  packed_.reset();
  blobs_.reset();
  are_masters_ready_ = false;
}

std::vector<StreamId> Engine::own_streams() const {
  return packed_ == nullptr ? std::vector<StreamId>{} : packed_->own_streams();
}

std::vector<std::size_t> Engine::transport_bytes() const {
  const Plan& plan = pipeline().plan();
  std::vector<std::size_t> sizes;
  sizes.reserve(units_.size());
  for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
    sizes.push_back(is_packed(unit) ? packed_->source(unit).packed_bytes
                                    : plan.units[unit].size_bytes);
  }
  return sizes;
}

}  // namespace torch_offload
