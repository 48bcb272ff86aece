// Units that travel or stay packed: when they are packed, and what an edit of their weights means.
//
// Note [Packed units and edits]
// A raw unit is read from its master at every copy. A packed one is what the master was when it was
// packed, so it is compared with that, version and samples, in every pass, and packed anew on the
// spot when it differs: the call that notices blocks for as long as that takes. One that stays
// packed on the device is packed into page-locked memory that all of them share, and brought there
// from it. A unit for which there is no room any more is raw from then on, and the plan says so.
// Where masters are packed, Note [Packed masters] says what takes the place of all this.

#include <c10/util/ScopeExit.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <optional>
#include <utility>

#include "codec/parallel.h"
#include "core/error.h"
#include "params/engine.h"
#include "params/exponent_counts.h"
#include "params/python_errors.h"

namespace py = pybind11;

namespace torch_offload {

/// What packs the unit, or copies its offered blob. `unpacked` must live as long.
UnitPacker Engine::packer_of(UnitIndex unit, std::vector<at::Tensor>& unpacked) const {
  EncodeOptions options;
  options.num_threads = default_num_threads();
  return {sources_of(units_[unit], unpacked), pipeline_->plan().units[unit].size_bytes, options,
          offered_blob(unit)};
}

void Engine::pack(const std::vector<std::size_t>& most_bytes, std::vector<at::Tensor> counts) {
  const Rest rest(*this, "pack()");
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
  const bool is_first = most_packed_bytes_.empty();
  most_packed_bytes_ = most_bytes;
  counts_ = std::move(counts);
  // They are of the weights as they are now.
  const auto forget_counts = c10::make_scope_exit([this] { counts_.clear(); });
  if (packs_masters()) {
    // At first they are made of what the parameters are: copies, as plain masters are.
    pack_masters(/*keeps_shared=*/!is_first);
  } else {
    pack_beside_masters();
  }
}

/// None where the parameter is to be counted.
const ExponentCounts* Engine::counts_of(std::size_t parameter) const {
  if (parameter >= counts_.size() || !counts_[parameter].defined()) {
    return nullptr;
  }
  return counts_in(counts_[parameter], parameters_[parameter].size_bytes());
}

void Engine::pack_beside_masters() {
  try {
    const py::gil_scoped_release no_gil;
    std::vector<std::optional<UnitPacker>> packers = packers_within_limits();
    std::vector<std::size_t> rooms;
    rooms.reserve(packers.size());
    for (const std::optional<UnitPacker>& packer : packers) {
      rooms.push_back(packer ? packed_room_bytes(packer->blob_bytes()) : 0);
    }
    make_room_for(rooms);
    for (UnitIndex unit = 0; unit < packers.size(); ++unit) {
      if (std::optional<UnitPacker>& packer = packers[unit]) {
        write_packed(unit, *packer);
        packer.reset();
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
std::vector<std::optional<UnitPacker>> Engine::packers_within_limits() {
  std::vector<at::Tensor> unpacked;  // none: masters are plain here
  std::vector<std::optional<UnitPacker>> packers(units_.size());
  for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
    if (pipeline_->plan().transport(unit) == Transport::kRaw) {
      continue;
    }
    UnitPacker packer = packer_of(unit, unpacked);
    if (packed_room_bytes(packer.blob_bytes()) <= most_packed_bytes_[unit]) {
      packers[unit].emplace(std::move(packer));
    } else {
      pipeline_->set_transport(unit, Transport::kRaw);
    }
  }
  return packers;
}

/// For packed units of at most so many bytes, 0 for those that are raw: on the device for the ring
/// and for all that stay there; on the host, unless the masters are what is packed, for each that
/// is copied and for one of those that stay. None of it where nothing is packed.
void Engine::make_room_for(const std::vector<std::size_t>& rooms) {
  if (std::all_of(rooms.begin(), rooms.end(), [](std::size_t room) { return room == 0; })) {
    return;
  }
  PackedLoader::Options options;
  options.has_decode_stream = policy_of(pipeline_->options().mode).has_copy_stream;
  options.num_slots = pipeline_->plan().staging_slots;
  options.streams = packed_streams_;
  options.resident_bytes.assign(units_.size(), 0);
  std::vector<std::size_t> pieces(units_.size() + 1, 0);
  for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
    if (pipeline_->plan().stays_packed(unit)) {
      options.resident_bytes[unit] = rooms[unit];
      pieces.back() = std::max(pieces.back(), rooms[unit]);
    } else {
      pieces[unit] = rooms[unit];
      options.slot_bytes = std::max(options.slot_bytes, rooms[unit]);
    }
  }
  if (!packs_masters()) {
    blobs_ = std::make_shared<PinnedArena>(device_, pieces);
  }
  packed_ = std::make_unique<PackedLoader>(*device_, units_.size(), options);
  packed_streams_ = packed_->streams();
  for (PieceIndex piece = 0; blobs_ != nullptr && piece < pieces.size(); ++piece) {
    if (pieces[piece] != 0) {
      blobs_->prepare(piece);
    }
    blobs_->seal_up_to(piece);
  }
}

/// Leaves the unit raw where its blob needs more room than there is.
void Engine::write_packed(UnitIndex unit, UnitPacker& packer) {
  const bool stays = packed_->has_room(unit);
  std::byte* const memory = blobs_->piece_memory(stays ? units_.size() : unit);
  const std::size_t room_bytes = stays ? packed_->room_bytes(unit) : blobs_->piece_bytes(unit);
  device_->host_write(memory, room_bytes, unit);
  if (!packer.write(memory, room_bytes)) {
    pipeline_->set_transport(unit, Transport::kRaw);
    return;
  }
  if (packer.took_kept()) {
    blobs_taken_.push_back(unit);
  }
  set_packed_source(unit, {memory, packer.blob_bytes(), pipeline_->plan().units[unit].size_bytes,
                           packer.num_tiles()});
}

/// From now on this is what is copied for the unit, or what stays of it on the device.
/// Blocking: where it stays, until it is there.
void Engine::set_packed_source(UnitIndex unit, const PackedSource& source) {
  if (packed_->has_room(unit)) {
    packed_->upload(unit, source);
    pipeline_->set_transport(unit, Transport::kPackedResident);
  } else {
    packed_->set_source(unit, source);
    pipeline_->set_transport(unit, Transport::kPacked);
  }
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
    std::vector<at::Tensor> unpacked;  // none: masters are plain here
    UnitPacker packer = packer_of(unit, unpacked);
    write_packed(unit, packer);
    drop_blobs_if_unused();
  }
  note_content(units_[unit]);
}

/// Once all units have come to be raw, nothing is packed before there is another plan.
void Engine::drop_blobs_if_unused() {
  for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
    if (is_packed(unit)) {
      return;
    }
  }
  blobs_.reset();
}

/// All units are raw from now on. Nothing may be in flight.
void Engine::drop_packed() {
  packed_.reset();
  blobs_.reset();
  are_masters_ready_ = false;
  if (pipeline_ == nullptr) {
    return;
  }
  for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
    if (pipeline_->plan().transport(unit) != Transport::kRaw) {
      pipeline_->set_transport(unit, Transport::kRaw);
    }
  }
}

/// After a plan that could not be had. Without room for it plain masters are copied raw, and packed
/// ones are packed by the next forward.
void Engine::pack_as_before(const std::vector<Transport>& transports) noexcept {
  try {
    for (UnitIndex unit = 0; unit < transports.size(); ++unit) {
      pipeline_->set_transport(unit, transports[unit]);
    }
    pack(std::vector<std::size_t>(most_packed_bytes_));
  } catch (std::exception& error) {
    std::fprintf(stderr, "torch_offload: %s, they could not be packed again: %s\n",
                 packs_masters() ? "the next forward packs the units" : "units travel raw",
                 words_of(error).c_str());
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
