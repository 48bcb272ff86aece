#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "core/copy_segment.h"
#include "core/device.h"
#include "core/file_mapping.h"
#include "core/host_limits.h"
#include "core/read_ahead.h"
#include "core/stepped_device.h"

namespace torch_offload {

#ifdef TORCH_OFFLOAD_MUTANTS
inline namespace mutants {  // see steps.h
#endif

/// The pages of checkpoint files that copies read: page-locked chunk by chunk, when first needed.
///
/// Note [A checkpoint larger than host memory]
/// Locked pages cannot be taken back by the system, so not more than a limit are. Three quarters of
/// it are locked once and for good, or less where the largest unit needs more than the rest; the
/// chunks beyond go through that rest, oldest first. Passes visit the chunks in a circle, where
/// dropping the least recently used would lock every chunk anew in every pass. A limit that nobody
/// told is found when the device refuses to lock more.
///
/// What comes next is read ahead, so that locking finds the pages there. And where the files are
/// larger than the host's memory, the pages of a chunk are given back as it is unlocked: left to
/// itself the system would look for the oldest pages, which in a circle are those needed next. So a
/// pass reads exactly the chunks that take turns.
///
/// Lifetime:  keeps device and files alive. Nothing may be in flight when it is destroyed.
/// Threads:   one caller at a time.
/// Forks:     a child never calls the device.
class LockedFiles {
 public:
  static constexpr std::size_t kChunkBytes = std::size_t{128} << 20;
  static constexpr std::size_t kNoLimit = SIZE_MAX;

  /// Chunks that suit a limit: small enough for a unit and what runs ahead of it.
  static std::size_t chunk_bytes_within(std::size_t limit_bytes);

  /// Locks nothing yet. Throws: ValueError if the chunks are no whole pages.
  LockedFiles(std::shared_ptr<Device> device, std::vector<std::shared_ptr<const FileMapping>> files,
              std::size_t limit_bytes = kNoLimit, std::size_t chunk_bytes = kChunkBytes,
              const HostLimits& host = read_host_limits());
  LockedFiles(const LockedFiles&) = delete;
  LockedFiles& operator=(const LockedFiles&) = delete;
  /// Never throws: what fails is told on stderr.
  ~LockedFiles();

  /// The same copies, cut where one would cross from one chunk into another. Those whose source
  /// lies in none of the files stay whole.
  std::vector<CopySegment> cut(const std::vector<CopySegment>& segments) const;

  /// How long pages are to stay locked: for copies that come again in every pass, or for one of
  /// what goes to the device for good.
  enum class Hold { kForPasses, kOnce };

  using Submit = std::function<void(const CopySegment&)>;

  /// Page-locks all that these copies, as cut, read from the files.
  ///
  /// Blocking:  while pages are read from the disk and locked; beyond the limit also until the
  ///            copies from the chunks that make room are done.
  /// Throws:    StateError if pages cannot be read; MemoryError if these copies alone need more
  ///            than can be locked.
  void lock(const std::vector<CopySegment>& segments, Hold hold = Hold::kForPasses);
  /// Locks what the copies of a unit, as cut, read from the files, has each of them submitted to
  /// `stream` and notes it. While nothing takes turns that goes batch by batch: the first copies
  /// are under way while the pages of the last are being locked, so that behind the last page that
  /// is locked there is a batch left to copy and not a unit.
  ///
  /// Blocking:  as lock().
  /// Throws:    as lock(), and what `submit` throws; copies of earlier batches are then under way.
  void load(const std::vector<CopySegment>& segments, StreamId stream, const Submit& submit);
  /// Unlocks what was locked for one copy only. Blocks until those copies are done.
  void unlock_once();
  /// Has each of these copies, as cut and locked, submitted to `stream`, and notes it, so that
  /// their chunks stay until they are done: where one cannot be submitted, those before it.
  /// Throws: what `submit` throws.
  void submit(const std::vector<CopySegment>& segments, StreamId stream, const Submit& submit);

  /// Has what these copies, as cut, read from the files brought into memory, since it will be
  /// locked soon. Returns whether all of it is asked for: more than read_ahead_bytes() are not, as
  /// long as they are not locked. Never blocks.
  bool read_ahead(const std::vector<CopySegment>& segments);
  /// How much of what comes is worth to be read ahead.
  std::size_t read_ahead_bytes() const;

  /// Throws: StateError naming a file that is not what was opened.
  void check_unchanged() const;

  /// Leaves all as it is for good, because copies from it may still be under way.
  void leak();

  std::size_t limit_bytes() const { return limit_bytes_; }
  /// All that was locked so far, again and again where chunks take turns.
  std::uint64_t bytes_brought_in() const { return bytes_brought_in_; }
  /// Whether pages that are not locked any more are given back.
  bool forgets_pages() const { return forgets_pages_; }
  /// Whether chunks take turns, as not all fit the limit.
  bool takes_turns() const { return total_bytes_ > limit_bytes_; }

 private:
  struct Read {
    StreamId stream = kNoStream;
    EventId copied = kNoEvent;  // recorded behind the last copy from the chunk to that stream
  };
  struct Chunk {
    std::byte* begin = nullptr;
    std::size_t size_bytes = 0;  // whole pages
    std::size_t file = 0;
    bool is_locked = false;
    bool is_for_once = false;   // since it was last locked
    bool is_asked_for = false;  // ahead, since it was last unlocked
    std::vector<Read> reads;    // one for each stream, while chunks take turns
  };
  using Chunks = std::vector<Chunk*>;

  Chunk* chunk_of(const std::byte* source);
  const Chunk* chunk_of(const std::byte* source) const;
  void make_room(std::size_t size_bytes, const Chunks& needed);
  void unlock(Chunk& chunk);
  void note_copied(const std::vector<CopySegment>& segments, StreamId stream);
  bool try_lock(const Chunks& missing, Hold hold);
  void note_arrived(Chunk& chunk);
  std::size_t most_for_good() const;
  void limit_for_good();
  void take_turns_from_now_on();
  void synchronize_streams(Step step);

  std::shared_ptr<Device> device_;
  SteppedDevice steps_;  // the same one, for all that keeps order
  std::vector<std::shared_ptr<const FileMapping>> files_;
  std::vector<Chunk> chunks_;  // by address
  const std::size_t batch_bytes_;
  std::deque<Chunk*> for_good_;
  std::size_t for_good_bytes_ = 0;
  std::deque<Chunk*> in_turn_;         // oldest first
  std::size_t most_needed_bytes_ = 0;  // by the copies of one unit
  std::size_t total_bytes_ = 0;
  std::size_t locked_bytes_ = 0;
  std::size_t limit_bytes_;
  std::uint64_t bytes_brought_in_ = 0;
  std::size_t asked_bytes_ = 0;  // ahead, of chunks that are not locked yet
  bool forgets_pages_ = false;
  std::vector<StreamId> streams_;  // copies were submitted to, while nothing took turns
  ReadAhead reader_;
};

#ifdef TORCH_OFFLOAD_MUTANTS
}  // namespace mutants
#endif

}  // namespace torch_offload
