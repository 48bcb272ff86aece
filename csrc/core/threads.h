#pragma once

#include <algorithm>
#include <cstddef>
#include <exception>
#include <thread>
#include <vector>

namespace torch_offload {

/// Calls `run()` on `num_threads` threads at once, of which the calling one is the first, or on as
/// many as this process may have. `run` shares the work out itself and never throws.
///
/// Blocking:  until every call has returned; no thread outlives it.
template <typename Run>
void run_by_threads(std::size_t num_threads, const Run& run) {
  const std::size_t num_helpers = std::max<std::size_t>(num_threads, 1) - 1;
  std::vector<std::thread> helpers;
  helpers.reserve(num_helpers);
  bool may_have_more = true;
  while (may_have_more && helpers.size() < num_helpers) {
    try {
      helpers.emplace_back(run);
    } catch (const std::exception&) {
      may_have_more = false;  // slower, not broken: those there are do it all
    }
  }
  run();
  for (std::thread& helper : helpers) {
    helper.join();
  }
}

}  // namespace torch_offload
