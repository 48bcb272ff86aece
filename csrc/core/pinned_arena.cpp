#include "core/pinned_arena.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <numeric>
#include <string>
#include <utility>

#include "core/error.h"
#include "core/host_limits.h"
#include "core/unit.h"

namespace torch_offload {

PinnedArena::Layout PinnedArena::lay_out(const std::vector<std::size_t>& piece_sizes,
                                         std::size_t max_chunk_bytes,
                                         const std::vector<PieceIndex>& run_begins) {
  const std::size_t page = HostMapping::page_bytes();
  if (max_chunk_bytes == 0 || max_chunk_bytes % page != 0) {
    throw ValueError("expected chunks of a multiple of the page size, " + std::to_string(page) +
                     " bytes, got " + std::to_string(max_chunk_bytes));
  }
  // Bytes of the run that begins with a piece, for those that begin one.
  std::vector<std::size_t> run_bytes(piece_sizes.size(), 0);
  for (std::size_t run = 0; run < run_begins.size(); ++run) {
    const PieceIndex begin = run_begins[run];
    const PieceIndex end = run + 1 < run_begins.size() ? run_begins[run + 1] : piece_sizes.size();
    if (begin >= end || end > piece_sizes.size()) {
      throw IndexError("expected runs of pieces one behind the other, got one from piece " +
                       std::to_string(begin) + " to " + std::to_string(end));
    }
    run_bytes[begin] =
        std::accumulate(piece_sizes.begin() + static_cast<std::ptrdiff_t>(begin),
                        piece_sizes.begin() + static_cast<std::ptrdiff_t>(end), std::size_t{0});
  }
  Layout layout;
  layout.pieces.reserve(piece_sizes.size());
  std::size_t limit = max_chunk_bytes;  // of the open chunk
  std::size_t end = 0;                  // of the pieces so far
  const auto close_chunk = [&layout, &end] {
    if (!layout.chunks.empty()) {
      end = HostMapping::whole_pages(end);
      layout.chunks.back().size_bytes = end - layout.chunks.back().begin;
    }
  };
  for (PieceIndex index = 0; index < piece_sizes.size(); ++index) {
    const std::size_t size = piece_sizes[index];
    if (size % kAlignmentBytes != 0) {
      throw ValueError("expected piece " + std::to_string(index) + " to take a multiple of " +
                       std::to_string(kAlignmentBytes) + " bytes, got " + std::to_string(size));
    }
    const std::size_t used = layout.chunks.empty() ? 0 : end - layout.chunks.back().begin;
    // A chunk that a large piece or run has filled takes no other: it is beyond the limit already.
    bool fits = !layout.chunks.empty() && used + size <= limit;
    if (run_bytes[index] > 0) {
      const bool stays_whole = run_bytes[index] <= kMaxRunChunks * max_chunk_bytes;
      limit = stays_whole ? std::max(max_chunk_bytes, run_bytes[index]) : max_chunk_bytes;
      fits = fits && used + (stays_whole ? run_bytes[index] : size) <= max_chunk_bytes;
    }
    if (size > 0 && !fits) {
      close_chunk();
      layout.chunks.push_back({end, 0, index, false});
    }
    if (size > 0) {
      layout.chunks.back().last_piece = index;
    }
    layout.pieces.push_back({end, size, size > 0 ? layout.chunks.size() - 1 : 0});
    end += size;
  }
  close_chunk();
  layout.size_bytes = end;
  return layout;
}

PinnedArena::PinnedArena(std::shared_ptr<Device> device,
                         const std::vector<std::size_t>& piece_sizes, std::size_t max_chunk_bytes,
                         const std::vector<PieceIndex>& run_begins)
    : PinnedArena(lay_out(piece_sizes, max_chunk_bytes, run_begins), max_chunk_bytes,
                  std::move(device)) {}

PinnedArena::PinnedArena(Layout layout, std::size_t max_chunk_bytes, std::shared_ptr<Device> device)
    : device_(std::move(device)),
      max_chunk_bytes_(max_chunk_bytes),
      pieces_(std::move(layout.pieces)),
      chunks_(std::move(layout.chunks)),
      memory_(layout.size_bytes, device_ != nullptr ? device_->host_node() : std::nullopt) {
  check_internal(device_ != nullptr, "an arena needs a device");
}

PinnedArena::~PinnedArena() {
  if (leaked_ || device_->in_forked_child()) {
    return;  // The registrations are the parent's, and its device must not be touched here.
  }
  for (const Chunk& chunk : chunks_) {
    if (!chunk.is_registered) {
      continue;
    }
    try {
      device_->unregister_host(memory_.data() + chunk.begin);
    } catch (const std::exception& error) {
      memory_.leak();
      std::fprintf(stderr,
                   "torch_offload: warning: could not unlock %zu bytes of host memory, so %zu "
                   "bytes stay in use: %s\n",
                   chunk.size_bytes, memory_.size_bytes(), error.what());
    }
  }
}

const PinnedArena::Piece& PinnedArena::at(PieceIndex piece) const {
  if (piece >= pieces_.size()) {
    throw IndexError("expected a piece below " + std::to_string(pieces_.size()) + ", got " +
                     std::to_string(piece));
  }
  return pieces_[piece];
}

std::byte* PinnedArena::piece_memory(PieceIndex piece) const {
  return memory_.data() + at(piece).begin;
}

std::size_t PinnedArena::piece_bytes(PieceIndex piece) const { return at(piece).size_bytes; }

std::vector<CopySegment> PinnedArena::segments(PieceIndex begin, PieceIndex end) const {
  if (begin > end || end > pieces_.size()) {
    throw IndexError("expected a range of " + std::to_string(pieces_.size()) + " pieces, got [" +
                     std::to_string(begin) + ", " + std::to_string(end) + ")");
  }
  std::vector<CopySegment> segments;
  std::size_t offset = 0;
  std::size_t chunk = chunks_.size();  // of the last segment; none yet
  for (PieceIndex index = begin; index < end; ++index) {
    const Piece& piece = pieces_[index];
    if (piece.size_bytes == 0) {
      continue;
    }
    if (piece.chunk == chunk) {
      segments.back().size_bytes += piece.size_bytes;  // pieces of one chunk have no gaps
    } else {
      segments.push_back({memory_.data() + piece.begin, offset, piece.size_bytes});
      chunk = piece.chunk;
    }
    offset += piece.size_bytes;
  }
  return segments;
}

void PinnedArena::check_process() const {
  if (in_forked_child()) {
    throw StateError(
        "expected offloaded weights to be filled and page-locked in the process that offloaded "
        "them, got a forked child; offload a model of its own there, or start the child by spawn");
  }
}

void PinnedArena::register_chunk(Chunk& chunk) {
  try {
    device_->register_host(memory_.data() + chunk.begin, chunk.size_bytes);
  } catch (const MemoryError& error) {
    const bool is_one_piece = chunk.size_bytes > max_chunk_bytes_;
    throw MemoryError(std::string(error.what()) + "; of " + format_bytes(size_bytes()) +
                      " to be page-locked, " + format_bytes(registered_bytes()) + " are (" +
                      describe(read_host_limits()) + "); " +
                      (is_one_piece ? "this is one parameter of " + format_bytes(chunk.size_bytes) +
                                          ", which must be page-locked in one call, and some "
                                          "drivers refuse more than 4 GiB: keep that parameter on "
                                          "the device with resident=[...]"
                                    : "offload fewer weights, or raise the limit that was met"));
  }
  chunk.is_registered = true;
}

void PinnedArena::prepare(PieceIndex piece) {
  const Piece& record = at(piece);
  check_process();
  if (record.size_bytes == 0 || chunks_[record.chunk].is_registered) {
    return;
  }
  Chunk& chunk = chunks_[record.chunk];
  // First, as registering takes pages one at a time, at a ninth of the speed.
  memory_.take_pages(memory_.data() + chunk.begin, chunk.size_bytes);
  register_chunk(chunk);
}

void PinnedArena::fill(PieceIndex piece, const void* source, std::size_t size_bytes) {
  const Piece& record = at(piece);
  check_internal(size_bytes <= record.size_bytes, "a piece filled beyond its end");
  check_process();
  if (size_bytes == 0) {
    return;
  }
  std::byte* const destination = memory_.data() + record.begin;
  memory_.fill(destination, source, size_bytes);
  device_->host_write(destination, size_bytes, kNoUnit);
}

void PinnedArena::seal_up_to(PieceIndex piece) {
  at(piece);
  check_process();
  for (Chunk& chunk : chunks_) {
    if (chunk.last_piece > piece) {
      return;
    }
    if (!chunk.is_registered) {
      register_chunk(chunk);
    }
  }
}

void PinnedArena::leak() {
  leaked_ = true;
  memory_.leak();
}

bool PinnedArena::is_sealed(PieceIndex piece) const {
  const Piece& record = at(piece);
  return record.size_bytes == 0 || chunks_[record.chunk].is_registered;
}

std::size_t PinnedArena::registered_bytes() const {
  std::size_t bytes = 0;
  for (const Chunk& chunk : chunks_) {
    bytes += chunk.is_registered ? chunk.size_bytes : 0;
  }
  return bytes;
}

}  // namespace torch_offload
