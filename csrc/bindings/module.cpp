#include "bindings/bind.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "The C++ core of torch_offload. Only the package itself imports it.";
  torch_offload::bind_errors(module);
  torch_offload::bind_codec(module);
  torch_offload::bind_plan(module);
  torch_offload::bind_device(module);
  torch_offload::bind_op_log(module);
  torch_offload::bind_check(module);
  torch_offload::bind_files(module);
  torch_offload::bind_engine(module);
  torch_offload::bind_sim(module);
  torch_offload::bind_lanes(module);
  torch_offload::bind_planner(module);
}
