#include <ATen/Functions.h>
#include <pybind11/stl.h>
#include <sys/mman.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "bindings/bind.h"
#include "codec/blob.h"
#include "codec/decoder.h"
#include "codec/encoder.h"
#include "codec/parallel.h"
#include "core/error.h"
#include "core/packed_loader.h"
#include "core/unit.h"
#include "params/exponent_counts.h"
#ifdef TORCH_OFFLOAD_WITH_KERNELS
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/packed_decoder.h"
#endif

namespace py = pybind11;

namespace torch_offload {

namespace {

Codec codec_named(const std::string& name) {
  for (const Codec codec : {Codec::kRaw, Codec::kE4p, Codec::kE33}) {
    if (name == name_of(codec)) {
      return codec;
    }
  }
  throw ValueError("expected codec 'raw', 'e4p' or 'e33', got '" + name + "'");
}

void check_bytes(const at::Tensor& tensor, const char* what, at::DeviceType device) {
  if (tensor.scalar_type() != at::kByte || !tensor.is_contiguous() ||
      tensor.device().type() != device) {
    throw TypeError(std::string("expected ") + what + " as a contiguous uint8 tensor on " +
                    (device == at::kCPU ? "the CPU" : "the GPU") + ", got " +
                    c10::toString(tensor.scalar_type()) + " on " + tensor.device().str());
  }
}

const std::byte* bytes_of(const at::Tensor& tensor) {
  return static_cast<const std::byte*>(tensor.const_data_ptr());
}

std::uint64_t size_of(const at::Tensor& tensor) {
  return static_cast<std::uint64_t>(tensor.nbytes());
}

unsigned threads_or_default(unsigned num_threads) {
  return num_threads == 0 ? default_num_threads() : num_threads;
}

/// A packed unit that Python made, with what a launch must know of it.
struct PackedUnit {
  at::Tensor blob;
  std::uint64_t place_bytes = 0;
  std::uint32_t num_tiles = 0;
  std::vector<TensorEntry> entries;
};

/// What tensors of such sizes take where they are kept packed; counts of those that may be packed.
std::uint64_t packed_room(const std::vector<std::uint64_t>& sizes_bytes,
                          const std::vector<std::optional<at::Tensor>>& counts) {
  if (counts.size() != sizes_bytes.size()) {
    throw ValueError("expected counts, or None, for each of " + std::to_string(sizes_bytes.size()) +
                     " tensors, got " + std::to_string(counts.size()));
  }
  std::vector<TensorSource> sources;
  std::uint64_t place_bytes = 0;
  for (std::size_t i = 0; i < sizes_bytes.size(); ++i) {
    TensorSource source;
    source.size_bytes = sizes_bytes[i];
    source.place_offset = place_bytes;
    if (const std::optional<at::Tensor>& counted = counts[i]) {
      source.type = ElementType::kBf16;
      source.counts = counts_in(*counted, sizes_bytes[i]);
    }
    sources.push_back(source);
    place_bytes += aligned_size(sizes_bytes[i]);
  }
  return packed_room_bytes(UnitEncoder(sources, place_bytes, {}).blob_bytes());
}

UnitEncoder encoder_of(const std::vector<at::Tensor>& tensors, const EncodeOptions& options) {
  std::vector<TensorSource> sources;
  std::uint64_t place_bytes = 0;
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.is_cpu() || !tensor.is_contiguous()) {
      throw TypeError("expected contiguous tensors on the CPU to pack, got one on " +
                      tensor.device().str());
    }
    sources.push_back(
        {bytes_of(tensor), size_of(tensor), place_bytes,
         tensor.scalar_type() == at::kBFloat16 ? ElementType::kBf16 : ElementType::kOther});
    place_bytes += aligned_size(size_of(tensor));
  }
  const py::gil_scoped_release no_gil;
  return {sources, place_bytes, options};
}

/// Memory in huge pages where the system gives them, as that of masters: fresh pages of 4 KiB cost
/// more time than packing does.
at::Tensor empty_blob(std::uint64_t size_bytes) {
  constexpr std::uintptr_t kPageBytes = std::uintptr_t{1} << 21U;
  at::Tensor blob = at::empty({static_cast<std::int64_t>(size_bytes)}, at::kByte);
  auto* const bytes = static_cast<std::byte*>(blob.mutable_data_ptr());
  const std::uintptr_t lead = -reinterpret_cast<std::uintptr_t>(bytes) % kPageBytes;
  if (size_bytes >= lead + kPageBytes) {
    // A wish, so the answer does not matter.
    static_cast<void>(
        madvise(bytes + lead, (size_bytes - lead) / kPageBytes * kPageBytes, MADV_HUGEPAGE));
  }
  return blob;
}

/// The first `size_bytes` of the memory that is there, or memory of its own.
at::Tensor memory_for(std::uint64_t size_bytes, const std::optional<at::Tensor>& memory) {
  if (!memory) {
    return empty_blob(size_bytes);
  }
  check_bytes(*memory, "memory for the packed unit", at::kCPU);
  if (size_of(*memory) < size_bytes) {
    throw ValueError("expected memory for a packed unit of " + std::to_string(size_bytes) +
                     " bytes, got " + std::to_string(size_of(*memory)));
  }
  return memory->view({-1}).narrow(0, 0, static_cast<std::int64_t>(size_bytes));
}

PackedUnit pack(const std::vector<at::Tensor>& tensors, const std::optional<std::string>& codec,
                unsigned num_threads, std::uint64_t max_entry_weights,
                const std::optional<at::Tensor>& memory) {
  EncodeOptions options;
  options.num_threads = threads_or_default(num_threads);
  if (codec) {
    options.codec = codec_named(*codec);
  }
  if (max_entry_weights != 0) {
    options.max_entry_weights = max_entry_weights;
  }
  const UnitEncoder encoder = encoder_of(tensors, options);
  const py::gil_scoped_release no_gil;
  PackedUnit unit;
  unit.blob = memory_for(encoder.blob_bytes(), memory);
  encoder.encode(static_cast<std::byte*>(unit.blob.mutable_data_ptr()));
  for (const at::Tensor& tensor : tensors) {
    unit.place_bytes += aligned_size(size_of(tensor));
  }
  unit.entries = encoder.entries();
  unit.num_tiles = encoder.num_tiles();
  return unit;
}

void unpack(const at::Tensor& blob, const at::Tensor& place, unsigned num_threads) {
  check_bytes(blob, "the packed unit", at::kCPU);
  check_bytes(place, "the place", at::kCPU);
  const py::gil_scoped_release no_gil;
  decode(bytes_of(blob), size_of(blob), static_cast<std::byte*>(place.mutable_data_ptr()),
         size_of(place), threads_or_default(num_threads));
}

#ifdef TORCH_OFFLOAD_WITH_KERNELS
void unpack_on_gpu(const at::Tensor& blob, const at::Tensor& place, std::uint32_t num_tiles,
                   std::uint32_t max_blocks) {
  check_bytes(blob, "the packed unit", at::kCUDA);
  check_bytes(place, "the place", at::kCUDA);
  DecodeLaunch launch;
  launch.blob = bytes_of(blob);
  launch.blob_bytes = size_of(blob);
  launch.place = static_cast<std::byte*>(place.mutable_data_ptr());
  launch.place_bytes = size_of(place);
  launch.num_tiles = num_tiles;
  launch.max_blocks = max_blocks;
  const py::gil_scoped_release no_gil;
  const c10::cuda::CUDAGuard guard(blob.device());
  C10_CUDA_CHECK(launch_decode(c10::cuda::getCurrentCUDAStream(), launch));
}
#else
void unpack_on_gpu(const at::Tensor& /*blob*/, const at::Tensor& /*place*/,
                   std::uint32_t /*num_tiles*/, std::uint32_t /*max_blocks*/) {
  throw NotImplementedError(
      "expected a build with kernels to unpack on a GPU, got one made without nvcc; install the "
      "CUDA compiler of torch's own major version and build torch_offload again");
}
#endif

}  // namespace

void bind_codec(py::module_& module) {
  py::class_<PackedUnit>(module, "PackedUnit", "Tensors packed into one blob, without loss.")
      .def_readonly("blob", &PackedUnit::blob)
      .def_readonly("place_bytes", &PackedUnit::place_bytes)
      .def_readonly("num_tiles", &PackedUnit::num_tiles)
      .def_property_readonly("codecs", [](const PackedUnit& unit) {
        std::vector<std::string> names;
        names.reserve(unit.entries.size());
        for (const TensorEntry& entry : unit.entries) {
          names.emplace_back(name_of(entry.codec));
        }
        return names;
      });
  module.def("pack", &pack, py::arg("tensors"), py::arg("codec") = py::none(),
             py::arg("num_threads") = 0, py::arg("max_entry_weights") = 0,
             py::arg("memory") = py::none(),
             "Packs tensors as they would lie in a place, each at a multiple of 256 bytes, into "
             "the beginning of `memory` where that is given. Blocks until that is done.");
  module.def(
      "count_exponents",
      [](const at::Tensor& weights) {
        const py::gil_scoped_release no_gil;
        return count_exponents(weights);
      },
      py::arg("weights"),
      "Counts the exponents of each counted_weights of a bfloat16 tensor on the CPU.");
  module.attr("counted_weights") = kCountedWeights;
  module.def("packed_room_bytes", &packed_room_bytes, py::arg("packed_bytes"),
             "What a unit that is packed into so many bytes gets room for.");
  module.def("packed_room", &packed_room, py::arg("sizes_bytes"), py::arg("counts"),
             "Bytes that a unit of tensors of such sizes takes where it is kept packed, by what "
             "count_exponents says of each; None for one that stays as it is. Reads no weight.");
  module.def("unpack", &unpack, py::arg("blob"), py::arg("place"), py::arg("num_threads") = 0,
             "Checks a packed unit and decodes it on the CPU. Blocks until that is done.");
  module.def("unpack_on_gpu", &unpack_on_gpu, py::arg("blob"), py::arg("place"),
             py::arg("num_tiles"), py::arg("max_blocks") = 0,
             "Submits the decoding to the current stream. Never blocks.");
  module.def(
      "blob_checksum",
      [](const at::Tensor& blob) {
        check_bytes(blob, "the packed unit", at::kCPU);
        BlobHeader header;
        if (size_of(blob) < sizeof(header)) {
          throw ValueError("expected a packed unit of at least " + std::to_string(sizeof(header)) +
                           " bytes, got " + std::to_string(size_of(blob)));
        }
        std::memcpy(&header, bytes_of(blob), sizeof(header));
        return header.checksum;
      },
      py::arg("blob"), "The checksum that a packed unit says it has. Does not check it.");
  module.attr("blob_version") = kBlobVersion;
  module.attr("has_kernels") =
#ifdef TORCH_OFFLOAD_WITH_KERNELS
      true;
#else
      false;
#endif
}

}  // namespace torch_offload
