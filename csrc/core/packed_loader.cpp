#include "core/packed_loader.h"

#include <numeric>
#include <string>

#include "core/error.h"

namespace torch_offload {

namespace {

std::size_t sum_of(const std::vector<std::size_t>& sizes) {
  return std::accumulate(
      sizes.begin(), sizes.end(), std::size_t{0},
      [](std::size_t sum, std::size_t size_bytes) { return sum + aligned_size(size_bytes); });
}

}  // namespace

PackedLoader::PackedLoader(Device& device, std::size_t num_units, const Options& options)
    : device_(device),
      steps_(device),
      slot_bytes_(aligned_size(options.slot_bytes)),
      ring_(device, slot_bytes_ * options.num_slots),
      resident_(device, sum_of(options.resident_bytes)),
      slots_(slot_bytes_ == 0 ? 0 : options.num_slots),
      units_(num_units),
      streams_(options.streams) {
  // They may have been recorded for an earlier loader; nobody waits for that: `staged` is recorded
  // anew before each wait, and `decoded` is waited for once it has been.
  std::vector<EventId>& events = streams_.slot_events;
  while (events.size() < 2 * slots_.size()) {
    events.push_back(device_.create_event());
  }
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    slots_[i].memory = ring_.memory() + i * slot_bytes_;
    slots_[i].staged = events[2 * i];
    slots_[i].decoded = events[2 * i + 1];
  }
  std::byte* room = resident_.memory();
  for (std::size_t unit = 0; unit < options.resident_bytes.size(); ++unit) {
    const std::size_t room_bytes = aligned_size(options.resident_bytes[unit]);
    units_.at(unit).room = room;
    units_[unit].room_bytes = room_bytes;
    room += room_bytes;
  }
  const auto make_stream = [&](StreamId& stream, const char* name) {
    if (stream == kNoStream) {
      // Like the copies before the kernels, which wait for them.
      stream = device_.create_stream({name, StreamRole::kCopy, -1});
    }
  };
  if (options.has_decode_stream && !slots_.empty()) {
    make_stream(streams_.copied, "weight_decode");
  }
  if (options.has_decode_stream && resident_.size_bytes() != 0) {
    make_stream(streams_.resident, "weight_decode_resident");
  }
  // The allocator may have handed out memory that kernels of the current stream still use.
  steps_.synchronize(device_.current_stream(), Step::kNewStagingDrain);
}

void PackedLoader::check_fits(const PackedSource& source, std::size_t room_bytes,
                              const char* where) const {
  if (source.packed_bytes > room_bytes) {
    throw ValueError("expected a packed unit of at most " + std::to_string(room_bytes) +
                     " bytes, which " + where + " has, got " + std::to_string(source.packed_bytes));
  }
}

void PackedLoader::set_source(UnitIndex unit, const PackedSource& source) {
  check_fits(source, slot_bytes_, "a slot of the staging ring");
  PackedUnit& entry = units_.at(unit);
  check_internal(entry.room_bytes == 0, "a unit that stays packed needs no copies");
  if (entry.slot == kNoSlot) {
    entry.slot = num_assigned_++ % slots_.size();  // neighbours in the order take turns
  }
  entry.source = source;
}

void PackedLoader::upload(UnitIndex unit, const PackedSource& source) {
  PackedUnit& entry = units_.at(unit);
  entry.source = {};
  check_fits(source, entry.room_bytes, "the unit's room on the device");
  const StreamId stream =
      streams_.resident == kNoStream ? device_.current_stream() : streams_.resident;
  try {
    // No generation: it is good for every load to come.
    device_.copy(stream, {entry.room, source.bytes, source.packed_bytes, unit, 0});
    steps_.synchronize(stream, Step::kUploadDrain);  // its owner may write to the source again
  } catch (...) {
    steps_.quiesce(stream, Step::kFailedUploadDrain);  // who frees this memory does not ask
    throw;
  }
  entry.source = source;
  entry.source.bytes = entry.room;
}

void PackedLoader::leak() {
  ring_.leak();
  resident_.leak();
}

void PackedLoader::drop_source(UnitIndex unit) { units_.at(unit).source = {}; }

StreamId PackedLoader::load(UnitIndex unit, std::byte* place, StreamId copy_stream,
                            std::uint64_t generation) {
  check_internal(has_source(unit), "a unit to decode that was not packed");
  const PackedUnit& entry = units_[unit];
  Decode decode;
  decode.destination = place;
  decode.size_bytes = entry.source.place_bytes;
  decode.source = entry.source.bytes;
  decode.packed_bytes = entry.source.packed_bytes;
  decode.num_tiles = entry.source.num_tiles;
  decode.unit = unit;
  decode.generation = generation;
  if (has_room(unit)) {
    const StreamId stream = first_writer(unit, copy_stream);
    device_.decode(stream, decode);
    return stream;
  }
  Slot& slot = slots_[entry.slot];
  decode.source = slot.memory;
  try {
    submit(entry, slot, decode, copy_stream);
  } catch (...) {
    slot.is_read = false;  // the decoder may be under way, but the pipeline waits for its stream
    throw;
  }
  return first_writer(unit, copy_stream);
}

void PackedLoader::submit(const PackedUnit& unit, Slot& slot, const Decode& decode,
                          StreamId copy_stream) {
  if (slot.is_read) {
    steps_.wait(copy_stream, slot.decoded, Step::kDecodedWait);
  }
  device_.copy(copy_stream, {slot.memory, unit.source.bytes, unit.source.packed_bytes, decode.unit,
                             decode.generation});
  if (streams_.copied == kNoStream) {
    device_.decode(copy_stream, decode);
    return;
  }
  steps_.record(slot.staged, copy_stream, Step::kStagedRecord);
  steps_.wait(streams_.copied, slot.staged, Step::kStagedWait);
  device_.decode(streams_.copied, decode);
  slot.is_read = true;
  steps_.record(slot.decoded, streams_.copied, Step::kDecodedRecord);
}

StreamId PackedLoader::first_writer(UnitIndex unit, StreamId copy_stream) const {
  if (!has_source(unit)) {
    return copy_stream;
  }
  const StreamId stream = has_room(unit) ? streams_.resident : streams_.copied;
  return stream == kNoStream ? copy_stream : stream;
}

std::vector<StreamId> PackedLoader::own_streams() const {
  std::vector<StreamId> streams;
  for (const StreamId stream : {streams_.copied, streams_.resident}) {
    if (stream != kNoStream) {
      streams.push_back(stream);
    }
  }
  return streams;
}

}  // namespace torch_offload
