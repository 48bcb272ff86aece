#pragma once

#include <cstddef>
#include <functional>

namespace torch_offload {

/// Calls `work(index)` for every index below `count`, on as many threads as are given (the calling
/// one among them), and returns when all is done.
///
/// Blocking:  until then.
/// Throws:    what the first failed call has thrown; calls not begun by then are left out. Where
///            the process may have no more threads, those there are do it all.
void parallel_for(std::size_t count, unsigned num_threads,
                  const std::function<void(std::size_t)>& work);

/// As many threads as this machine runs at once, and no more than pay for work that waits for
/// memory.
unsigned default_num_threads();

}  // namespace torch_offload
