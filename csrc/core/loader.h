#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/op_log.h"
#include "core/unit.h"

namespace torch_offload {

/// How a unit's bytes reach its place. The pipeline does not know which way: a raw copy, a copy
/// and a decoder, a neighbour's link, a disk.
class Loader {
 public:
  Loader() = default;
  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;
  virtual ~Loader() = default;

  /// Submits everything that fills `place` with the unit's master, as it is now.
  ///
  /// Ordering:  the first write into `place` comes after all that was submitted to
  ///            `first_writer(unit, copy_stream)`. Returns the stream behind which the unit is
  ///            whole: the pipeline records the unit's ready event there.
  /// Blocking:  never blocks the host.
  /// Lifetime:  the master must stay alive until the work is done.
  /// Throws:    with nothing left under way but on copy stream and first writer, which the pipeline
  ///            then waits for.
  virtual StreamId load(UnitIndex unit, std::byte* place, StreamId copy_stream,
                        std::uint64_t generation) = 0;

  /// The stream to be held back while somebody may still use the unit's place: `copy_stream`, or,
  /// for a unit that no copy brings into its place, one of `own_streams`.
  virtual StreamId first_writer(UnitIndex /*unit*/, StreamId copy_stream) const {
    return copy_stream;
  }
  /// How many bytes of units it wants to be told of before they are loaded; none if it has no use
  /// for that.
  virtual std::size_t announced_bytes() const { return 0; }
  /// The unit is expected to be loaded soon, behind those that were announced before. Units are
  /// announced again and again, and in vain where the order was guessed wrong.
  /// Blocking: never blocks the host.
  virtual void announce(UnitIndex /*unit*/) {}

  /// Streams of the loader's own, which are drained with those of the pipeline.
  virtual std::vector<StreamId> own_streams() const { return {}; }
};

}  // namespace torch_offload
