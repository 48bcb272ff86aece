// Blobs that outlive a run: what they are known by, and their way in and out. Where they are kept
// is Python's business (packed_cache.py).

#include <ATen/ATen.h>

#include <utility>

#include "codec/checksum.h"
#include "codec/parallel.h"
#include "core/error.h"
#include "params/engine.h"

namespace py = pybind11;

namespace torch_offload {

std::vector<Engine::ParameterContent> Engine::content(UnitIndex unit) {
  const Rest rest(*this, "content()");
  pipeline();
  const UnitParameters& entry = units_.at(unit);
  take_found(entry);
  const py::gil_scoped_release no_gil;
  std::vector<at::Tensor> unpacked;
  std::vector<ParameterContent> contents;
  std::size_t index = entry.range.begin;
  for (const TensorSource& source : sources_of(entry, unpacked)) {
    contents.push_back({parameters_[index++].name(), source.place_offset, source.size_bytes,
                        checksum_of(source.bytes, source.size_bytes, default_num_threads())});
  }
  return contents;
}

void Engine::offer_blobs(std::vector<at::Tensor> blobs) {
  for (const at::Tensor& blob : blobs) {
    if (blob.defined() &&
        (!blob.is_cpu() || !blob.is_contiguous() || blob.scalar_type() != at::kByte)) {
      throw TypeError("expected blobs as contiguous uint8 tensors on the CPU, got one that is not");
    }
  }
  offered_blobs_ = std::move(blobs);
  blobs_taken_.clear();
}

KeptBlob Engine::offered_blob(UnitIndex unit) const {
  if (unit >= offered_blobs_.size() || !offered_blobs_[unit].defined()) {
    return {};
  }
  const at::Tensor& blob = offered_blobs_[unit];
  return {static_cast<const std::byte*>(blob.const_data_ptr()), blob.nbytes()};
}

at::Tensor Engine::packed_blob(UnitIndex unit) const {
  const Rest rest(*this, "packed_blob()");
  pipeline();
  const UnitParameters& entry = units_.at(unit);
  if (!is_packed(unit)) {
    return {};
  }
  const PackedSource& source = packed_->source(unit);
  const std::shared_ptr<const PackedBlob>& master = entry.blob;
  const bool is_on_device = packed_->has_room(unit) && master == nullptr;
  // The blob is read, never written, through this tensor.
  const at::Tensor blob = at::from_blob(
      const_cast<std::byte*>(master == nullptr ? source.bytes : master->bytes()),
      {static_cast<std::int64_t>(source.packed_bytes)}, [owner = blobs_, master](void*) {},
      at::TensorOptions().dtype(at::kByte).device(is_on_device ? torch_device_ : at::kCPU));
  return is_on_device ? blob.to(at::kCPU, at::kByte, /*non_blocking=*/false, /*copy=*/true) : blob;
}

}  // namespace torch_offload
