#include "codec/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace torch_offload {

namespace {

/// More only wait for memory.
constexpr unsigned kMostThreads = 32;

/// Starts `count` threads, or as many as this process may have: slower then, not broken.
std::vector<std::thread> start_threads(std::size_t count, const std::function<void()>& run) {
  std::vector<std::thread> threads;
  threads.reserve(count);
  try {
    while (threads.size() < count) {
      threads.emplace_back(run);
    }
  } catch (const std::exception&) {
    return threads;
  }
  return threads;
}

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
  const std::size_t num_runs = std::min<std::size_t>(std::max(num_threads, 1U), count);
  std::vector<std::thread> helpers = start_threads(num_runs > 0 ? num_runs - 1 : 0, run);
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
