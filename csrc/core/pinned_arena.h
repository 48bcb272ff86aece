#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "core/copy_segment.h"
#include "core/device.h"
#include "core/host_mapping.h"

namespace torch_offload {

/// Position of a piece in the list that the arena was made from.
using PieceIndex = std::size_t;

/// The masters of all streamed parameters: host memory of exact size, page-locked chunk by chunk.
///
/// Each parameter is a *piece*. A *chunk* is some whole pieces of at most `max_chunk_bytes`, begins
/// on a page, and is registered with the device on its own, so less than a page per chunk is lost.
/// A larger piece is a chunk by itself, registered in one call: the device refuses a copy that
/// crosses from one registration into another, and the user's own copies of a weight at rest
/// (`weight.to("cuda")`) are such copies.
///
/// Use: `fill` the pieces in their order, call `seal_up_to` behind each, and free the originals as
/// you go: pages are taken as they are filled, so the peak is the model plus one piece. Call
/// `prepare` before a piece that a copy by the device fills.
///
/// Where the machine has several nodes, pages come from the one that the device's link ends at.
///
/// Lifetime:  keeps the device alive. Nothing may be in flight from the arena when it is
///            destroyed. If the device then refuses to unregister a chunk, the memory stays mapped
///            for good, on purpose: the device may still read it, and whoever got the same pages
///            next would be read in its place.
/// Threads:   one caller at a time. Readers of sealed memory need no lock.
/// Forks:     a child has no masters (see Note [Page-locked memory and fork]) and never calls the
///            device; its destructor only unmaps.
class PinnedArena {
 public:
  static constexpr std::size_t kMaxChunkBytes = std::size_t{1} << 30;
  /// So many times the limit may a run take and still lie in one chunk.
  static constexpr std::size_t kMaxRunChunks = 2;

  /// Reserves addresses for pieces of these sizes; takes no memory yet, registers nothing.
  ///
  /// `run_begins` names the first pieces of *runs*, which are copied together: each up to the next,
  /// the last to the end. One copy carries a run, unless it takes more than kMaxRunChunks times
  /// `max_chunk_bytes`.
  ///
  /// Throws: ValueError if a size is no multiple of kAlignmentBytes (zero is one), IndexError if
  ///         the runs are not in order, MemoryError if the addresses cannot be had.
  PinnedArena(std::shared_ptr<Device> device, const std::vector<std::size_t>& piece_sizes,
              std::size_t max_chunk_bytes = kMaxChunkBytes,
              const std::vector<PieceIndex>& run_begins = {});
  PinnedArena(const PinnedArena&) = delete;
  PinnedArena& operator=(const PinnedArena&) = delete;
  /// Never throws: what fails is told on stderr.
  ~PinnedArena();

  /// Where the piece lies, aligned to kAlignmentBytes. Throws: IndexError.
  std::byte* piece_memory(PieceIndex piece) const;
  /// Throws: IndexError.
  std::size_t piece_bytes(PieceIndex piece) const;

  /// The fewest copies that carry the pieces [begin, end), in order. Allocates its answer: a caller
  /// that needs it often keeps it, as it never changes. Throws: IndexError.
  std::vector<CopySegment> segments(PieceIndex begin, PieceIndex end) const;

  /// Takes the memory of the piece's chunk and page-locks it at once, for pieces that a copy by the
  /// device will fill. `fill` and `seal_up_to` may follow as for any other piece.
  ///
  /// Blocking:  while pages are taken, by several threads, and locked.
  /// Throws:    as seal_up_to.
  void prepare(PieceIndex piece);

  /// Copies `size_bytes` to the begin of the piece, by several threads where that pays.
  ///
  /// Blocking:  until the bytes are there; no thread outlives the call.
  /// Lifetime:  once the piece is sealed, no copy from it may be in flight.
  /// Throws:    IndexError; InternalError if the piece is smaller; StateError in a forked child;
  ///            MemoryError if the system has no page left (part of the bytes are then written).
  void fill(PieceIndex piece, const void* source, std::size_t size_bytes);

  /// Declares `piece` and all before it filled, and registers every chunk that is thereby whole.
  /// The last chunk is whole with the last piece.
  ///
  /// Blocking:  while the pages are locked, about 20 ms for each GiB.
  /// Throws:    IndexError; StateError in a forked child; MemoryError with asked, got and limits.
  ///            The arena then stays usable as ordinary memory, earlier chunks stay registered
  ///            until it is destroyed, and the call may be tried again.
  void seal_up_to(PieceIndex piece);

  /// Whether all of the piece is page-locked, so that copies may start. Throws: IndexError.
  bool is_sealed(PieceIndex piece) const;

  /// Keeps memory and registrations for good, since a copy may still read them.
  void leak();

  std::size_t num_pieces() const { return pieces_.size(); }
  std::size_t num_chunks() const { return chunks_.size(); }
  /// What the arena takes when all is filled: the pieces, and less than a page per chunk.
  std::size_t size_bytes() const { return memory_.size_bytes(); }
  std::size_t registered_bytes() const;
  /// Whether its memory is another process's: see Note [Page-locked memory and fork].
  bool in_forked_child() const { return device_->in_forked_child(); }

 private:
  struct Piece {
    std::size_t begin = 0;  // in the arena
    std::size_t size_bytes = 0;
    std::size_t chunk = 0;  // means nothing for a piece of no bytes
  };
  struct Chunk {
    std::size_t begin = 0;  // in the arena; both are multiples of the page size
    std::size_t size_bytes = 0;
    PieceIndex last_piece = 0;
    bool is_registered = false;
  };
  struct Layout {
    std::vector<Piece> pieces;
    std::vector<Chunk> chunks;
    std::size_t size_bytes = 0;
  };

  static Layout lay_out(const std::vector<std::size_t>& piece_sizes, std::size_t max_chunk_bytes,
                        const std::vector<PieceIndex>& run_begins);
  PinnedArena(Layout layout, std::size_t max_chunk_bytes, std::shared_ptr<Device> device);

  const Piece& at(PieceIndex piece) const;
  void check_process() const;
  void register_chunk(Chunk& chunk);

  // The device is declared first: it must outlive the registrations.
  std::shared_ptr<Device> device_;
  std::size_t max_chunk_bytes_;
  std::vector<Piece> pieces_;
  std::vector<Chunk> chunks_;
  HostMapping memory_;
  bool leaked_ = false;
};

}  // namespace torch_offload
