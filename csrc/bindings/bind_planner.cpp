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
      .def_readonly("num_simulated", &Choice::num_simulated);

  module.def(
      "choose_plan",
      [](std::vector<Unit> units,
         const std::vector<std::pair<std::vector<std::int64_t>, double>>& forwards,
         double link_bytes_per_second, std::int64_t copy_latency_ns,
         std::optional<std::vector<std::int64_t>> copy_ns, std::vector<UnitIndex> sequence,
         std::optional<std::size_t> budget_bytes, std::optional<std::size_t> depth_bytes,
         const std::string& mode, const std::string& streams) {
        const py::gil_scoped_release no_gil;
        PlannerRequest request;
        request.units = std::move(units);
        for (const auto& [compute_ns, weight] : forwards) {
          request.forwards.push_back({compute_ns, weight});
        }
        request.link_bytes_per_second = link_bytes_per_second;
        request.copy_latency_ns = copy_latency_ns;
        request.copy_ns = std::move(copy_ns);
        request.sequence = std::move(sequence);
        request.budget_bytes = budget_bytes;
        request.depth_bytes = depth_bytes;
        request.options.mode = parse_mode(mode);
        request.options.layout = parse_stream_layout(streams);
        return choose_plan(request);
      },
      py::arg("units"), py::kw_only(), py::arg("forwards"), py::arg("link_bytes_per_second"),
      py::arg("copy_latency_ns") = 0, py::arg("copy_ns") = py::none(),
      py::arg("sequence") = std::vector<UnitIndex>{}, py::arg("budget_bytes") = py::none(),
      py::arg("depth_bytes") = py::none(), py::arg("mode") = "pipeline",
      py::arg("streams") = "shared",
      "Chooses residents, depth and places by running candidates in virtual time. Pure.");
  module.def("least_budget_bytes", &least_budget_bytes, py::arg("units"),
             "The least budget_bytes that choose_plan accepts for these units.");
}

}  // namespace torch_offload
