#include "params/exponent_counts.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <cstddef>
#include <string>

#include "codec/exponents.h"
#include "codec/parallel.h"
#include "core/error.h"

namespace torch_offload {

namespace {

std::uint64_t num_pieces_of(std::uint64_t num_weights) {
  return (num_weights + kCountedWeights - 1) / kCountedWeights;
}

}  // namespace

at::Tensor count_exponents(const at::Tensor& weights) {
  if (weights.scalar_type() != at::kBFloat16 || !weights.is_contiguous() || !weights.is_cpu()) {
    throw TypeError(std::string("expected a contiguous bfloat16 tensor on the CPU to count, got ") +
                    c10::toString(weights.scalar_type()) + " on " + weights.device().str());
  }
  const auto num_weights = static_cast<std::uint64_t>(weights.numel());
  const std::uint64_t num_pieces = num_pieces_of(num_weights);
  at::Tensor counts =
      at::zeros({static_cast<std::int64_t>(num_pieces), std::int64_t{kNumExponents}}, at::kInt);
  const auto* const bytes = static_cast<const std::byte*>(weights.const_data_ptr());
  auto* const rows = static_cast<ExponentCounts*>(counts.mutable_data_ptr());
  parallel_for(num_pieces, default_num_threads(), [&](std::size_t piece) {
    const std::uint64_t first = piece * kCountedWeights;
    count_exponents(bytes + 2 * first, std::min(kCountedWeights, num_weights - first), rows[piece]);
  });
  return counts;
}

const ExponentCounts* counts_in(const at::Tensor& counts, std::uint64_t size_bytes) {
  const auto num_pieces = static_cast<std::int64_t>(num_pieces_of(size_bytes / 2));
  if (counts.scalar_type() != at::kInt || !counts.is_contiguous() || !counts.is_cpu() ||
      counts.dim() != 2 || counts.size(0) != num_pieces || counts.size(1) != kNumExponents) {
    throw ValueError("expected counts of " + std::to_string(size_bytes) +
                     " bytes of weights as a contiguous int32 tensor of shape (" +
                     std::to_string(num_pieces) + ", " + std::to_string(kNumExponents) +
                     ") on the CPU, got another; use torch_offload.exponents.count_exponents");
  }
  return static_cast<const ExponentCounts*>(counts.const_data_ptr());
}

}  // namespace torch_offload
