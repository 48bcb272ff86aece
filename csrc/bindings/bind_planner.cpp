#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bind.h"
#include "planner/planner.h"

namespace py = pybind11;

namespace torch_offload {

namespace {

PlannerRequest request_from(
    std::vector<Unit> units,
    const std::vector<std::pair<std::vector<std::int64_t>, double>>& forwards,
    double link_bytes_per_second, std::int64_t copy_latency_ns,
    std::optional<std::vector<std::int64_t>> copy_ns, std::vector<std::int64_t> launch_ns,
    std::vector<UnitIndex> sequence, std::optional<std::size_t> depth_bytes,
    const std::string& transport, std::vector<std::size_t> packed_bytes,
    double decode_bytes_per_second, const std::string& mode, const std::string& streams) {
  PlannerRequest request;
  request.units = std::move(units);
  for (const auto& [compute_ns, weight] : forwards) {
    request.forwards.push_back({compute_ns, weight});
  }
  request.link_bytes_per_second = link_bytes_per_second;
  request.copy_latency_ns = copy_latency_ns;
  request.copy_ns = std::move(copy_ns);
  request.launch_ns = std::move(launch_ns);
  request.sequence = std::move(sequence);
  request.depth_bytes = depth_bytes;
  request.packing = parse_packing_policy(transport);
  request.packed_bytes = std::move(packed_bytes);
  request.decode_bytes_per_second = decode_bytes_per_second;
  request.options.mode = parse_mode(mode);
  request.options.layout = parse_stream_layout(streams);
  return request;
}

}  // namespace

void bind_planner(py::module_& module) {
  py::class_<Alternative>(module, "Alternative", "The best plan by one rule.")
      .def_readonly("rule", &Alternative::rule)
      .def_readonly("window_bytes", &Alternative::window_bytes)
      .def_readonly("resident_bytes", &Alternative::resident_bytes)
      .def_readonly("score_ns", &Alternative::score_ns);

  py::class_<Choice>(module, "Choice", "A plan, why it was chosen, and what it takes.")
      .def_readonly("plan", &Choice::plan)
      .def_readonly("rule", &Choice::rule)
      .def_readonly("forward_ns", &Choice::forward_ns)
      .def_readonly("score_ns", &Choice::score_ns)
      .def_readonly("alternatives", &Choice::alternatives)
      .def_readonly("gap", &Choice::gap)
      .def_readonly("raw_score_ns", &Choice::raw_score_ns)
      .def_readonly("packed_resident_bytes", &Choice::packed_resident_bytes)
      .def_readonly("staging_bytes", &Choice::staging_bytes);

  py::class_<PlannerRequest>(module, "PlannerRequest", "What a plan is to be chosen for.")
      .def(py::init(&request_from), py::arg("units"), py::kw_only(), py::arg("forwards"),
           py::arg("link_bytes_per_second"), py::arg("copy_latency_ns") = 0,
           py::arg("copy_ns") = py::none(), py::arg("launch_ns") = std::vector<std::int64_t>{},
           py::arg("sequence") = std::vector<UnitIndex>{}, py::arg("depth_bytes") = py::none(),
           py::arg("transport") = "raw", py::arg("packed_bytes") = std::vector<std::size_t>{},
           py::arg("decode_bytes_per_second") = 0.0, py::arg("mode") = "pipeline",
           py::arg("streams") = "shared");

  module.def(
      "choose_plan", &choose_plan, py::arg("request"), py::arg("budget_bytes"),
      py::call_guard<py::gil_scoped_release>(),
      "Chooses residents, what is packed, depth and places by running candidates in virtual time. "
      "Pure.");
  module.def("choose_transports", &choose_transports, py::arg("request"), py::arg("plan"),
             py::call_guard<py::gil_scoped_release>(),
             "Chooses only what is packed of the units that have places in a plan. Pure.");
  module.def(
      "least_budget_bytes",
      [](std::vector<Unit> units, const std::string& transport,
         std::vector<std::size_t> packed_bytes) {
        PlannerRequest request;
        request.units = std::move(units);
        request.packing = parse_packing_policy(transport);
        request.packed_bytes = std::move(packed_bytes);
        return least_budget_bytes(request);
      },
      py::arg("units"), py::arg("transport") = "raw",
      py::arg("packed_bytes") = std::vector<std::size_t>{},
      "The least budget_bytes that choose_plan accepts for these units.");
}

}  // namespace torch_offload
