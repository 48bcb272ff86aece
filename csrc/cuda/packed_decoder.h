#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace torch_offload {

/// One unit to decode, both ends in device memory.
struct DecodeLaunch {
  const std::byte* blob = nullptr;  ///< Aligned to 256 bytes.
  std::uint64_t blob_bytes = 0;
  std::byte* place = nullptr;  ///< Aligned to 16 bytes.
  std::uint64_t place_bytes = 0;
  std::uint32_t num_tiles = 0;  ///< As the blob's header says.
  /// Blocks of threads at most. 0: as many as the device can hold at once.
  std::uint32_t max_blocks = 0;
};

/// Submits the decoding of a packed unit: one kernel, whatever it holds. May be captured into a
/// graph.
///
/// Ordering:  as any kernel on `stream`. What the blob says is read when the kernel runs.
/// Blocking:  never; allocates nothing.
/// Lifetime:  blob and place until the kernel has ended.
/// Returns CUDA's answer. A blob that is unsound writes nothing outside of the place and reads
/// nothing outside of its own bytes; what is decoded is then anything. Who packs or loads a blob
/// checks it on the host: BlobView::checked.
cudaError_t launch_decode(cudaStream_t stream, const DecodeLaunch& launch);

}  // namespace torch_offload
