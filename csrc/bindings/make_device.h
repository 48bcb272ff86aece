#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <utility>

#include "core/device.h"

namespace torch_offload {

/// A device that is deleted without the GIL: its destructor may wait for the driver or join
/// threads.
template <typename T, typename... Arguments>
std::shared_ptr<Device> make_device(Arguments&&... arguments) {
  return std::shared_ptr<Device>(new T(std::forward<Arguments>(arguments)...), [](Device* device) {
    if (PyGILState_Check()) {
      const pybind11::gil_scoped_release no_gil;
      delete device;
    } else {
      delete device;
    }
  });
}

}  // namespace torch_offload
