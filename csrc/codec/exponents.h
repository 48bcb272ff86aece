#pragma once

#include <cstddef>
#include <cstdint>

#include "codec/group.h"

namespace torch_offload {

/// Adds the exponents of `num_weights` weights, fewer than 2^32 in all, which need not be aligned.
void count_exponents(const std::byte* weights, std::uint64_t num_weights, ExponentCounts& counts);

}  // namespace torch_offload
