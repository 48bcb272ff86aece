#pragma once

#include <cstdint>

namespace torch_offload {

/// What the pipeline did since it was made. Plain counts, never reset.
struct Stats {
  std::uint64_t forwards = 0;      ///< Passes that were completed.
  std::uint64_t onloads = 0;       ///< Copies of a whole unit into its place.
  std::uint64_t prefetched = 0;    ///< Onloads issued before the unit was asked for.
  std::uint64_t misses = 0;        ///< Units asked for that nobody had prefetched.
  std::uint64_t hits = 0;          ///< Units asked for that were still whole in their place.
  std::uint64_t extra_places = 0;  ///< Nested misses that needed a place of their own.
  std::uint64_t bytes_onloaded = 0;
};

}  // namespace torch_offload
