#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/device.h"
#include "core/device_memory.h"
#include "core/loader.h"
#include "core/steps.h"

namespace torch_offload {

/// A unit as it is copied: packed, in page-locked memory.
struct PackedSource {
  const std::byte* bytes = nullptr;
  std::size_t packed_bytes = 0;
  std::size_t place_bytes = 0;
  std::uint32_t num_tiles = 0;
};

#ifdef TORCH_OFFLOAD_MUTANTS
inline namespace mutants {  // see steps.h
#endif

/// Brings packed units into their places: one copy into a slot of a staging ring, then a decoder
/// from there, on a stream of its own.
///
/// Ordering:  the decoder waits for the copy, and so for all that the copy stream waited for: who
///            used the place before has ended. A copy into a slot waits for the decoder that read
///            it last. Behind the decode stream the unit is whole. Each unit has one slot for good,
///            so addresses never change.
/// Blocking:  `load` never blocks the host; the constructor waits for the current stream.
/// Lifetime:  device and sources must outlive it, and nothing may be in flight at its end: the
///            pipeline drains `own_streams` with its own.
class PackedLoader : public Loader {
 public:
  struct Options {
    std::size_t slot_bytes = 0;  ///< The largest packed unit fits in.
    std::size_t num_slots = 2;   ///< One is filled while another is decoded.
    /// Without, the decoder follows the copy on the copy stream: for the mode that knows one.
    bool has_decode_stream = true;
  };

  /// Throws: MemoryError if the ring does not fit.
  PackedLoader(Device& device, std::size_t num_units, const Options& options);

  /// What is loaded for this unit from now on. No load of it may be in flight.
  /// Throws: ValueError if it does not fit into a slot.
  void set_source(UnitIndex unit, const PackedSource& source);
  /// The unit is loaded in some other way from now on.
  void drop_source(UnitIndex unit);
  bool has_source(UnitIndex unit) const { return units_.at(unit).source.bytes != nullptr; }
  const PackedSource& source(UnitIndex unit) const { return units_.at(unit).source; }

  StreamId load(UnitIndex unit, std::byte* place, StreamId copy_stream,
                std::uint64_t generation) override;
  std::vector<StreamId> own_streams() const override;

  std::size_t slot_bytes() const { return slot_bytes_; }
  std::size_t ring_bytes() const { return ring_.size_bytes(); }

 private:
  static constexpr std::size_t kNoSlot = SIZE_MAX;

  struct Slot {
    std::byte* memory = nullptr;
    EventId staged = kNoEvent;   // recorded behind each copy into it
    EventId decoded = kNoEvent;  // recorded behind each decoder that reads it
    bool is_read = false;        // a decoder may still read it: `decoded` tells
  };
  struct PackedUnit {
    PackedSource source;
    std::size_t slot = kNoSlot;
  };

  void submit(const PackedUnit& unit, Slot& slot, const Decode& decode, StreamId copy_stream);
  void record(EventId event, StreamId stream, Step step);
  void wait(StreamId stream, EventId event, Step step);

  Device& device_;
  std::size_t slot_bytes_;
  DeviceMemory ring_;
  std::vector<Slot> slots_;
  std::vector<PackedUnit> units_;  // by UnitIndex
  std::size_t num_assigned_ = 0;   // units that have a slot
  StreamId decode_stream_ = kNoStream;
};

#ifdef TORCH_OFFLOAD_MUTANTS
}  // namespace mutants
#endif

}  // namespace torch_offload
