#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bind.h"
#include "sim/simulate.h"

namespace py = pybind11;

namespace torch_offload {

namespace {

SimCosts costs_from(std::optional<double> copy_bytes_per_second, std::int64_t copy_latency_ns,
                    std::optional<std::vector<std::int64_t>> copy_ns,
                    std::vector<std::int64_t> compute_ns, std::vector<std::int64_t> launch_ns,
                    const std::map<std::string, std::int64_t>& call_ns, int num_copy_engines,
                    bool shared_compute, std::optional<double> decode_bytes_per_second) {
  SimCosts costs;
  costs.copy_bytes_per_second = copy_bytes_per_second;
  costs.copy_latency_ns = copy_latency_ns;
  costs.copy_ns = std::move(copy_ns);
  costs.compute_ns = std::move(compute_ns);
  costs.launch_ns = std::move(launch_ns);
  for (const auto& [name, cost_ns] : call_ns) {
    call_cost(costs.calls, name) = cost_ns;
  }
  costs.num_copy_engines = num_copy_engines;
  costs.shared_compute = shared_compute;
  costs.decode_bytes_per_second = decode_bytes_per_second;
  check_costs(costs);
  return costs;
}

}  // namespace

void bind_sim(py::module_& module) {
  py::class_<SimCosts>(module, "SimCosts", "What work and calls take in virtual time.")
      .def(py::init(&costs_from), py::kw_only(), py::arg("copy_bytes_per_second") = py::none(),
           py::arg("copy_latency_ns") = 0, py::arg("copy_ns") = py::none(), py::arg("compute_ns"),
           py::arg("launch_ns") = std::vector<std::int64_t>{}, py::arg("call_ns") = py::dict(),
           py::arg("num_copy_engines") = 1, py::arg("shared_compute") = true,
           py::arg("decode_bytes_per_second") = py::none());

  py::class_<SimResult, std::shared_ptr<SimResult>>(module, "SimResult",
                                                    "What happened when in a simulation.")
      .def_property_readonly("log",
                             [](const std::shared_ptr<SimResult>& result) {
                               return std::shared_ptr<OpLog>(result, &result->log);
                             })
      .def_readonly("stats", &SimResult::stats)
      .def_readonly("counters", &SimResult::counters)
      .def_readonly("pass_begin_ns", &SimResult::pass_begin_ns)
      .def_readonly("pass_end_ns", &SimResult::pass_end_ns)
      .def_readonly("host_end_ns", &SimResult::host_end_ns)
      .def_readonly("host_blocked_ns", &SimResult::host_blocked_ns)
      .def_readonly("elapsed_ns", &SimResult::elapsed_ns);

  module.def(
      "simulate",
      [](Plan plan, const std::string& mode, const std::string& streams, SimCosts costs,
         std::vector<std::vector<UnitIndex>> passes, bool log, bool synchronize_passes,
         std::vector<std::size_t> packed_bytes) {
        const py::gil_scoped_release no_gil;
        SimRequest request;
        request.plan = std::move(plan);
        request.options.mode = parse_mode(mode);
        request.options.layout = parse_stream_layout(streams);
        request.costs = std::move(costs);
        request.passes = std::move(passes);
        request.keep_log = log;
        request.synchronize_passes = synchronize_passes;
        request.packed_bytes = std::move(packed_bytes);
        return std::make_shared<SimResult>(simulate(request));
      },
      py::arg("plan"), py::arg("mode"), py::arg("streams"), py::arg("costs"), py::arg("passes"),
      py::arg("log") = true, py::arg("synchronize_passes") = false,
      py::arg("packed_bytes") = std::vector<std::size_t>{},
      "Drives the pipeline through the passes in virtual time. The same arguments, the same "
      "result.");
}

}  // namespace torch_offload
