#pragma once

#include <torch/csrc/utils/pybind.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "codec/blob.h"
#include "core/pinned_arena.h"
#include "params/tensor_layout.h"

namespace torch_offload {

/// Lets a parameter show other data: what `parameter.data = data` does, without its questions.
void show_data(const at::Tensor& parameter, const at::Tensor& data);

/// A packed unit in page-locked memory: the one place where its weights are.
///
/// Lifetime: kept by the engine, for what it copies, and by every parameter that shows a part of
/// it. Threads:  any, once made.
class PackedBlob {
 public:
  /// `memory` has one piece, which holds the blob. Checks all of it.
  /// Throws: as BlobView::checked.
  PackedBlob(std::shared_ptr<PinnedArena> memory, std::size_t size_bytes, std::size_t place_bytes);
  PackedBlob(const PackedBlob&) = delete;
  PackedBlob& operator=(const PackedBlob&) = delete;
  /// With the GIL or without: unlocking memory lets go of it.
  ~PackedBlob();

  const std::byte* bytes() const { return view_.bytes(); }
  std::size_t size_bytes() const { return view_.header().blob_bytes; }
  std::size_t place_bytes() const { return view_.header().unpacked_bytes; }
  std::uint32_t num_tiles() const { return view_.header().num_tiles; }
  const std::shared_ptr<PinnedArena>& memory() const { return memory_; }

  /// Writes the tensor that begins there in the place. Blocks until it is unpacked, on all cores.
  /// Throws: StateError in a forked child, which has none of this memory.
  void unpack(std::size_t place_offset, std::size_t size_bytes, std::byte* destination) const;
  /// Whether it was packed from just these bytes. Blocks and throws likewise.
  bool holds(std::size_t place_offset, const std::byte* bytes, std::size_t size_bytes) const;

 private:
  void check_process() const;

  std::shared_ptr<PinnedArena> memory_;
  BlobView view_;
};

/// What a parameter shows at rest whose master is packed: shape, strides and dtype, and no memory.
/// Its Python class is then a subclass of its own one, which unpacks it for whoever wants to read
/// or write it (packed_parameter.py).
///
/// Lifetime: holds no parameter; the parameter holds it, as an attribute, while it shows it.
/// Threads:  every call needs the GIL, its destructor too, but for `unpacked`.
class PackedMaster : public std::enable_shared_from_this<PackedMaster> {
 public:
  /// Where in which blob the weight lies, and how it lies in memory once unpacked.
  struct Part {
    std::shared_ptr<const PackedBlob> blob;
    std::size_t place_offset;
    TensorLayout layout;

    /// The weight in ordinary memory of its own. Blocks until it is unpacked.
    at::Tensor unpacked() const;
  };

  /// `packed_class_of` gives the class that a parameter of some class has at rest.
  PackedMaster(Part part, const at::Tensor& parameter, const pybind11::object& packed_class_of);

  const std::shared_ptr<const PackedBlob>& blob() const { return part_.blob; }
  std::size_t place_offset() const { return part_.place_offset; }
  /// Whether these bytes are what is packed.
  bool holds(const at::Tensor& bytes) const;

  /// From now on the parameter shows this master.
  void show(const at::Tensor& parameter);
  /// It does so no more: it is of its own class again, and must be given data at once.
  void make_plain(const at::Tensor& parameter);
  /// Likewise for good. Does nothing to a parameter that has not shown this master.
  void take_back(const at::Tensor& parameter);
  /// Whether it does, and nobody has unpacked it.
  bool is_shown_by(const at::Tensor& parameter) const;
  /// The master that a parameter shows; or none.
  static std::shared_ptr<PackedMaster> shown_by(const at::Tensor& parameter);
  /// Lets a tensor that shows a packed master have those weights in memory of its own: a parameter
  /// at rest, or any tensor that was given what one shows, by `tensor.data = weight`. Does nothing
  /// to others. Blocks until they are unpacked.
  static void give_memory(const at::Tensor& tensor);

  /// As of its part.
  at::Tensor unpacked() const { return part_.unpacked(); }
  /// Lets the parameter show them.
  void unpack(const at::Tensor& parameter);

 private:
  void set_class(const at::Tensor& parameter, const pybind11::object& type) const;

  Part part_;
  pybind11::object plain_class_;
  pybind11::object packed_class_;
  at::Tensor nothing_;                       // of the right shape
  const c10::TensorImpl* holder_ = nullptr;  // the parameter that has this as an attribute
};

}  // namespace torch_offload
