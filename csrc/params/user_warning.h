#pragma once

#include <torch/csrc/utils/pybind.h>

#include <string>

namespace torch_offload {

/// Warns the user in Python, at his own line: user_warning.py finds it, and says who warns.
///
/// It is imported, where other callables of Python are handed in: there is one for all engines, and
/// the pipeline's option is a plain function.
///
/// Threads: takes the GIL. Throws: what a filter of warnings makes of it.
inline void warn_user(const std::string& text, PyObject* category) {
  const pybind11::gil_scoped_acquire gil;
  pybind11::module_::import("torch_offload.user_warning")
      .attr("warn_user")(text, pybind11::handle(category));
}

}  // namespace torch_offload
