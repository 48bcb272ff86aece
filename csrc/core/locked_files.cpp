#include "core/locked_files.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <string>
#include <utility>

#include "core/error.h"
#include "core/host_limits.h"
#include "core/host_mapping.h"

namespace torch_offload {

namespace {

// As many as Device::register_read_only locks side by side.
constexpr std::size_t kBatchChunks = 4;

bool exceeds(std::size_t size_bytes, const HostLimits& host) {
  return (host.available_bytes && size_bytes > *host.available_bytes) ||
         (host.cgroup_available_bytes && size_bytes > *host.cgroup_available_bytes);
}

}  // namespace

std::size_t LockedFiles::chunk_bytes_within(std::size_t limit_bytes) {
  constexpr std::size_t kLeastBytes = std::size_t{1} << 20;
  constexpr std::size_t kShare = 32;
  const std::size_t bytes = limit_bytes / kShare / kLeastBytes * kLeastBytes;
  return std::clamp(bytes, kLeastBytes, kChunkBytes);
}

LockedFiles::LockedFiles(std::shared_ptr<Device> device,
                         std::vector<std::shared_ptr<const FileMapping>> files,
                         std::size_t limit_bytes, std::size_t chunk_bytes, const HostLimits& host)
    : device_(std::move(device)),
      steps_(*device_),
      files_(std::move(files)),
      batch_bytes_(chunk_bytes * kBatchChunks),
      limit_bytes_(limit_bytes) {
  if (chunk_bytes == 0 || chunk_bytes % HostMapping::page_bytes() != 0) {
    throw ValueError("expected chunks of whole pages, got " + std::to_string(chunk_bytes));
  }
  for (std::size_t file = 0; file < files_.size(); ++file) {
    // The device is told of memory that is not to be written, so it is not const for it.
    auto* const begin = const_cast<std::byte*>(files_[file]->data());
    const std::size_t size = HostMapping::whole_pages(files_[file]->size_bytes());
    for (std::size_t at = 0; at < size; at += chunk_bytes) {
      Chunk& chunk = chunks_.emplace_back();
      chunk.begin = begin + at;
      chunk.size_bytes = std::min(chunk_bytes, size - at);
      chunk.file = file;
    }
    total_bytes_ += size;
  }
  std::sort(chunks_.begin(), chunks_.end(),
            [](const Chunk& one, const Chunk& other) { return one.begin < other.begin; });
  forgets_pages_ = exceeds(total_bytes_, host);
}

LockedFiles::~LockedFiles() {
  if (device_->in_forked_child()) {
    return;
  }
  for (Chunk& chunk : chunks_) {
    try {
      if (chunk.is_locked) {
        device_->unregister_host(chunk.begin);
      }
    } catch (const std::exception& error) {
      // Kept mapped for good: the device may still read it.
      static_cast<void>(new std::shared_ptr<const FileMapping>(files_[chunk.file]));
      std::fprintf(stderr, "torch_offload: warning: could not unlock %zu bytes of %s: %s\n",
                   chunk.size_bytes, files_[chunk.file]->path().c_str(), error.what());
    }
  }
}

const LockedFiles::Chunk* LockedFiles::chunk_of(const std::byte* source) const {
  const auto next =
      std::upper_bound(chunks_.begin(), chunks_.end(), source,
                       [](const std::byte* at, const Chunk& chunk) { return at < chunk.begin; });
  if (next == chunks_.begin()) {
    return nullptr;
  }
  const Chunk& chunk = *std::prev(next);
  return source < chunk.begin + chunk.size_bytes ? &chunk : nullptr;
}

LockedFiles::Chunk* LockedFiles::chunk_of(const std::byte* source) {
  return const_cast<Chunk*>(std::as_const(*this).chunk_of(source));
}

std::vector<CopySegment> LockedFiles::cut(const std::vector<CopySegment>& segments) const {
  std::vector<CopySegment> pieces;
  for (CopySegment rest : segments) {
    while (rest.size_bytes > 0) {
      CopySegment piece = rest;
      if (const Chunk* chunk = chunk_of(rest.source)) {
        const auto left = static_cast<std::size_t>(chunk->begin + chunk->size_bytes - rest.source);
        piece.size_bytes = std::min(rest.size_bytes, left);
      }
      pieces.push_back(piece);
      rest.source += piece.size_bytes;
      rest.offset += piece.size_bytes;
      rest.size_bytes -= piece.size_bytes;
    }
  }
  return pieces;
}

void LockedFiles::unlock(Chunk& chunk) {
  // The device may still be reading it; mostly that is long done, as the oldest goes first.
  for (const Read& read : chunk.reads) {
    if (!device_->is_done(read.copied)) {
      steps_.synchronize(read.stream, Step::kChunkDrain);
    }
  }
  device_->unregister_host(chunk.begin);
  chunk.is_locked = chunk.is_for_once = false;
  locked_bytes_ -= chunk.size_bytes;
  if (forgets_pages_) {
    files_[chunk.file]->forget_pages(chunk.begin, chunk.size_bytes);
  }
}

/// Unlocks chunks until so many bytes more may be locked, or nothing else is left to unlock.
void LockedFiles::make_room(std::size_t size_bytes, const Chunks& needed) {
  for (std::deque<Chunk*>* queue : {&in_turn_, &for_good_}) {
    for (auto next = queue->begin(); next != queue->end();) {
      if (size_bytes <= limit_bytes_ && locked_bytes_ <= limit_bytes_ - size_bytes) {
        return;
      }
      if (std::find(needed.begin(), needed.end(), *next) != needed.end()) {
        ++next;
        continue;
      }
      Chunk& chunk = **next;
      unlock(chunk);
      for_good_bytes_ -= queue == &for_good_ ? chunk.size_bytes : 0;
      next = queue->erase(next);
    }
  }
}

/// It is locked now: was it foreseen?
void LockedFiles::note_arrived(Chunk& chunk) {
  if (!chunk.is_asked_for) {
    // The order is another one than was guessed: nothing is known of what comes.
    for (Chunk& other : chunks_) {
      other.is_asked_for = false;
    }
    asked_bytes_ = 0;
  } else {
    chunk.is_asked_for = false;
    asked_bytes_ -= chunk.size_bytes;
  }
}

bool LockedFiles::try_lock(const Chunks& missing, Hold hold) {
  std::vector<AddressRange> ranges;
  ranges.reserve(missing.size());
  for (const Chunk* chunk : missing) {
    ranges.push_back(AddressRange::of(chunk->begin, chunk->size_bytes));
  }
  try {
    device_->register_read_only(ranges, [this](const AddressRange& range) {
      // NOLINTNEXTLINE(performance-no-int-to-ptr): the device tells of memory by its addresses
      const auto* const begin = reinterpret_cast<const std::byte*>(range.begin);
      files_[chunk_of(begin)->file]->read_pages(begin, range.size_bytes());
    });
  } catch (const MemoryError&) {
    if (locked_bytes_ == 0 || locked_bytes_ >= limit_bytes_) {
      throw;
    }
    take_turns_from_now_on();
    return false;
  }
  for (Chunk* chunk : missing) {
    locked_bytes_ += chunk->size_bytes;
    const bool fits = for_good_bytes_ + chunk->size_bytes <= most_for_good();
    const bool stays = hold == Hold::kForPasses && fits;
    (stays ? for_good_ : in_turn_).push_back(chunk);
    for_good_bytes_ += stays ? chunk->size_bytes : 0;
    chunk->is_locked = true;
    chunk->is_for_once = hold == Hold::kOnce;
    note_arrived(*chunk);
    bytes_brought_in_ += chunk->size_bytes;
  }
  return true;
}

/// How much may stay locked from pass to pass, so that there is room for the rest to take turns.
std::size_t LockedFiles::most_for_good() const {
  if (!takes_turns()) {
    return limit_bytes_;
  }
  const std::size_t room = std::max(limit_bytes_ / 4, most_needed_bytes_);
  return limit_bytes_ - std::min(room, limit_bytes_);
}

/// Lets chunks take turns that were to stay: the newest, which will come last again.
void LockedFiles::limit_for_good() {
  while (!for_good_.empty() && for_good_bytes_ > most_for_good()) {
    in_turn_.push_front(for_good_.back());
    for_good_bytes_ -= for_good_.back()->size_bytes;
    for_good_.pop_back();
  }
}

/// What is locked now is all that can be had.
void LockedFiles::take_turns_from_now_on() {
  limit_bytes_ = locked_bytes_;
  // No chunk knows of its copies yet, and some may still be under way.
  synchronize_streams(Step::kLimitDrain);
  limit_for_good();
}

/// Waits for all copies that were submitted while nothing took turns.
void LockedFiles::synchronize_streams(Step step) {
  for (const StreamId stream : streams_) {
    steps_.synchronize(stream, step);
  }
}

void LockedFiles::lock(const std::vector<CopySegment>& segments, Hold hold) {
  Chunks needed;
  for (const CopySegment& segment : segments) {
    Chunk* const chunk = chunk_of(segment.source);
    if (chunk != nullptr && std::find(needed.begin(), needed.end(), chunk) == needed.end()) {
      needed.push_back(chunk);
    }
  }
  const auto lock_missing = [&] {
    Chunks missing;
    std::size_t missing_bytes = 0;
    std::size_t needed_bytes = 0;
    for (Chunk* chunk : needed) {
      needed_bytes += chunk->size_bytes;
      if (chunk->is_for_once && hold == Hold::kForPasses) {
        chunk->is_for_once = false;  // needed by copies of the passes as well
        if (for_good_bytes_ + chunk->size_bytes <= most_for_good()) {
          in_turn_.erase(std::find(in_turn_.begin(), in_turn_.end(), chunk));
          for_good_.push_back(chunk);
          for_good_bytes_ += chunk->size_bytes;
        }
      }
      if (!chunk->is_locked) {
        missing.push_back(chunk);
        missing_bytes += chunk->size_bytes;
      }
    }
    if (needed_bytes > limit_bytes_) {
      throw MemoryError("expected to page-lock " + format_bytes(needed_bytes) +
                        " of checkpoint files for the copies of one unit, got a limit of " +
                        format_bytes(limit_bytes_) +
                        "; raise host_budget, or use granularity='sublayer' or 'module' for "
                        "smaller units");
    }
    if (hold == Hold::kForPasses && needed_bytes > most_needed_bytes_) {
      most_needed_bytes_ = needed_bytes;
      limit_for_good();
    }
    if (missing.empty()) {
      return true;
    }
    make_room(missing_bytes, needed);
    return try_lock(missing, hold);
  };
  // Again within the limit that was met, which is a smaller one each time.
  while (!lock_missing()) {
  }
}

void LockedFiles::note_copied(const std::vector<CopySegment>& segments, StreamId stream) {
  if (!takes_turns()) {
    if (std::find(streams_.begin(), streams_.end(), stream) == streams_.end()) {
      streams_.push_back(stream);
    }
    return;
  }
  Chunk* last = nullptr;
  for (const CopySegment& segment : segments) {
    Chunk* const chunk = chunk_of(segment.source);
    if (chunk == nullptr || chunk == last) {
      continue;
    }
    auto read = std::find_if(chunk->reads.begin(), chunk->reads.end(),
                             [&](const Read& one) { return one.stream == stream; });
    if (read == chunk->reads.end()) {
      read = chunk->reads.insert(read, {stream, device_->create_event()});
    }
    steps_.record(read->copied, stream, Step::kChunkRecord);
    last = chunk;
  }
}

void LockedFiles::submit(const std::vector<CopySegment>& segments, StreamId stream,
                         const Submit& submit) {
  auto next = segments.begin();
  try {
    for (; next != segments.end(); ++next) {
      submit(*next);
    }
  } catch (...) {
    note_copied({segments.begin(), next}, stream);
    throw;
  }
  note_copied(segments, stream);
}

void LockedFiles::load(const std::vector<CopySegment>& segments, StreamId stream,
                       const Submit& submit) {
  for (std::size_t begin = 0, end = 0; begin < segments.size(); begin = end) {
    // Chunks that take turns are all needed at once: one batch must not unlock another's.
    const std::size_t most_bytes = takes_turns() ? SIZE_MAX : batch_bytes_;
    std::vector<CopySegment> batch;
    for (std::size_t bytes = 0; end < segments.size() && bytes < most_bytes; ++end) {
      bytes += segments[end].size_bytes;
      batch.push_back(segments[end]);
    }
    lock(batch);
    this->submit(batch, stream, submit);
  }
}

void LockedFiles::unlock_once() {
  synchronize_streams(Step::kOnceDrain);
  for (auto next = in_turn_.begin(); next != in_turn_.end();) {  // none of those for good is
    if ((*next)->is_for_once) {
      unlock(**next);
      next = in_turn_.erase(next);
    } else {
      ++next;
    }
  }
}

std::size_t LockedFiles::read_ahead_bytes() const {
  constexpr std::size_t kMost = std::size_t{1} << 30;
  return std::min(kMost, limit_bytes_ / 8);
}

bool LockedFiles::read_ahead(const std::vector<CopySegment>& segments) {
  for (const CopySegment& segment : segments) {
    Chunk* const chunk = chunk_of(segment.source);
    if (chunk == nullptr || chunk->is_locked || chunk->is_asked_for) {
      continue;
    }
    if (asked_bytes_ >= read_ahead_bytes()) {
      return false;
    }
    chunk->is_asked_for = true;
    asked_bytes_ += chunk->size_bytes;
    reader_.ask(files_[chunk->file], chunk->begin, chunk->size_bytes);
  }
  return true;
}

void LockedFiles::leak() {
  // On purpose: a mapping goes with its last owner.
  [[maybe_unused]] const auto* const leaked = new auto(files_);
  for (Chunk& chunk : chunks_) {
    chunk.is_locked = false;
  }
}

void LockedFiles::check_unchanged() const {
  for (const std::shared_ptr<const FileMapping>& file : files_) {
    file->check_unchanged();
  }
}

}  // namespace torch_offload
