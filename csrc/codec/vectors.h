#pragma once

#include <atomic>

// Note [Two compilations]
// The loops of encoder and counting are plain C++, which the compiler makes vectors of. Those of
// every x86-64 processor have 16 bytes; nearly all of these processors have 32 by now. So the loops
// are compiled twice, as functions that everything is inlined into, and the processor is asked
// which to call. Both write the same bytes.

#if defined(__x86_64__) && defined(__GNUC__)
#define TORCH_OFFLOAD_WIDE __attribute__((target("avx2")))
#else
#define TORCH_OFFLOAD_WIDE
#endif

/// Into a function of either compilation.
#define TORCH_OFFLOAD_INLINE inline __attribute__((always_inline))

namespace torch_offload {

/// Tests turn this off, to compare.
inline std::atomic<bool> wide_vectors_wanted{true};

/// Whether functions that are TORCH_OFFLOAD_WIDE run here.
inline bool has_wide_vectors() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool has = __builtin_cpu_supports("avx2") != 0;
  return has && wide_vectors_wanted.load(std::memory_order_relaxed);
#else
  return false;
#endif
}

}  // namespace torch_offload
