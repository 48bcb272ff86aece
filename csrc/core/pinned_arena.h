#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "core/device.h"
#include "core/host_mapping.h"
#include "core/unit.h"

namespace torch_offload {

/// A piece of a unit's master that one copy can carry.
struct CopySegment {
  const std::byte* source = nullptr;
  std::size_t offset = 0;  ///< From the begin of the unit, in the master and in its place.
  std::size_t size_bytes = 0;
};

/// The masters of all streamed units: host memory of exact size, page-locked piece by piece.
///
/// Units lie one behind the other. A *chunk* is a run of whole units of at most `max_chunk_bytes`,
/// begins on a page, and is registered with the device on its own (one registration of many GiB is
/// refused by some drivers), so at most one page per chunk is lost. A larger unit spans chunks of
/// its own; its bytes are contiguous in memory all the same.
///
/// Use: `fill` the units in their order, call `seal_up_to` behind each, and free the originals as
/// you go: pages are taken as they are filled, so the peak is the model plus one unit.
///
/// Lifetime:  keeps the device alive. Nothing may be in flight from the arena when it is
///            destroyed. If the device then refuses to unregister a chunk, the memory stays mapped
///            for good, on purpose: the device may still read it, and whoever got the same pages
///            next would be read in its place.
/// Threads:   one caller at a time. Readers of sealed memory need no lock.
/// Forks:     a child reads the masters, writes to copies of its own (see Note [Page-locked memory
///            and fork]) and never calls the device, neither to seal nor in the destructor.
class PinnedArena {
 public:
  static constexpr std::size_t kMaxChunkBytes = std::size_t{1} << 30;

  /// Reserves addresses for units of these sizes; takes no memory yet, registers nothing.
  ///
  /// Throws: ValueError if a size is no multiple of kAlignmentBytes (zero is one), MemoryError if
  ///         the addresses cannot be had.
  PinnedArena(std::shared_ptr<Device> device, const std::vector<std::size_t>& unit_sizes,
              std::size_t max_chunk_bytes = kMaxChunkBytes);
  PinnedArena(const PinnedArena&) = delete;
  PinnedArena& operator=(const PinnedArena&) = delete;
  /// Never throws: what fails is told on stderr.
  ~PinnedArena();

  /// The unit's master, aligned to kAlignmentBytes. Throws: IndexError.
  std::byte* unit_memory(UnitIndex unit) const;
  /// Throws: IndexError.
  std::size_t unit_bytes(UnitIndex unit) const;
  /// The master in pieces, none of which crosses from one registration into the next: together
  /// they are the unit, in order. Throws: IndexError.
  const std::vector<CopySegment>& segments(UnitIndex unit) const;

  /// Copies `size_bytes` to `offset` in the unit's master, by several threads where that pays.
  ///
  /// Blocking:  until the bytes are there; no thread outlives the call.
  /// Lifetime:  once the unit is sealed, no copy from it may be in flight.
  /// Throws:    IndexError; InternalError if the unit is smaller; MemoryError if the system has no
  ///            page left (part of the bytes are then written).
  void fill(UnitIndex unit, std::size_t offset, const void* source, std::size_t size_bytes);

  /// Declares `unit` and all before it filled, and registers every chunk that is thereby whole.
  /// The last chunk is whole with the last unit.
  ///
  /// Blocking:  while the pages are locked, about 0.1 s for each GiB.
  /// Throws:    IndexError; StateError in a forked child; MemoryError with asked, got and limits.
  ///            The arena then stays usable as ordinary memory, earlier chunks stay registered
  ///            until it is destroyed, and the call may be tried again.
  void seal_up_to(UnitIndex unit);

  /// Whether all of the unit is page-locked, so that copies may start. Throws: IndexError.
  bool is_sealed(UnitIndex unit) const;

  std::size_t num_units() const { return units_.size(); }
  std::size_t num_chunks() const { return chunks_.size(); }
  /// What the arena takes when all is filled: the units, and less than a page per chunk.
  std::size_t size_bytes() const { return memory_.size_bytes(); }
  std::size_t registered_bytes() const;

 private:
  struct UnitRecord {
    std::size_t begin = 0;  // in the arena
    std::size_t size_bytes = 0;
    std::size_t first_chunk = 0;
    std::size_t end_chunk = 0;
    std::vector<CopySegment> segments;
  };
  struct Chunk {
    std::size_t begin = 0;  // in the arena; both are multiples of the page size
    std::size_t size_bytes = 0;
    UnitIndex last_unit = kNoUnit;
  };
  struct Layout {
    std::vector<UnitRecord> units;
    std::vector<Chunk> chunks;
    std::size_t size_bytes = 0;
  };

  static Layout lay_out(const std::vector<std::size_t>& unit_sizes, std::size_t max_chunk_bytes);
  PinnedArena(Layout layout, std::shared_ptr<Device> device);

  const UnitRecord& at(UnitIndex unit) const;

  // The device is declared first: it must outlive the registrations.
  std::shared_ptr<Device> device_;
  std::vector<UnitRecord> units_;
  std::vector<Chunk> chunks_;
  HostMapping memory_;
  std::size_t num_sealed_ = 0;  // chunks [0, num_sealed_) are registered
};

}  // namespace torch_offload
