#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <utility>

#include "bindings/bind.h"
#include "core/op_log.h"

namespace py = pybind11;

namespace torch_offload {

namespace {

/// A property that is None where the field does not apply.
template <typename T>
auto optional_field(T Op::* field, T none) {
  return [field, none](const Op& op) {
    return op.*field == none ? std::optional<T>() : std::optional<T>(op.*field);
  };
}

auto range_field(AddressRange Op::* field) {
  return [field](const Op& op) { return std::pair((op.*field).begin, (op.*field).end); };
}

}  // namespace

void bind_op_log(py::module_& module) {
  py::class_<Op>(module, "Op", "One call to a device, and when the device carried it out.")
      .def_property_readonly("kind", [](const Op& op) { return name_of(op.kind); })
      .def_property_readonly("stream", optional_field(&Op::stream, kNoStream))
      .def_property_readonly("event", optional_field(&Op::event, kNoEvent))
      .def_property_readonly("unit", optional_field(&Op::unit, kNoUnit))
      .def_readonly("is_done", &Op::is_done)
      .def_readonly("generation", &Op::generation)
      .def_property_readonly("memory", range_field(&Op::memory))
      .def_property_readonly("source", range_field(&Op::source))
      .def_readonly("host_time_ns", &Op::host_time_ns)
      .def_property_readonly("begin_ns", optional_field(&Op::begin_ns, kUnknownTime))
      .def_property_readonly("end_ns", optional_field(&Op::end_ns, kUnknownTime));

  py::class_<OpLog, std::shared_ptr<OpLog>>(module, "OpLog", "What was submitted to one device.")
      .def(py::init<>())
      .def("__len__", [](const OpLog& log) { return log.ops().size(); })
      .def("clear", &OpLog::clear)
      .def_property_readonly("ops", &OpLog::ops)
      .def_property_readonly("stream_names", &OpLog::stream_names)
      .def_property_readonly("unit_names", &OpLog::unit_names)
      .def_property_readonly("has_times", &OpLog::has_times);
}

}  // namespace torch_offload
