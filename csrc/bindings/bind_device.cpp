#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>

#include "bindings/bind.h"
#include "bindings/make_device.h"
#include "core/error.h"
#include "core/host_limits.h"
#include "host/host_device.h"
#ifdef TORCH_OFFLOAD_WITH_CUDA
#include "cuda/cuda_device.h"
#endif

namespace py = pybind11;

namespace torch_offload {

namespace {

std::shared_ptr<Device> device_for(const at::Device& device) {
  if (device.is_cpu()) {
    return make_device<HostDevice>();
  }
#ifdef TORCH_OFFLOAD_WITH_CUDA
  if (device.is_cuda()) {
    return make_device<CudaDevice>(device.index());
  }
#else
  if (device.is_cuda()) {
    throw ValueError(
        "expected device='cpu', got a CUDA device: this build of torch_offload was made against a "
        "torch without CUDA; install a CUDA build of torch and run `pip install "
        "--no-build-isolation .` again");
  }
#endif
  throw ValueError("expected a 'cuda' or 'cpu' device, got '" + device.str() + "'");
}

}  // namespace

void bind_device(py::module_& module) {
  py::class_<DeviceCounters>(module, "DeviceCounters", "What was asked of a device.")
      .def_readonly("copies", &DeviceCounters::copies)
      .def_readonly("bytes_copied", &DeviceCounters::bytes_copied)
      .def_readonly("records", &DeviceCounters::records)
      .def_readonly("waits", &DeviceCounters::waits)
      .def_readonly("host_synchronizes", &DeviceCounters::host_synchronizes)
      .def_readonly("caller_waits", &DeviceCounters::caller_waits)
      .def_readonly("allocations", &DeviceCounters::allocations)
      .def_readonly("allocated_bytes", &DeviceCounters::allocated_bytes)
      .def_readonly("registrations", &DeviceCounters::registrations)
      .def_readonly("registered_bytes", &DeviceCounters::registered_bytes)
      .def_readonly("streams", &DeviceCounters::streams)
      .def_readonly("events", &DeviceCounters::events);

  py::class_<Device, std::shared_ptr<Device>>(module, "Device",
                                              "Streams, events and memory of one device.")
      .def(py::init(&device_for), py::arg("device"))
      .def_property_readonly("counters", &Device::counters)
      .def("synchronize", [](Device& device) {
        const py::gil_scoped_release no_gil;
        device.synchronize(device.current_stream());
      });

  py::class_<HostLimits>(module, "HostLimits", "What of host memory this process may still take.")
      .def_readonly("total_bytes", &HostLimits::total_bytes)
      .def_readonly("available_bytes", &HostLimits::available_bytes)
      .def_readonly("cgroup_limit_bytes", &HostLimits::cgroup_limit_bytes)
      .def_readonly("cgroup_available_bytes", &HostLimits::cgroup_available_bytes)
      .def_readonly("locked_limit_bytes", &HostLimits::locked_limit_bytes);
  module.def("host_limits", &read_host_limits, py::arg("root") = "",
             "Reads the limits of this process; None where the system does not tell or limit.");
  module.def(
      "check_host_memory",
      [](std::size_t needed_bytes, std::size_t reserve_bytes) {
        check_host_memory(needed_bytes, reserve_bytes, read_host_limits());
      },
      py::arg("needed_bytes"), py::arg("reserve_bytes"),
      "Raises MemoryError unless the host can give needed_bytes and keep reserve_bytes.");

  module.attr("has_cuda") =
#ifdef TORCH_OFFLOAD_WITH_CUDA
      true;
#else
      false;
#endif
}

}  // namespace torch_offload
