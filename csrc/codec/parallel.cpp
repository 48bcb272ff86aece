#include "codec/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace torch_offload {

namespace {

/// More only wait for memory.
constexpr unsigned kMostThreads = 32;

}  // namespace

void parallel_for(std::size_t count, unsigned num_threads,
                  const std::function<void(std::size_t)>& work) {
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;  // guarded by mutex
  const auto run = [&] {
    try {
      for (std::size_t index = next++; index < count; index = next++) {
        work(index);
      }
    } catch (...) {
      next = count;
      const std::lock_guard<std::mutex> lock(mutex);
      if (failure == nullptr) {
        failure = std::current_exception();
      }
    }
  };
  std::vector<std::thread> helpers;
  const std::size_t num_helpers = std::min<std::size_t>(std::max(num_threads, 1U), count);
  helpers.reserve(num_helpers);
  try {
    while (helpers.size() + 1 < num_helpers) {
      helpers.emplace_back(run);
    }
  } catch (const std::system_error&) {
    // Slower, not broken.
  }
  run();
  for (std::thread& helper : helpers) {
    helper.join();
  }
  if (failure != nullptr) {
    std::rethrow_exception(failure);
  }
}

unsigned default_num_threads() {
  return std::clamp(std::thread::hardware_concurrency(), 1U, kMostThreads);
}

}  // namespace torch_offload
