#pragma once

#include <torch/csrc/utils/pybind.h>

#include <cstddef>
#include <unordered_map>
#include <utility>

#include "core/pipeline.h"

namespace torch_offload {

/// What a unit returns, kept from the units that run after it.
///
/// Threads: for one call of a unit; every call needs the GIL.
class OutputGuard {
 public:
  OutputGuard(const Pipeline& pipeline, UnitIndex unit) : pipeline_(pipeline), unit_(unit) {}

  /// The same output, tensors whose storage lies in the window replaced by clones: the next unit
  /// would overwrite them. Looks into tuples, lists and dicts, each once however often it is met,
  /// down to kMaxDepth: what lies deeper is not cloned, and is an error to keep as any other view.
  ///
  /// Throws: StateError for a tuple that has to be made anew and cannot be.
  pybind11::object outside_window(const pybind11::handle& output) { return walk(output, 0); }
  /// Whether autograd's graph hangs on a tensor that was seen.
  bool has_graph() const { return has_graph_; }

 private:
  static constexpr std::size_t kMaxDepth = 200;

  pybind11::object walk(const pybind11::handle& output, std::size_t depth);
  pybind11::object walk_into(const pybind11::handle& output, std::size_t depth);
  pybind11::object walk_tuple(const pybind11::tuple& output, std::size_t depth);
  pybind11::object made_anew(const pybind11::tuple& output, const pybind11::list& items) const;

  const Pipeline& pipeline_;
  UnitIndex unit_;
  bool has_graph_ = false;
  // What each container has become, by its address; it is kept alive, so that no other gets that.
  std::unordered_map<PyObject*, std::pair<pybind11::object, pybind11::object>> seen_;
};

}  // namespace torch_offload
