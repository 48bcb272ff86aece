#pragma once

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <exception>
#include <string>

namespace torch_offload {

/// Python's own error, put aside in its scope and put back at the end.
///
/// An operator that fails in Python (a dispatch mode, an interrupt) leaves it set while the C++
/// exception is on its way. Whatever undoes things meanwhile may call Python, which takes an error
/// that is set for its own. Needs the GIL.
using PythonErrorAside = pybind11::error_scope;

/// What a caught exception says; what Python has raised is told of by its class as well, and is
/// fetched by that. Needs the GIL.
inline std::string words_of(std::exception& error) {
  auto* const of_python = dynamic_cast<python_error*>(&error);
  if (of_python == nullptr) {
    return error.what();
  }
  of_python->persist();
  std::string words = reinterpret_cast<PyTypeObject*>(of_python->type)->tp_name;
  return *of_python->what() == '\0' ? words : words + ": " + of_python->what();
}

}  // namespace torch_offload
