#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "core/copy_segment.h"
#include "core/device.h"
#include "core/file_view.h"
#include "core/locked_files.h"
#include "core/pinned_arena.h"

namespace torch_offload {

/// Where the masters of all streamed parameters live: pieces of an arena, or views of checkpoint
/// files, and what copies read of them.
///
/// A parameter with a view is *in the file*: it shows the view, copies read the file (see Note [Two
/// mappings of the same pages]). Once it is edited it is *its own*: all pages of its view are
/// private then and page-locked, at the same addresses, and copies read those.
///
/// Lifetime:  keeps device and files alive. Nothing may be in flight when it is destroyed; views
///            live on as ordinary memory with whoever holds them.
/// Threads:   one caller at a time.
class Masters {
 public:
  /// `sizes` are the bytes of each parameter's piece of the arena, zero for those that stay on the
  /// device; one with a view takes none. `run_begins` as in PinnedArena. Not more than
  /// `lock_limit_bytes` of the files are page-locked at a time. Files of `residents` are among
  /// them, so that what stays on the device can be copied from there.
  Masters(const std::shared_ptr<Device>& device, std::vector<std::size_t> sizes,
          const std::vector<PieceIndex>& run_begins, std::vector<std::shared_ptr<FileView>> views,
          std::size_t lock_limit_bytes,
          const std::vector<std::shared_ptr<FileView>>& residents = {});
  Masters(const Masters&) = delete;
  Masters& operator=(const Masters&) = delete;
  /// Never throws: what fails is told on stderr.
  ~Masters();

  /// Where the piece of a parameter without a view lies.
  PinnedArena& arena(PieceIndex index) { return *arenas_.at(index); }
  /// Makes room for masters of these sizes, zero for those that need none, where there is none yet.
  /// Pieces of parameters that go to the device stay reserved: the way back needs no memory.
  ///
  /// Throws: MemoryError; what is there stays.
  void reserve(std::vector<std::size_t> sizes);
  /// Gives back the piece of a parameter whose master is elsewhere from now on. Its memory goes
  /// with the last piece of its arena, and once no tensor shows it.
  /// Blocking: while pages are unlocked. Lifetime: nothing may be in flight from it.
  void release(PieceIndex index) { arenas_.at(index) = nothing_; }
  /// Page-locks the pieces of [begin, end), which are filled. Blocks. Throws: MemoryError.
  void seal(PieceIndex begin, PieceIndex end);
  bool has_view(PieceIndex index) const { return views_.at(index) != nullptr; }
  /// Whether copies of it read the checkpoint file.
  bool is_in_file(PieceIndex index) const { return has_view(index) && !is_own_.at(index); }
  std::byte* memory(PieceIndex index) const;
  /// Keeps that memory alive.
  std::shared_ptr<void> owner(PieceIndex index) const;

  /// The fewest copies that carry parameters [begin, end) to `offsets` in a place. Where the file
  /// goes on as the place does, one copy carries several parameters.
  std::vector<CopySegment> segments(PieceIndex begin, PieceIndex end,
                                    const std::vector<std::size_t>& offsets) const;

  LockedFiles& files() { return files_; }
  const LockedFiles& files() const { return files_; }
  /// Leaves all memory as it is for good, because copies from it may still be under way.
  void leak();
  bool has_files() const { return has_files_; }

  /// As FileView says; false for what is not in the file.
  bool is_edited(PieceIndex index) const;
  /// By a few words; exactly, and without reading from the disk, where chunks take turns.
  bool looks_edited(PieceIndex index) const;
  /// Lets copies read the parameter's own bytes from now on, those that it shows.
  ///
  /// Blocking: while pages are taken and locked. Throws: MemoryError; it is then still in the file.
  void make_own(PieceIndex index);

 private:
  void append_in_file(std::vector<CopySegment>& segments, PieceIndex begin, PieceIndex end,
                      const std::size_t* offsets) const;

  // The device is declared first: it must outlive the registrations.
  std::shared_ptr<Device> device_;
  std::vector<std::shared_ptr<FileView>> views_;  // by parameter; or none
  std::vector<char> is_own_;
  std::shared_ptr<PinnedArena> nothing_;  // with an empty piece for every parameter
  // By parameter. A piece of each arena for every parameter, empty for those whose master is
  // elsewhere or that have none.
  std::vector<std::shared_ptr<PinnedArena>> arenas_;
  LockedFiles files_;
  bool has_files_;
};

}  // namespace torch_offload
