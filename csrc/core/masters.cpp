#include "core/masters.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <utility>

#include "core/error.h"
#include "core/host_limits.h"
#include "core/host_mapping.h"
#include "core/unit.h"

namespace torch_offload {

namespace {

/// Kept free on the host while edited weights take memory of their own.
constexpr std::size_t kReserveBytes = std::size_t{256} << 20;

std::vector<std::shared_ptr<const FileMapping>> files_of(
    const std::vector<std::shared_ptr<FileView>>& views,
    const std::vector<std::shared_ptr<FileView>>& residents) {
  std::vector<std::shared_ptr<const FileMapping>> files;
  for (const auto* list : {&views, &residents}) {
    for (const std::shared_ptr<FileView>& view : *list) {
      if (view == nullptr) {
        continue;
      }
      for (const FileBlock& block : view->blocks()) {
        if (std::find(files.begin(), files.end(), block.file) == files.end()) {
          files.push_back(block.file);
        }
      }
    }
  }
  return files;
}

/// Whatever follows in the file's pages goes into the padding behind a parameter, so that a copy
/// writes its place up to the end: reads are declared for whole places.
CopySegment padding_behind(const FileBlock& block, std::size_t offset) {
  const std::size_t end = block.offset + block.size_bytes;
  const std::size_t left = HostMapping::whole_pages(block.file->size_bytes()) - end;
  return {block.file->data() + end, offset, std::min(aligned_size(offset) - offset, left)};
}

std::vector<std::size_t> without_views(std::vector<std::size_t> sizes,
                                       const std::vector<std::shared_ptr<FileView>>& views) {
  check_internal(sizes.size() == views.size(), "as many views as parameters");
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    sizes[i] = views[i] == nullptr ? sizes[i] : 0;
  }
  return sizes;
}

}  // namespace

Masters::Masters(const std::shared_ptr<Device>& device, std::vector<std::size_t> sizes,
                 const std::vector<PieceIndex>& run_begins,
                 std::vector<std::shared_ptr<FileView>> views, std::size_t lock_limit_bytes,
                 const std::vector<std::shared_ptr<FileView>>& residents)
    : device_(device),
      views_(std::move(views)),
      is_own_(views_.size(), 0),
      nothing_(std::make_shared<PinnedArena>(device, std::vector<std::size_t>(views_.size(), 0))),
      arenas_(views_.size(),
              std::make_shared<PinnedArena>(device, without_views(std::move(sizes), views_),
                                            PinnedArena::kMaxChunkBytes, run_begins)),
      files_(device, files_of(views_, residents), lock_limit_bytes,
             LockedFiles::chunk_bytes_within(lock_limit_bytes)),
      has_files_(std::any_of(views_.begin(), views_.end(),
                             [](const auto& view) { return view != nullptr; })) {}

Masters::~Masters() {
  if (device_->in_forked_child()) {
    return;
  }
  for (PieceIndex index = 0; index < views_.size(); ++index) {
    if (is_own_[index] == 0) {
      continue;
    }
    try {
      device_->unregister_host(views_[index]->pages());
    } catch (const std::exception& error) {
      views_[index]->leak();
      std::fprintf(stderr,
                   "torch_offload: warning: could not unlock %zu bytes of host memory: %s\n",
                   views_[index]->pages_bytes(), error.what());
    }
  }
}

void Masters::leak() {
  for (PieceIndex index = 0; index < views_.size(); ++index) {
    arenas_[index]->leak();
    if (is_own_[index] != 0) {
      views_[index]->leak();
      is_own_[index] = 0;
    }
  }
  files_.leak();
}

void Masters::reserve(std::vector<std::size_t> sizes) {
  sizes = without_views(std::move(sizes), views_);
  bool is_missing = false;
  for (PieceIndex index = 0; index < sizes.size(); ++index) {
    if (sizes[index] <= arenas_[index]->piece_bytes(index)) {
      sizes[index] = 0;
    }
    is_missing = is_missing || sizes[index] != 0;
  }
  if (!is_missing) {
    return;
  }
  // Runs are the units' of any cut: here each parameter is one, and neighbours share a chunk.
  const auto arena = std::make_shared<PinnedArena>(device_, sizes);
  for (PieceIndex index = 0; index < sizes.size(); ++index) {
    if (sizes[index] != 0) {
      arenas_[index] = arena;
    }
  }
}

void Masters::seal(PieceIndex begin, PieceIndex end) {
  for (PieceIndex index = begin; index < end; ++index) {
    if (!has_view(index)) {
      arenas_[index]->seal_up_to(index);
    }
  }
}

std::byte* Masters::memory(PieceIndex index) const {
  return has_view(index) ? views_[index]->data() : arenas_[index]->piece_memory(index);
}

std::shared_ptr<void> Masters::owner(PieceIndex index) const {
  return has_view(index) ? std::shared_ptr<void>(views_[index])
                         : std::shared_ptr<void>(arenas_[index]);
}

void Masters::append_in_file(std::vector<CopySegment>& segments, PieceIndex begin, PieceIndex end,
                             const std::size_t* offsets) const {
  std::vector<CopySegment> in_file;
  for (PieceIndex index = begin; index < end; ++index) {
    std::size_t offset = *offsets++;
    for (const FileBlock& block : views_[index]->blocks()) {
      append_segment(in_file, {block.data(), offset, block.size_bytes});
      offset += block.size_bytes;
    }
    append_segment(in_file, padding_behind(views_[index]->blocks().back(), offset));
  }
  const std::vector<CopySegment> cut = files_.cut(in_file);
  segments.insert(segments.end(), cut.begin(), cut.end());
}

std::vector<CopySegment> Masters::segments(PieceIndex begin, PieceIndex end,
                                           const std::vector<std::size_t>& offsets) const {
  std::vector<CopySegment> segments;
  for (PieceIndex index = begin; index < end;) {
    const std::size_t* const first_offset = offsets.data() + (index - begin);
    if (has_view(index) && !is_in_file(index)) {
      FileView& view = *views_[index];
      const std::size_t left =
          view.pages_bytes() - static_cast<std::size_t>(view.data() - view.pages());
      const std::size_t size = std::min(aligned_size(view.size_bytes()), left);
      segments.push_back({view.data(), *first_offset, size});
      ++index;
      continue;
    }
    // All of one kind that follow each other, as one copy may carry several.
    const bool in_file = is_in_file(index);
    PieceIndex last = index + 1;
    while (last < end && is_in_file(last) == in_file && has_view(last) == in_file &&
           (in_file || arenas_[last] == arenas_[index])) {
      ++last;
    }
    if (in_file) {
      append_in_file(segments, index, last, first_offset);
    } else {
      for (CopySegment segment : arenas_[index]->segments(index, last)) {
        segment.offset += *first_offset;
        segments.push_back(segment);
      }
    }
    index = last;
  }
  return segments;
}

bool Masters::is_edited(PieceIndex index) const {
  return is_in_file(index) && views_[index]->is_edited();
}

bool Masters::looks_edited(PieceIndex index) const {
  // Where chunks take turns, their pages may be gone by now, and a look at a word would have the
  // disk read megabytes around it. Pages that nobody has edited need no look: the system knows
  // which.
  return files_.takes_turns() ? is_edited(index)
                              : is_in_file(index) && views_[index]->looks_edited();
}

void Masters::make_own(PieceIndex index) {
  if (!is_in_file(index)) {
    return;
  }
  FileView& view = *views_[index];
  check_host_memory(view.pages_bytes(), kReserveBytes, read_host_limits());
  view.take_all_pages();
  device_->register_host(view.pages(), view.pages_bytes());
  is_own_[index] = 1;
}

}  // namespace torch_offload
