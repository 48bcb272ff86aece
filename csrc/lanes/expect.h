#pragma once

#include <stdexcept>
#include <string>

namespace torch_offload {

/// Ends a schedule as bad where something is not as the pipeline promises.
inline void expect(bool is_so, const char* what) {
  if (!is_so) {
    throw std::logic_error(std::string("expected ") + what);
  }
}

}  // namespace torch_offload
