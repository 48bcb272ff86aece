#include "codec/unit_packer.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "codec/blob.h"
#include "codec/parallel.h"
#include "core/error.h"

namespace torch_offload {

namespace {

constexpr std::uint64_t kCopyBytes = std::uint64_t{4} << 20U;

/// What `check` returns of a blob; nothing where that is damaged, or of another release.
template <typename Check>
auto if_sound(Check check) -> std::optional<decltype(check())> {
  try {
    return check();
  } catch (const ValueError&) {
    return std::nullopt;
  } catch (const NotImplementedError&) {
    return std::nullopt;
  }
}

/// Whether a decoder writes just the bytes of these tensors, all of them.
bool covers(const std::vector<TensorEntry>& entries, const std::vector<TensorSource>& tensors) {
  auto entry = entries.begin();
  for (const TensorSource& tensor : tensors) {
    std::uint64_t at = tensor.place_offset;
    const std::uint64_t end = at + tensor.size_bytes;
    for (; at < end && entry != entries.end() && entry->place_offset == at; ++entry) {
      at += entry->size_bytes;
    }
    if (at != end) {
      return false;
    }
  }
  return entry == entries.end();
}

}  // namespace

UnitPacker::UnitPacker(std::vector<TensorSource> tensors, std::uint64_t unpacked_bytes,
                       const EncodeOptions& options, const KeptBlob& kept)
    : tensors_(std::move(tensors)),
      unpacked_bytes_(unpacked_bytes),
      options_(options),
      kept_(kept) {
  if (kept_.bytes != nullptr) {
    const std::optional<BlobHeader> header = if_sound(
        [&] { return BlobView::header_of(kept_.bytes, kept_.size_bytes, unpacked_bytes_); });
    if (header) {
      blob_bytes_ = header->blob_bytes;
      num_tiles_ = header->num_tiles;
      return;
    }
  }
  count();
}

void UnitPacker::count() {
  kept_ = {};
  encoder_.emplace(tensors_, unpacked_bytes_, options_);
  blob_bytes_ = encoder_->blob_bytes();
  num_tiles_ = encoder_->num_tiles();
}

bool UnitPacker::write(std::byte* blob, std::uint64_t room_bytes) {
  if (kept_.bytes != nullptr) {
    took_kept_ = blob_bytes_ <= room_bytes && write_kept(blob);
    if (took_kept_) {
      return true;
    }
    count();
  }
  if (!encoder_ || blob_bytes_ > room_bytes) {
    return false;
  }
  encoder_->encode(blob);
  return true;
}

/// Checked where it will be used, so that no later change of what was kept can matter.
bool UnitPacker::write_kept(std::byte* blob) {
  const std::uint64_t num_parts = (blob_bytes_ + kCopyBytes - 1) / kCopyBytes;
  parallel_for(num_parts, options_.num_threads, [&](std::size_t part) {
    const std::uint64_t begin = part * kCopyBytes;
    std::memcpy(blob + begin, kept_.bytes + begin, std::min(kCopyBytes, blob_bytes_ - begin));
  });
  const std::optional<BlobView> view = if_sound(
      [&] { return BlobView::checked(blob, blob_bytes_, unpacked_bytes_, options_.num_threads); });
  return view && covers(view->entries(), tensors_) && view->header().num_tiles == num_tiles_;
}

}  // namespace torch_offload
