#include "core/packed_loader.h"

#include <cstdio>
#include <string>

#include "core/error.h"

namespace torch_offload {

PackedLoader::PackedLoader(Device& device, std::size_t num_units, const Options& options)
    : device_(device),
      slot_bytes_(aligned_size(options.slot_bytes)),
      ring_(device, slot_bytes_ * options.num_slots),
      slots_(options.num_slots),
      units_(num_units) {
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    slots_[i].memory = ring_.memory() + i * slot_bytes_;
    slots_[i].staged = device_.create_event();
    slots_[i].decoded = device_.create_event();
  }
  if (options.has_decode_stream) {
    // Like the copies before the kernels, which wait for it.
    decode_stream_ = device_.create_stream({"weight_decode", StreamRole::kCopy, -1});
  }
  // The allocator may have handed out memory that kernels of the current stream still use.
  if (!is_left_out(Step::kNewStagingDrain)) {
    device_.synchronize(device_.current_stream());
  }
}

void PackedLoader::set_source(UnitIndex unit, const PackedSource& source) {
  if (source.packed_bytes > slot_bytes_) {
    throw ValueError("expected a packed unit of at most " + std::to_string(slot_bytes_) +
                     " bytes, which a slot of the staging ring has, got " +
                     std::to_string(source.packed_bytes));
  }
  PackedUnit& entry = units_.at(unit);
  if (entry.slot == kNoSlot) {
    entry.slot = num_assigned_++ % slots_.size();  // neighbours in the order take turns
  }
  entry.source = source;
}

void PackedLoader::drop_source(UnitIndex unit) { units_.at(unit).source = {}; }

StreamId PackedLoader::load(UnitIndex unit, std::byte* place, StreamId copy_stream,
                            std::uint64_t generation) {
  check_internal(has_source(unit), "a unit to decode that was not packed");
  const PackedUnit& entry = units_[unit];
  Slot& slot = slots_[entry.slot];
  Decode decode;
  decode.destination = place;
  decode.size_bytes = entry.source.place_bytes;
  decode.source = slot.memory;
  decode.packed_bytes = entry.source.packed_bytes;
  decode.num_tiles = entry.source.num_tiles;
  decode.unit = unit;
  decode.generation = generation;
  if (decode_stream_ == kNoStream) {
    submit(entry, slot, decode, copy_stream);
    return copy_stream;
  }
  try {
    submit(entry, slot, decode, copy_stream);
  } catch (...) {
    // The decoder may be under way, and no event tells when it ends. The copy stream is waited for
    // by the pipeline.
    if (!is_left_out(Step::kFailedDecodeDrain)) {
      try {
        device_.synchronize(decode_stream_);
      } catch (...) {
        std::fprintf(stderr, "torch_offload: a stream could not be synchronized after a failure\n");
      }
    }
    slot.is_read = false;
    throw;
  }
  return decode_stream_;
}

void PackedLoader::submit(const PackedUnit& unit, Slot& slot, const Decode& decode,
                          StreamId copy_stream) {
  if (slot.is_read) {
    wait(copy_stream, slot.decoded, Step::kDecodedWait);
  }
  device_.copy(copy_stream, {slot.memory, unit.source.bytes, unit.source.packed_bytes, decode.unit,
                             decode.generation});
  if (decode_stream_ == kNoStream) {
    device_.decode(copy_stream, decode);
    return;
  }
  record(slot.staged, copy_stream, Step::kStagedRecord);
  wait(decode_stream_, slot.staged, Step::kStagedWait);
  device_.decode(decode_stream_, decode);
  slot.is_read = true;
  record(slot.decoded, decode_stream_, Step::kDecodedRecord);
}

std::vector<StreamId> PackedLoader::own_streams() const {
  return decode_stream_ == kNoStream ? std::vector<StreamId>{} : std::vector{decode_stream_};
}

void PackedLoader::record(EventId event, StreamId stream, Step step) {
  if (!is_left_out(step)) {
    device_.record(event, stream);
  }
}

void PackedLoader::wait(StreamId stream, EventId event, Step step) {
  if (!is_left_out(step)) {
    device_.wait(stream, event);
  }
}

}  // namespace torch_offload
