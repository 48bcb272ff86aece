#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "bindings/bind.h"
#include "bindings/make_device.h"
#include "core/error.h"
#include "lanes/device_failure.h"
#include "lanes/device_fault.h"
#include "lanes/exhaustive_lane.h"
#include "lanes/failing_device.h"
#include "lanes/faulty_device.h"
#include "lanes/linearisation_lane.h"
#include "lanes/mutant_lane.h"
#include "lanes/random_lane.h"
#ifdef TORCH_OFFLOAD_WITH_CUDA
#include "cuda/cuda_device.h"
#endif

namespace py = pybind11;

namespace torch_offload {

namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

std::unique_ptr<ExhaustiveLane> make_exhaustive_lane(const std::string& mode,
                                                     const std::string& streams, unsigned max_units,
                                                     unsigned max_places, unsigned max_calls,
                                                     bool merges, unsigned num_threads,
                                                     bool is_control,
                                                     const std::vector<std::string>& transports) {
  // Above these the counts no longer fit 64 bits, or memory.
  if (max_units == 0 || max_units > 6 || max_places == 0 || max_calls > 6 || transports.empty()) {
    throw ValueError(
        "expected up to 6 units and calls, and at least one unit, place and transport, got " +
        std::to_string(max_units) + " units, " + std::to_string(max_places) + " places, " +
        std::to_string(max_calls) + " calls");
  }
  ExhaustiveOptions options;
  options.mode = parse_mode(mode);
  options.layout = parse_stream_layout(streams);
  options.max_units = max_units;
  options.max_places = max_places;
  options.max_calls = max_calls;
  options.merges = merges;
  options.num_threads = num_threads;
  options.is_control = is_control;
  options.transports.clear();
  for (const std::string& name : transports) {
    options.transports.push_back(parse_transport(name));
  }
  return std::make_unique<ExhaustiveLane>(options);
}

std::shared_ptr<Device> make_faulty_device(const at::Device& device,
                                           const std::shared_ptr<DeviceFault>& fault,
                                           std::uint32_t seed, std::int64_t longest_delay_us) {
  if (device.is_cpu()) {
    return make_device<LateHostDevice>(fault, seed, std::chrono::microseconds(longest_delay_us));
  }
#ifdef TORCH_OFFLOAD_WITH_CUDA
  if (device.is_cuda()) {
    return make_device<FaultyDevice<CudaDevice>>(fault, static_cast<int>(device.index()));
  }
#endif
  throw ValueError("expected a device of this build, got '" + device.str() + "'");
}

std::shared_ptr<Device> make_failing_device(const at::Device& device,
                                            const std::shared_ptr<DeviceFailure>& failure) {
  if (device.is_cpu()) {
    return make_device<FailingDevice<HostDevice>>(failure);
  }
#ifdef TORCH_OFFLOAD_WITH_CUDA
  if (device.is_cuda()) {
    return make_device<FailingDevice<CudaDevice>>(failure, static_cast<int>(device.index()));
  }
#endif
  throw ValueError("expected a device of this build, got '" + device.str() + "'");
}

}  // namespace

void bind_lanes(py::module_& module) {
  py::class_<LaneReport>(module, "LaneReport", "What a lane of schedules has tried.")
      .def_readonly("num_schedules", &LaneReport::num_schedules)
      .def_readonly("num_distinct", &LaneReport::num_distinct)
      .def_readonly("num_ops", &LaneReport::num_ops)
      .def_readonly("num_runs", &LaneReport::num_runs)
      .def_readonly("num_states", &LaneReport::num_states)
      .def_readonly("digest", &LaneReport::digest)
      .def_readonly("num_bad", &LaneReport::num_bad)
      .def_readonly("examples", &LaneReport::examples);

  py::class_<RandomLane>(module, "RandomLane", "Random schedules of the real pipeline.")
      .def(py::init<unsigned, bool>(), py::kw_only(), py::arg("num_threads") = 1,
           py::arg("is_control") = false)
      .def("advance", &RandomLane::advance, py::arg("num_schedules"), NoGil())
      .def("report", &RandomLane::report, NoGil());
  module.def(
      "random_schedule",
      [](std::uint64_t seed, bool leaves_out_waits) {
        OpLog log = random_schedule(seed);
        return std::make_shared<OpLog>(leaves_out_waits ? without_waits(log) : std::move(log));
      },
      py::arg("seed"), py::kw_only(), py::arg("leaves_out_waits") = false, NoGil());

  py::class_<ExhaustiveLane>(module, "ExhaustiveLane", "All small schedules, by number.")
      .def(py::init(&make_exhaustive_lane), py::kw_only(), py::arg("mode"), py::arg("streams"),
           py::arg("max_units") = 5, py::arg("max_places") = 3, py::arg("max_calls") = 5,
           py::arg("merges") = true, py::arg("num_threads") = 1, py::arg("is_control") = false,
           py::arg("transports") = std::vector<std::string>{"raw"})
      .def("count", &ExhaustiveLane::count)
      .def("advance", &ExhaustiveLane::advance, py::arg("num_schedules"), NoGil())
      .def("report", &ExhaustiveLane::report, NoGil());

  py::class_<LinearisationReport>(module, "LinearisationReport", "The checker and brute force.")
      .def_readonly("num_orders", &LinearisationReport::num_orders)
      .def_readonly("num_logs", &LinearisationReport::num_logs)
      .def_readonly("num_clean", &LinearisationReport::num_clean)
      .def_readonly("num_unordered", &LinearisationReport::num_unordered)
      .def_readonly("num_stale", &LinearisationReport::num_stale)
      .def_readonly("num_too_large", &LinearisationReport::num_too_large)
      .def_readonly("num_disagreements", &LinearisationReport::num_disagreements)
      .def_readonly("examples", &LinearisationReport::examples);
  py::class_<LinearisationLane>(module, "LinearisationLane", "All orders of small logs.")
      .def(py::init<bool>(), py::kw_only(), py::arg("is_control") = false)
      .def("advance", &LinearisationLane::advance, py::arg("num_orders"), NoGil())
      .def("report", &LinearisationLane::report);

  py::class_<MutantOutcome>(module, "MutantOutcome", "A run with one step left out, or moved.")
      .def_readonly("step", &MutantOutcome::step)
      .def_readonly("is_reached", &MutantOutcome::is_reached)
      .def_readonly("num_wrong", &MutantOutcome::num_wrong)
      .def_readonly("findings", &MutantOutcome::findings);
  module.def("num_mutants", &num_mutants);
  module.def("run_mutant", &run_mutant, py::arg("index"), py::kw_only(), py::arg("is_mutated"),
             NoGil());

  py::class_<DeviceFault, std::shared_ptr<DeviceFault>>(module, "DeviceFault",
                                                        "A planted fault of a device.")
      .def(py::init([](const std::string& kind) {
             return std::make_shared<DeviceFault>(DeviceFault{parse_device_fault(kind), false});
           }),
           py::arg("kind"))
      .def_readwrite("is_armed", &DeviceFault::is_armed);
  module.def("faulty_device", &make_faulty_device, py::arg("device"), py::arg("fault"),
             py::kw_only(), py::arg("seed") = 0, py::arg("longest_delay_us") = 0,
             "A device that goes wrong while its fault is armed. On the host, copies and decoders "
             "come late by random times as well.");

  py::class_<DeviceFailure, std::shared_ptr<DeviceFailure>>(module, "DeviceFailure",
                                                            "A call of a device that fails.")
      .def(py::init([](const std::string& kind) {
             auto failure = std::make_shared<DeviceFailure>();
             failure->kind = parse_failure_kind(kind);
             return failure;
           }),
           py::arg("kind"))
      .def_readwrite("calls_until_failure", &DeviceFailure::calls_until_failure)
      .def_readwrite("is_sticky", &DeviceFailure::is_sticky)
      .def_readonly("num_calls", &DeviceFailure::num_calls)
      .def_readonly("failed_call", &DeviceFailure::failed_call);
  module.def("failing_device", &make_failing_device, py::arg("device"), py::arg("failure"),
             "A device of which one call fails, when the failure says so.");
}

}  // namespace torch_offload
