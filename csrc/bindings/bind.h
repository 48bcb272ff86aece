#pragma once

#include <pybind11/pybind11.h>

namespace torch_offload {

/// One function per core type; module.cpp calls them in the order in which types depend.
void bind_errors(pybind11::module_& module);
void bind_codec(pybind11::module_& module);
void bind_plan(pybind11::module_& module);
void bind_device(pybind11::module_& module);
void bind_op_log(pybind11::module_& module);
void bind_check(pybind11::module_& module);
void bind_files(pybind11::module_& module);
void bind_engine(pybind11::module_& module);
void bind_sim(pybind11::module_& module);
void bind_lanes(pybind11::module_& module);
void bind_planner(pybind11::module_& module);

}  // namespace torch_offload
