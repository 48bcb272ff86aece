// The decoder of packed units for the GPU; what a section holds is in Note [The packed format].
//
// A block of four warps decodes one tile after another, a warp one group of 1024 weights, a lane
// the four runs of 8 weights at 256 j + 8 lane: so every load and store of a warp covers one
// contiguous range. The exponents of 8 weights come out of a palette in registers by two byte
// permutations, are merged with signs and mantissas four at a time, and leave as one store of 16
// bytes. Lanes find their escapes by a warp's prefix sum.

#include <cuda_runtime.h>

#include "codec/format.h"
#include "codec/group.h"
#include "cuda/packed_decoder.h"

namespace torch_offload {

namespace {

constexpr unsigned kFullWarp = 0xFFFFFFFFU;
constexpr unsigned kWarpLanes = 32;
constexpr unsigned kBlockThreads = kGroupsPerTile * kWarpLanes;
/// What an SM holds at once with the registers of this kernel.
constexpr unsigned kBlocksPerSm = 8;
constexpr unsigned kQuarters = 4;
constexpr unsigned kEscapesPerWindow = 10;  // three bits each, of 32

/// One entry of the table and where its data are; all threads of a block hold the same.
struct Tensor {
  const std::byte* data;
  std::byte* place;
  std::uint64_t size_bytes;
  Sections sections;
  std::uint32_t palette[4];
  std::uint32_t num_escapes;
  std::uint32_t num_patches;
  std::uint32_t first_tile;
  std::uint32_t end_tile;  // first_tile where nothing may be decoded
  Codec codec;
};

template <typename T>
__device__ const T* section(const Tensor& tensor, std::uint64_t offset) {
  return reinterpret_cast<const T*>(tensor.data + offset);
}

/// Finds the entry that holds `tile`, and believes it only as far as blob and place reach.
__device__ Tensor find_tensor(const DecodeLaunch& launch, std::uint32_t tile) {
  const auto* const header = reinterpret_cast<const BlobHeader*>(launch.blob);
  const auto* const entries = reinterpret_cast<const TensorEntry*>(header + 1);
  Tensor tensor{};
  tensor.first_tile = tensor.end_tile = tile;
  const std::uint32_t num_tensors = header->num_tensors;
  if (header->magic != kBlobMagic || header->version != kBlobVersion || num_tensors == 0 ||
      num_tensors > (launch.blob_bytes - sizeof(BlobHeader)) / sizeof(TensorEntry)) {
    return tensor;
  }
  std::uint32_t low = 0;  // the last entry that does not begin behind the tile
  for (std::uint32_t high = num_tensors; high - low > 1;) {
    const std::uint32_t middle = low + (high - low) / 2;
    if (entries[middle].first_tile <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const TensorEntry& entry = entries[low];
  const std::uint64_t size_bytes = entry.size_bytes;
  if (static_cast<std::uint32_t>(entry.codec) >= kNumCodecs || entry.first_tile > tile ||
      size_bytes > launch.place_bytes || entry.place_offset > launch.place_bytes - size_bytes ||
      entry.place_offset % kSectionAlignmentBytes != 0 ||
      entry.data_offset % kDataAlignmentBytes != 0 || entry.data_offset > launch.blob_bytes ||
      (entry.codec != Codec::kRaw && (size_bytes % 2 != 0 || size_bytes / 2 > kMaxEntryWeights))) {
    return tensor;
  }
  tensor.sections = sections_of(entry.codec, size_bytes, entry.num_escapes, entry.num_patches);
  if (tensor.sections.size_bytes > launch.blob_bytes - entry.data_offset ||
      tile - entry.first_tile >= num_tiles_of(size_bytes)) {
    return tensor;
  }
  tensor.data = launch.blob + entry.data_offset;
  tensor.place = launch.place + entry.place_offset;
  tensor.size_bytes = size_bytes;
  const auto* const palette = reinterpret_cast<const std::uint32_t*>(entry.palette);
  for (unsigned i = 0; i < 4; ++i) {
    tensor.palette[i] = palette[i];
  }
  tensor.num_escapes = entry.num_escapes;
  tensor.num_patches = entry.num_patches;
  tensor.first_tile = entry.first_tile;
  tensor.end_tile = entry.first_tile + static_cast<std::uint32_t>(num_tiles_of(size_bytes));
  tensor.codec = entry.codec;
  return tensor;
}

__device__ void copy_tile(const Tensor& tensor, std::uint64_t tile) {
  const std::uint64_t begin = tile * kTileBytes;
  const std::uint64_t left = tensor.size_bytes - begin;
  const auto size_bytes = static_cast<std::uint32_t>(left < kTileBytes ? left : kTileBytes);
  const std::uint32_t num_vectors = size_bytes / sizeof(uint4);
  const auto* const source = section<uint4>(tensor, begin);
  auto* const destination = reinterpret_cast<uint4*>(tensor.place + begin);
  for (std::uint32_t i = threadIdx.x; i < num_vectors; i += kBlockThreads) {
    __stcs(destination + i, __ldcs(source + i));
  }
  const std::uint32_t rest = num_vectors * static_cast<std::uint32_t>(sizeof(uint4));
  if (rest + threadIdx.x < size_bytes) {
    tensor.place[begin + rest + threadIdx.x] = tensor.data[begin + rest + threadIdx.x];
  }
}

/// Exponents of four weights, by 4-bit codes below 8.
__device__ std::uint32_t look_up8(std::uint32_t low, std::uint32_t high, std::uint32_t codes) {
  return __byte_perm(low, high, codes);
}

/// Exponents of four weights, by 4-bit codes.
__device__ std::uint32_t look_up16(const std::uint32_t (&palette)[4], std::uint32_t codes) {
  const std::uint32_t index = codes & 0x7777U;
  const std::uint32_t low = __byte_perm(palette[0], palette[1], index);
  const std::uint32_t high = __byte_perm(palette[2], palette[3], index);
  // 0xFF in the bytes of those codes that have their fourth bit.
  const std::uint32_t takes_high = __byte_perm(0x0000FF00U, 0, (codes >> 3U) & 0x1111U);
  return (low & ~takes_high) | (high & takes_high);
}

/// Two bf16 weights a word, from four bytes of signs and mantissas and four exponents.
__device__ uint2 join4(std::uint32_t bytes, std::uint32_t exponents) {
  const std::uint32_t high = (bytes & 0x80808080U) | ((exponents >> 1U) & 0x7F7F7F7FU);
  const std::uint32_t low = (bytes & 0x7F7F7F7FU) | ((exponents << 7U) & 0x80808080U);
  return {__byte_perm(low, high, 0x5140), __byte_perm(low, high, 0x7362)};
}

/// The escapes of one lane: how many, and the codes of the next ones.
class Escapes {
 public:
  /// Every lane of the warp comes here, with the number of escapes that it has.
  __device__ Escapes(const Tensor& tensor, std::uint64_t group, std::uint32_t count)
      : words_(section<std::uint32_t>(tensor, tensor.sections.escapes)) {
    const unsigned lane = threadIdx.x % kWarpLanes;
    std::uint32_t reached = count;
    for (unsigned step = 1; step < kWarpLanes; step *= 2) {
      const std::uint32_t before = __shfl_up_sync(kFullWarp, reached, step);
      reached += lane >= step ? before : 0;
    }
    const std::uint32_t total = __shfl_sync(kFullWarp, reached, kWarpLanes - 1);
    const auto* const offsets =
        section<std::uint32_t>(tensor, tensor.sections.escape_offsets) + group;
    const std::uint32_t begin = offsets[0];
    // Only if they all lie within the section.
    is_sound_ = begin <= tensor.num_escapes && total <= tensor.num_escapes - begin;
    next_ = begin + reached - count;
    if (is_sound_ && count > 0) {
      refill();
    }
  }

  __device__ bool is_sound() const { return is_sound_; }

  __device__ std::uint32_t take() {
    if (num_left_ == 0) {
      refill();
    }
    const std::uint32_t code = window_ & 7U;
    window_ >>= 3U;
    --num_left_;
    ++next_;
    return code;
  }

 private:
  __device__ void refill() {
    const std::uint64_t bit = std::uint64_t{3} * next_;
    const std::uint32_t* const at = words_ + bit / 32;
    window_ = __funnelshift_r(at[0], at[1], static_cast<std::uint32_t>(bit % 32));
    num_left_ = kEscapesPerWindow;
  }

  const std::uint32_t* words_;
  std::uint32_t next_ = 0;
  std::uint32_t window_ = 0;
  std::uint32_t num_left_ = 0;
  bool is_sound_ = false;
};

/// Writes 8 weights, as far as there are so many.
__device__ void store8(std::byte* at, const uint4& weights, std::uint64_t num_left) {
  if (num_left >= 8) {
    __stcs(reinterpret_cast<uint4*>(at), weights);
    return;
  }
  const std::uint32_t words[4] = {weights.x, weights.y, weights.z, weights.w};
  for (unsigned i = 0; i < 8; ++i) {
    if (i < num_left) {
      reinterpret_cast<std::uint16_t*>(at)[i] =
          static_cast<std::uint16_t>(words[i / 2] >> (16 * (i % 2)));
    }
  }
}

/// One group, by one warp. All its lanes come here.
template <Codec kCodec>
__device__ void decode_group(const Tensor& tensor, std::uint64_t group) {
  constexpr bool kHasEscapes = kCodec == Codec::kE33;
  const unsigned lane = threadIdx.x % kWarpLanes;
  const auto* const code_words = section<std::uint32_t>(tensor, tensor.sections.codes) +
                                 group * (kHasEscapes ? kE33WordsPerGroup : kGroupWeights / 8) +
                                 lane;
  const auto* const byte_pairs = section<uint2>(tensor, group * kGroupWeights) + lane;
  std::uint32_t codes[kQuarters];
  uint2 bytes[kQuarters];
#pragma unroll
  for (unsigned quarter = 0; quarter < (kHasEscapes ? 3 : kQuarters); ++quarter) {
    codes[quarter] = __ldcs(code_words + quarter * kWarpLanes);
  }
#pragma unroll
  for (unsigned quarter = 0; quarter < kQuarters; ++quarter) {
    bytes[quarter] = __ldcs(byte_pairs + quarter * kWarpLanes);
  }
  std::uint32_t count = 0;
  if constexpr (kHasEscapes) {
    codes[3] = last_quarter_of(codes[0], codes[1], codes[2]);
    count = static_cast<std::uint32_t>(__popc(escapes_in(codes[0]) | (escapes_in(codes[1]) << 1U) |
                                              (escapes_in(codes[2]) << 2U) |
                                              (escapes_in(codes[3]) << 3U)));
  }
  const auto exponents_of_quarter = [&](unsigned quarter) -> uint2 {
    if constexpr (kHasEscapes) {
      // The last of the eight stands for an escape: zero, until that is put in its place.
      const std::uint32_t high = tensor.palette[1] & 0x00FFFFFFU;
      const std::uint32_t indices = codes[quarter] & 0x77777777U;
      return {look_up8(tensor.palette[0], high, indices),
              look_up8(tensor.palette[0], high, indices >> 16U)};
    } else {
      return {look_up16(tensor.palette, codes[quarter]),
              look_up16(tensor.palette, codes[quarter] >> 16U)};
    }
  };
  const auto write = [&](unsigned quarter, uint2 exponents) {
    const std::uint64_t first = group * kGroupWeights + position_in_group(quarter, lane, 0);
    const std::uint64_t num_weights = tensor.size_bytes / 2;
    const uint2 low = join4(bytes[quarter].x, exponents.x);
    const uint2 high = join4(bytes[quarter].y, exponents.y);
    store8(tensor.place + 2 * first, {low.x, low.y, high.x, high.y},
           first < num_weights ? num_weights - first : 0);
  };
  if constexpr (kHasEscapes) {
    Escapes escapes(tensor, group, count);
#pragma unroll
    for (unsigned quarter = 0; quarter < kQuarters; ++quarter) {
      uint2 exponents = exponents_of_quarter(quarter);
      std::uint32_t left = escapes.is_sound() ? escapes_in(codes[quarter]) : 0;
      for (; left != 0; left &= left - 1) {
        const auto bit = static_cast<unsigned>(__ffs(static_cast<int>(left)) - 1);
        const std::uint32_t exponent =
            __byte_perm(tensor.palette[2], tensor.palette[3], escapes.take()) & 0xFFU;
        const std::uint32_t in_place = exponent << (2 * (bit % 16));
        exponents.x |= bit < 16 ? in_place : 0;
        exponents.y |= bit < 16 ? 0 : in_place;
      }
      write(quarter, exponents);
    }
  } else {
#pragma unroll
    for (unsigned quarter = 0; quarter < kQuarters; ++quarter) {
      write(quarter, exponents_of_quarter(quarter));
    }
  }
}

/// Writes the weights that no palette holds. All threads of the block come here.
__device__ void patch_tile(const Tensor& tensor, std::uint64_t tile) {
  const auto* const offsets = section<std::uint32_t>(tensor, tensor.sections.patch_offsets) + tile;
  const std::uint32_t begin = offsets[0];
  const std::uint32_t end = min(offsets[1], tensor.num_patches);
  if (begin >= end) {
    return;
  }
  __syncthreads();  // other threads have written these weights: theirs come first
  const std::uint64_t first = tile * kTileWeights;
  const std::uint64_t left = tensor.size_bytes / 2 - first;
  const auto* const patches = section<std::uint32_t>(tensor, tensor.sections.patches);
  auto* const weights = reinterpret_cast<std::uint16_t*>(tensor.place) + first;
  for (std::uint32_t patch = begin + threadIdx.x; patch < end; patch += kBlockThreads) {
    const std::uint32_t word = patches[patch];
    const std::uint32_t position = word & 0xFFFFU;
    if (position < kTileWeights && position < left) {
      weights[position] = static_cast<std::uint16_t>(word >> 16U);
    }
  }
}

__global__ void __launch_bounds__(kBlockThreads, kBlocksPerSm)
    decode_kernel(const __grid_constant__ DecodeLaunch launch) {
  Tensor tensor{};
  for (std::uint32_t tile = blockIdx.x; tile < launch.num_tiles; tile += gridDim.x) {
    if (tile < tensor.first_tile || tile >= tensor.end_tile) {
      tensor = find_tensor(launch, tile);
      if (tile >= tensor.end_tile) {
        continue;
      }
    }
    const std::uint64_t in_tensor = tile - tensor.first_tile;
    if (tensor.codec == Codec::kRaw) {
      copy_tile(tensor, in_tensor);
      continue;
    }
    const std::uint64_t group = in_tensor * kGroupsPerTile + threadIdx.x / kWarpLanes;
    if (group < num_groups_of(tensor.size_bytes / 2)) {
      if (tensor.codec == Codec::kE33) {
        decode_group<Codec::kE33>(tensor, group);
      } else {
        decode_group<Codec::kE4p>(tensor, group);
      }
    }
    patch_tile(tensor, in_tensor);
  }
}

}  // namespace

cudaError_t launch_decode(cudaStream_t stream, const DecodeLaunch& launch) {
  if (launch.num_tiles == 0 || launch.blob_bytes < sizeof(BlobHeader)) {
    return cudaSuccess;
  }
  std::uint32_t num_blocks = launch.max_blocks;
  if (num_blocks == 0) {
    int device = 0;
    int num_sms = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
    }
    if (error != cudaSuccess) {
      return error;
    }
    num_blocks = static_cast<std::uint32_t>(num_sms) * kBlocksPerSm;
  }
  num_blocks = num_blocks < launch.num_tiles ? num_blocks : launch.num_tiles;
  decode_kernel<<<num_blocks, kBlockThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

}  // namespace torch_offload
