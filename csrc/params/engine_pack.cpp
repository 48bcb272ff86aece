// Units that travel or stay packed: when they are packed, and what an edit of their weights means.
//
// Note [Packed units and edits]
// A raw unit is read from its master at every copy. A packed one is what the master was when it was
// packed, so it is compared with that, version and samples, in every pass, and packed anew on the
// spot when it differs: the call that notices blocks for as long as that takes. One that stays
// packed on the device is packed into page-locked memory that all of them share, and brought there
// from it. A unit for which there is no room any more is raw from then on, and the plan says so.

#include <algorithm>
#include <cstdio>
#include <exception>
#include <optional>
#include <utility>

#include "codec/parallel.h"
#include "core/error.h"
#include "params/engine.h"

namespace py = pybind11;

namespace torch_offload {

UnitEncoder Engine::encoder_of(const UnitParameters& entry, std::size_t unit_bytes) const {
  std::vector<TensorSource> tensors;
  auto offset = entry.offsets.begin();
  for (std::size_t i = entry.range.begin; i < entry.range.end; ++i) {
    const StreamedParameter& parameter = parameters_[i];
    tensors.push_back({masters_->memory(i), parameter.size_bytes(), *offset++,
                       parameter.parameter().scalar_type() == at::kBFloat16 ? ElementType::kBf16
                                                                            : ElementType::kOther});
  }
  EncodeOptions options;
  options.num_threads = default_num_threads();
  return {tensors, unit_bytes, options};
}

void Engine::pack(const std::vector<std::size_t>& most_bytes) {
  check_at_rest("pack()");
  pipeline();
  if (most_bytes.size() != units_.size()) {
    throw ValueError("expected what each of the " + std::to_string(units_.size()) +
                     " units may take packed, got " + std::to_string(most_bytes.size()) +
                     " answers");
  }
  if (packed_ != nullptr) {
    throw StateError("expected units that are not packed yet, got a second call of pack()");
  }
  if (!device_->can_decode()) {
    throw NotImplementedError(
        "expected a device that decodes packed weights, got one for which this build has no "
        "decoder; use transport='raw', or build torch_offload where there is a CUDA compiler of "
        "torch's own major version");
  }
  most_packed_bytes_ = most_bytes;
  try {
    const py::gil_scoped_release no_gil;
    const std::vector<std::optional<UnitEncoder>> encoders = encoders_within(most_bytes);
    make_room_for(encoders);
    for (UnitIndex unit = 0; unit < encoders.size() && packed_ != nullptr; ++unit) {
      if (const std::optional<UnitEncoder>& encoder = encoders[unit]) {
        write_packed(unit, *encoder);
      }
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

/// Of the units that the plan wants packed and that packing shrinks; the others are raw now.
std::vector<std::optional<UnitEncoder>> Engine::encoders_within(
    const std::vector<std::size_t>& most_bytes) {
  std::vector<std::optional<UnitEncoder>> encoders(units_.size());
  for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
    const Plan& plan = pipeline_->plan();
    if (plan.transport(unit) == Transport::kRaw) {
      continue;
    }
    const std::size_t unit_bytes = plan.units[unit].size_bytes;
    UnitEncoder encoder = encoder_of(units_[unit], unit_bytes);
    if (packed_room_bytes(encoder.blob_bytes()) <= most_bytes[unit]) {
      encoders[unit].emplace(std::move(encoder));
    } else {
      pipeline_->set_transport(unit, Transport::kRaw);
    }
  }
  return encoders;
}

/// On the host for each unit that is copied packed, and for one of those that stay on the device;
/// there for the ring, and for all of these. None of it where nothing is packed.
void Engine::make_room_for(const std::vector<std::optional<UnitEncoder>>& encoders) {
  const Plan& plan = pipeline_->plan();
  PackedLoader::Options options;
  options.has_decode_stream = policy_of(pipeline_->options().mode).has_copy_stream;
  options.streams = packed_streams_;
  options.resident_bytes.assign(units_.size(), 0);
  std::vector<std::size_t> pieces(units_.size() + 1, 0);
  for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
    const std::optional<UnitEncoder>& encoder = encoders[unit];
    if (!encoder) {
      continue;
    }
    const std::size_t room_bytes = packed_room_bytes(encoder->blob_bytes());
    if (plan.stays_packed(unit)) {
      options.resident_bytes[unit] = room_bytes;
      pieces.back() = std::max(pieces.back(), room_bytes);
    } else {
      pieces[unit] = room_bytes;
      options.slot_bytes = std::max(options.slot_bytes, room_bytes);
    }
  }
  if (*std::max_element(pieces.begin(), pieces.end()) == 0) {
    return;
  }
  blobs_ = std::make_shared<PinnedArena>(device_, pieces);
  packed_ = std::make_unique<PackedLoader>(*device_, units_.size(), options);
  packed_streams_ = packed_->streams();
  for (PieceIndex piece = 0; piece < pieces.size(); ++piece) {
    if (pieces[piece] != 0) {
      blobs_->prepare(piece);
    }
    blobs_->seal_up_to(piece);
  }
}

/// There is room for it.
void Engine::write_packed(UnitIndex unit, const UnitEncoder& encoder) {
  const bool stays = packed_->has_room(unit);
  std::byte* const memory = blobs_->piece_memory(stays ? units_.size() : unit);
  device_->host_write(memory, encoder.blob_bytes(), unit);
  encoder.encode(memory);
  const PackedSource source{memory, encoder.blob_bytes(), pipeline_->plan().units[unit].size_bytes,
                            encoder.num_tiles()};
  if (stays) {
    packed_->upload(unit, source);
  } else {
    packed_->set_source(unit, source);
  }
  pipeline_->set_transport(unit, stays ? Transport::kPackedResident : Transport::kPacked);
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
    pipeline_->synchronize_onload(unit);  // a copy or decoder may still read what is packed
    packed_->drop_source(unit);           // raw, unless all goes well
    pipeline_->set_transport(unit, Transport::kRaw);
    const UnitEncoder encoder = encoder_of(units_[unit], pipeline_->plan().units[unit].size_bytes);
    const std::size_t room_bytes =
        packed_->has_room(unit) ? packed_->room_bytes(unit) : blobs_->piece_bytes(unit);
    if (encoder.blob_bytes() <= room_bytes) {
      write_packed(unit, encoder);
    }
  }
  note_content(units_[unit]);
}

/// All units are raw from now on. Nothing may be in flight.
void Engine::drop_packed() {
  packed_.reset();
  blobs_.reset();
  if (pipeline_ == nullptr) {
    return;
  }
  for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
    if (pipeline_->plan().transport(unit) != Transport::kRaw) {
      pipeline_->set_transport(unit, Transport::kRaw);
    }
  }
}

/// After a plan that could not be had. Without room for it all units are raw.
void Engine::pack_as_before(const std::vector<Transport>& transports) noexcept {
  try {
    for (UnitIndex unit = 0; unit < transports.size(); ++unit) {
      pipeline_->set_transport(unit, transports[unit]);
    }
    pack(std::vector<std::size_t>(most_packed_bytes_));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "torch_offload: units travel raw, they could not be packed again: %s\n",
                 error.what());
  }
}

StreamId Engine::first_writer(UnitIndex unit, StreamId copy_stream) const {
  return packed_ == nullptr ? copy_stream : packed_->first_writer(unit, copy_stream);
}

std::vector<StreamId> Engine::own_streams() const {
  return packed_ == nullptr ? std::vector<StreamId>{} : packed_->own_streams();
}

std::vector<std::size_t> Engine::transport_bytes() const {
  const Plan& plan = pipeline().plan();
  std::vector<std::size_t> sizes;
  sizes.reserve(units_.size());
  for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
    switch (plan.transport(unit)) {
      case Transport::kRaw:
        sizes.push_back(plan.units[unit].size_bytes);
        break;
      case Transport::kPacked:
        sizes.push_back(is_packed(unit) ? packed_->source(unit).packed_bytes
                                        : plan.units[unit].size_bytes);
        break;
      case Transport::kPackedResident:
        sizes.push_back(0);
        break;
    }
  }
  return sizes;
}

}  // namespace torch_offload
