#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/device.h"
#include "core/device_memory.h"
#include "core/loader.h"
#include "core/plan.h"
#include "core/stepped_device.h"

namespace torch_offload {

/// A packed unit: in page-locked memory, or where it stays on the device.
struct PackedSource {
  const std::byte* bytes = nullptr;
  std::size_t packed_bytes = 0;
  std::size_t place_bytes = 0;
  std::uint32_t num_tiles = 0;
};

/// What a packed unit gets room for, where it is kept: weights pack a little worse after an edit.
/// Merges and other scales change their size by a 400th at the most, and small ones by some bytes.
constexpr std::size_t packed_room_bytes(std::size_t packed_bytes) {
  return aligned_size(packed_bytes + packed_bytes / 256 + 1024);
}

/// Streams that decoders run on, and the events between them and the copies; made when they are
/// first needed. They live as long as the device, so a loader goes on with those of an earlier one.
struct PackedStreams {
  StreamId copied = kNoStream;            ///< Behind copies.
  StreamId resident = kNoStream;          ///< Of units that stay packed.
  std::vector<EventId> slot_events = {};  ///< Staged and decoded of one slot after the other.
};

#ifdef TORCH_OFFLOAD_MUTANTS
inline namespace mutants {  // see steps.h
#endif

/// Brings packed units into their places, in one of two ways. Either by a copy into a slot of a
/// staging ring and a decoder from there; or, where the packed unit stays on the device, by a
/// decoder alone, straight from where it stays.
///
/// Ordering:  the decoder is what writes into the place (`first_writer`): the pipeline holds its
///            stream back until the place is free. It waits for its copy, which waits for nothing
///            but the decoder that read the same slot last, and so runs ahead of the places. Units
///            that stay have a decode stream of their own, which neither waits for copies nor
///            holds them up. Behind its decoder a unit is whole. Each copied unit has one slot for
///            good, and each that stays one range, so addresses never change.
/// Blocking:  `load` never blocks the host; the constructor waits for the current stream, and
///            `upload` for its copy.
/// Lifetime:  device and sources must outlive it, and nothing may be in flight at its end: the
///            pipeline drains `own_streams` with its own.
class PackedLoader : public Loader {
 public:
  struct Options {
    std::size_t slot_bytes = 0;  ///< The largest unit that is copied packed fits in; 0: none is.
    std::size_t num_slots = kStagingSlots;
    /// What each unit that stays packed may take on the device, in one allocation; 0: it does not
    /// stay. Empty: none does.
    std::vector<std::size_t> resident_bytes = {};
    /// Without, the decoder follows the copy on the copy stream: for the mode that knows one.
    bool has_decode_stream = true;
    /// Of an earlier loader on this device, which is no more, to go on with.
    PackedStreams streams = {};
  };

  /// Throws: MemoryError if ring and units that stay do not fit.
  PackedLoader(Device& device, std::size_t num_units, const Options& options);

  /// What is copied for this unit from now on. No load of it may be in flight.
  /// Throws: ValueError if it does not fit into a slot.
  void set_source(UnitIndex unit, const PackedSource& source);
  /// Copies `source` to where the unit stays: what is decoded from now on.
  ///
  /// Ordering:  on the stream of its decoders, behind all of them.
  /// Blocking:  until it is there.
  /// Throws:    ValueError if it does not fit there. After any failure the unit has no source.
  void upload(UnitIndex unit, const PackedSource& source);
  /// The unit is loaded in some other way from now on.
  void drop_source(UnitIndex unit);
  /// Whether there is room for the unit to stay packed on the device.
  bool has_room(UnitIndex unit) const { return room_bytes(unit) != 0; }
  std::size_t room_bytes(UnitIndex unit) const { return units_.at(unit).room_bytes; }
  bool has_source(UnitIndex unit) const { return units_.at(unit).source.bytes != nullptr; }
  const PackedSource& source(UnitIndex unit) const { return units_.at(unit).source; }

  StreamId load(UnitIndex unit, std::byte* place, StreamId copy_stream,
                std::uint64_t generation) override;
  StreamId first_writer(UnitIndex unit, StreamId copy_stream) const override;
  std::vector<StreamId> own_streams() const override;

  std::size_t slot_bytes() const { return slot_bytes_; }
  std::size_t ring_bytes() const { return ring_.size_bytes(); }
  std::size_t resident_bytes() const { return resident_.size_bytes(); }
  const PackedStreams& streams() const { return streams_; }
  /// Leaves its memory to the device for good, since a decoder may still read it.
  void leak();

 private:
  static constexpr std::size_t kNoSlot = SIZE_MAX;

  struct Slot {
    std::byte* memory = nullptr;
    EventId staged = kNoEvent;   // recorded behind each copy into it
    EventId decoded = kNoEvent;  // recorded behind each decoder that reads it
    bool is_read = false;        // a decoder may still read it: `decoded` tells
  };
  struct PackedUnit {
    PackedSource source;         // what is copied, or what stays
    std::size_t slot = kNoSlot;  // of one that is copied
    std::byte* room = nullptr;   // of one that stays: a range of resident_
    std::size_t room_bytes = 0;
  };

  void submit(const PackedUnit& unit, Slot& slot, const Decode& decode, StreamId copy_stream);
  void check_fits(const PackedSource& source, std::size_t room_bytes, const char* where) const;

  Device& device_;
  SteppedDevice steps_;  // the same one, for all that keeps order
  std::size_t slot_bytes_;
  DeviceMemory ring_;
  DeviceMemory resident_;  // packed units that stay, one after the other
  std::vector<Slot> slots_;
  std::vector<PackedUnit> units_;  // by UnitIndex
  std::size_t num_assigned_ = 0;   // units that have a slot
  PackedStreams streams_;
};

#ifdef TORCH_OFFLOAD_MUTANTS
}  // namespace mutants
#endif

}  // namespace torch_offload
