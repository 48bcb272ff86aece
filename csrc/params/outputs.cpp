#include "params/outputs.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string>

#include "core/error.h"
#include "params/streamed_parameter.h"

namespace py = pybind11;

namespace torch_offload {

namespace {

/// Whether a tuple's items are these very objects.
bool holds_just(const py::object& tuple, const py::list& items) {
  if (!PyTuple_Check(tuple.ptr()) ||
      static_cast<std::size_t>(PyTuple_GET_SIZE(tuple.ptr())) != items.size()) {
    return false;
  }
  for (std::size_t index = 0; index < items.size(); ++index) {
    if (PyTuple_GET_ITEM(tuple.ptr(), static_cast<Py_ssize_t>(index)) !=
        PyList_GET_ITEM(items.ptr(), static_cast<Py_ssize_t>(index))) {
      return false;
    }
  }
  return true;
}

}  // namespace

py::object OutputGuard::walk(const py::handle& output, std::size_t depth) {
  if (THPVariable_Check(output.ptr())) {
    const at::Tensor& tensor = THPVariable_Unpack(output.ptr());
    has_graph_ = has_graph_ || (tensor.requires_grad() && !tensor.is_leaf());
    // Where it lies, whether or not it may still be read: if not, the clone says why.
    if (tensor.has_storage() && pipeline_.owns(storage_address(tensor))) {
      return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor.clone()));
    }
    return py::reinterpret_borrow<py::object>(output);
  }
  const bool is_container =
      PyTuple_Check(output.ptr()) || PyList_Check(output.ptr()) || PyDict_Check(output.ptr());
  if (!is_container || depth == kMaxDepth) {
    return py::reinterpret_borrow<py::object>(output);
  }
  const auto seen = seen_.find(output.ptr());
  return seen != seen_.end() ? seen->second.second : walk_into(output, depth + 1);
}

py::object OutputGuard::walk_into(const py::handle& output, std::size_t depth) {
  auto container = py::reinterpret_borrow<py::object>(output);
  if (PyTuple_Check(output.ptr())) {
    py::object outside = walk_tuple(py::reinterpret_borrow<py::tuple>(output), depth);
    seen_.emplace(output.ptr(), std::make_pair(container, outside));
    return outside;
  }
  // These are changed in place, so that one that contains itself is known before it is met again.
  seen_.emplace(output.ptr(), std::make_pair(container, container));
  if (PyList_Check(output.ptr())) {
    const auto list = py::reinterpret_borrow<py::list>(output);
    std::size_t index = 0;
    for (const py::handle item : list) {
      const py::object outside = walk(item, depth);
      if (!outside.is(item)) {
        list[index] = outside;
      }
      ++index;
    }
    return container;
  }
  py::dict changed;
  for (const auto& [key, value] : py::reinterpret_borrow<py::dict>(output)) {
    py::object outside = walk(value, depth);
    if (!outside.is(value)) {
      changed[key] = outside;
    }
  }
  for (const auto& [key, value] : changed) {
    output.attr("__setitem__")(key, value);
  }
  return container;
}

py::object OutputGuard::walk_tuple(const py::tuple& output, std::size_t depth) {
  py::list items;
  bool is_changed = false;
  for (const py::handle item : output) {
    py::object outside = walk(item, depth);
    is_changed = is_changed || !outside.is(item);
    items.append(std::move(outside));
  }
  if (!is_changed) {
    return output;
  }
  return PyTuple_CheckExact(output.ptr()) ? py::object(py::tuple(items)) : made_anew(output, items);
}

/// A tuple of the same class with other items: as a namedtuple makes one, or as tuple itself does.
py::object OutputGuard::made_anew(const py::tuple& output, const py::list& items) const {
  const auto type = py::type::of(output);
  std::string reason = "its class makes another tuple of them";
  try {
    py::object made = py::hasattr(type, "_make") ? type.attr("_make")(items) : type(items);
    if (py::type::of(made).is(type) && holds_just(made, items)) {
      if (py::hasattr(output, "__dict__") && py::hasattr(made, "__dict__")) {
        made.attr("__dict__").attr("update")(output.attr("__dict__"));
      }
      return made;
    }
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) {
      throw;  // an interrupt
    }
    reason = error.what();
  }
  const std::string& unit = pipeline_.plan().units[unit_].name;
  throw StateError("expected unit '" + unit +
                   "' to return no view of its streamed weights in a tuple that cannot be made "
                   "anew, got one in a '" +
                   type.attr("__name__").cast<std::string>() +
                   "', which does not take its items as tuple does: " + reason +
                   "; return a clone of the view, or keep the weights on the device with "
                   "resident=['" +
                   unit + "']");
}

}  // namespace torch_offload
