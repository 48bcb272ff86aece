// Other plans for the same parameters: what changes its home moves, and nothing else does.

#include <ATen/ATen.h>

#include <exception>
#include <utility>

#include "params/engine.h"
#include "params/python_errors.h"

namespace py = pybind11;

namespace torch_offload {

namespace {

/// One step of an undo: what fails in it is less than what is being undone, and keeps no other step
/// from being taken.
template <typename Step>
void try_to(const Step& step) {
  try {
    step();
  } catch (const std::exception&) {
    PyErr_Clear();  // an operator that fails in Python leaves its error set
  }
}

}  // namespace

/// Refuses by name, before anything is touched, weights of another shape or dtype than those that
/// are to move, or have moved; of residents that are to move takes strides as they are now.
void Engine::look_at_found(const Plan& plan, const std::vector<ParameterRange>& ranges) {
  for (const StreamedParameter& parameter : parameters_) {
    if (parameter.is_moved_in()) {
      parameter.check_found();
    }
  }
  for (UnitIndex unit = 0; unit < std::min(ranges.size(), plan.units.size()); ++unit) {
    for (std::size_t i = ranges[unit].begin; !plan.is_resident(unit) && i < ranges[unit].end; ++i) {
      if (!parameters_.at(i).is_moved_in()) {
        parameters_[i].take_found_at_home();
      }
    }
  }
}

std::int64_t Engine::recut(Plan plan, const std::vector<ParameterRange>& ranges) {
  const Rest rest(*this, "recut()");
  look_at_found(plan, ranges);
  std::vector<UnitParameters> units = cut(plan, ranges);
  const std::vector<std::size_t> sizes = master_sizes(plan, ranges);
  std::vector<std::size_t> leaving;  // the device
  std::vector<std::size_t> coming;
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    if (sizes[i] != 0 && !parameters_[i].is_moved_in()) {
      leaving.push_back(i);
    } else if (sizes[i] == 0 && parameters_[i].is_moved_in()) {
      coming.push_back(i);
    }
  }
  std::vector<std::size_t> missing(parameters_.size(), 0);
  for (const std::size_t i : packs_masters() ? std::vector<std::size_t>{} : leaving) {
    missing[i] = aligned_size(parameters_[i].size_bytes());
  }
  {
    const py::gil_scoped_release no_gil;
    masters_->reserve(std::move(missing));
  }
  const Plan former = pipeline().plan();
  const bool was_packed = packed_ != nullptr;
  std::vector<at::Tensor> plain;
  bool is_replanned = false;
  try {
    for (const std::size_t i : leaving) {
      move_parameter_in(i);
    }
    {
      const py::gil_scoped_release no_gil;
      for (const std::size_t i : leaving) {
        masters_->seal(i, i + 1);
      }
      detach_log();  // it tells of another plan
      pipeline_->synchronize();
      drop_packed();  // it is of units that are no more, and its memory may be needed
      pipeline_->replan(std::move(plan));
    }
    is_replanned = true;
    for (const std::size_t i : coming) {
      if (parameters_[i].edit_since_copy() == StreamedParameter::Edit::kReplaced) {
        parameters_[i].adopt_replacement();
      }
      plain.push_back(parameters_[i].plain_copy(torch_device_));
    }
  } catch (...) {
    const PythonErrorAside aside;
    plain.clear();
    if (is_replanned) {
      const py::gil_scoped_release no_gil;
      pipeline_->return_to(former);
    }
    for (const std::size_t i : leaving) {
      try_to([&] {
        if (parameters_[i].is_moved_in()) {
          // Into the memory that it has just left.
          parameters_[i].move_out(parameters_[i].plain_copy(torch_device_));
        }
      });
    }
    if (was_packed && packed_ == nullptr) {
      pack_as_before(former.transports);
    }
    throw;
  }
  units_ = std::move(units);
  most_packed_bytes_.assign(units_.size(), 0);  // nobody has said yet what these may take packed
  std::int64_t bytes_moved = 0;
  for (std::size_t k = 0; k < coming.size(); ++k) {
    parameters_[coming[k]].move_out(plain[k]);
    bytes_moved += static_cast<std::int64_t>(parameters_[coming[k]].size_bytes());
  }
  if (packs_masters()) {  // the way back takes memory anyway, to pack
    const py::gil_scoped_release no_gil;
    for (const std::size_t i : coming) {
      masters_->release(i);
    }
  }
  for (const std::size_t i : leaving) {
    bytes_moved -= static_cast<std::int64_t>(parameters_[i].size_bytes());
  }
  return bytes_moved;
}

}  // namespace torch_offload
