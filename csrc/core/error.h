#pragma once

#include <stdexcept>
#include <string>

namespace torch_offload {

/// The user's mistakes. The bindings translate each type to the Python class of the same name.
///
/// Wording is not API, the type is. A message says what was expected, what came, what to do.
class ValueError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

class TypeError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

class IndexError : public std::out_of_range {
 public:
  using std::out_of_range::out_of_range;
};

class NotImplementedError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

/// The call was right but the state was not: a second thread, a closed handle, an edited weight.
class StateError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Host or device memory that is not there. Python: MemoryError.
class MemoryError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Our own mistake. Python: RuntimeError; never expected to be seen.
class InternalError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

/// Throws InternalError unless `condition` holds. For invariants, not for the user's input.
inline void check_internal(bool condition, const char* what) {
  if (!condition) {
    throw InternalError(std::string("torch_offload: internal error: ") + what);
  }
}

}  // namespace torch_offload
