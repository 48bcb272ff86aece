#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "codec/encoder.h"

namespace torch_offload {

/// What packing a tensor comes to, known before anything is packed: how often each exponent occurs
/// in every kCountedWeights of it, as int32 of shape (pieces, 256).
///
/// Python counts weights that are not on the CPU, in the same pieces (exponents.py).

/// Counts a bfloat16 tensor on the CPU. Blocks until all of it is read, on all cores.
/// Throws: TypeError unless it is contiguous, of bfloat16, and on the CPU.
at::Tensor count_exponents(const at::Tensor& weights);

/// The counts of a tensor of so many bytes. They live as long as `counts`.
/// Throws: ValueError if they are not.
const ExponentCounts* counts_in(const at::Tensor& counts, std::uint64_t size_bytes);

}  // namespace torch_offload
