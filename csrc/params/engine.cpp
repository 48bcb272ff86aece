#include "params/engine.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <utility>

#include "core/error.h"
#include "params/python_errors.h"

namespace py = pybind11;

namespace torch_offload {

namespace {

/// The first parameter of each unit: what one copy carries must lie in one registration.
std::vector<PieceIndex> first_parameters(const std::vector<ParameterRange>& ranges) {
  std::vector<PieceIndex> begins;
  begins.reserve(ranges.size());
  for (const ParameterRange& range : ranges) {
    begins.push_back(range.begin);
  }
  return begins;
}

}  // namespace

Engine::Engine(std::shared_ptr<Device> device, const at::Device& torch_device,
               const PipelineOptions& options, std::vector<ParameterSpec> parameters, Plan plan,
               const std::vector<ParameterRange>& ranges, std::size_t lock_limit_bytes,
               const std::vector<std::shared_ptr<FileView>>& residents, py::object packed_class_of,
               py::object tensors_of_model)
    : device_(std::move(device)),
      torch_device_(torch_device),
      packed_class_of_(std::move(packed_class_of)),
      tensors_of_model_(std::move(tensors_of_model)),
      samples_places_(torch_device.is_cpu() || options.wait_for_each) {
  std::vector<std::shared_ptr<FileView>> views;
  for (ParameterSpec& spec : parameters) {
    views.push_back(std::move(spec.view));
    parameters_.emplace_back(std::move(spec.name), std::move(spec.parameter),
                             std::move(spec.slots));
  }
  units_ = cut(plan, ranges);
  // Packed masters have arenas of their own, one for each unit.
  const std::vector<std::size_t> sizes = packs_masters()
                                             ? std::vector<std::size_t>(parameters_.size(), 0)
                                             : master_sizes(plan, ranges);
  const py::gil_scoped_release no_gil;
  masters_ = std::make_unique<Masters>(device_, sizes, first_parameters(ranges), std::move(views),
                                       lock_limit_bytes, residents);
  pipeline_ =
      std::make_unique<Pipeline>(*device_, static_cast<Loader&>(*this), std::move(plan), options);
}

std::vector<Engine::UnitParameters> Engine::cut(const Plan& plan,
                                                const std::vector<ParameterRange>& ranges) const {
  if (ranges.size() != plan.units.size()) {
    throw ValueError("expected parameters of " + std::to_string(plan.units.size()) +
                     " units, as many as the plan has, got " + std::to_string(ranges.size()));
  }
  std::vector<UnitParameters> units;
  for (UnitIndex unit = 0; unit < ranges.size(); ++unit) {
    UnitParameters entry;
    entry.range = ranges[unit];
    std::size_t size_bytes = 0;
    for (std::size_t i = entry.range.begin; i < entry.range.end; ++i) {
      entry.offsets.push_back(size_bytes);
      size_bytes += aligned_size(parameters_.at(i).size_bytes());
    }
    // A resident may have been given other data by now, which is no concern of ours.
    if (size_bytes != plan.units[unit].size_bytes && !plan.is_resident(unit)) {
      throw ValueError("expected unit '" + plan.units[unit].name + "' to hold " +
                       std::to_string(plan.units[unit].size_bytes) + " bytes as planned, got " +
                       std::to_string(size_bytes));
    }
    units.push_back(std::move(entry));
  }
  return units;
}

/// Bytes of each parameter's master; none for those that stay on the device.
std::vector<std::size_t> Engine::master_sizes(const Plan& plan,
                                              const std::vector<ParameterRange>& ranges) const {
  std::vector<std::size_t> sizes(parameters_.size(), 0);
  for (UnitIndex unit = 0; unit < ranges.size(); ++unit) {
    for (std::size_t i = ranges[unit].begin; i < ranges[unit].end; ++i) {
      sizes[i] = plan.is_resident(unit) ? 0 : aligned_size(parameters_[i].size_bytes());
    }
  }
  return sizes;
}

Engine::ParametersView Engine::parameters_of(const UnitParameters& entry) {
  return {parameters_.data() + entry.range.begin, parameters_.data() + entry.range.end};
}

Engine::~Engine() { let_go(); }

/// Drains first; then the parameters, which keep their masters alive; then the masters, and the
/// device.
void Engine::let_go() {
  std::unique_ptr<Pipeline> pipeline = std::move(pipeline_);  // at once: nobody else is to find it
  {
    const py::gil_scoped_release no_gil;
    try {
      detach_log();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "torch_offload: the op log has no times: %s\n", error.what());
    }
    if (pipeline != nullptr && !pipeline->drain()) {
      masters_->leak();
      if (packed_ != nullptr) {
        packed_->leak();
      }
      if (blobs_ != nullptr) {  // none where masters are packed: each unit has its own
        blobs_->leak();
      }
      for (const UnitParameters& entry : units_) {
        if (entry.blob != nullptr) {
          entry.blob->memory()->leak();
        }
      }
    }
    pipeline.reset();
    drop_packed();
  }
  units_.clear();
  parameters_.clear();
  const py::gil_scoped_release no_gil;
  masters_.reset();
  device_.reset();  // its streams, which on the host are threads
}

const Pipeline& Engine::pipeline() const {
  if (pipeline_ == nullptr) {
    throw StateError("expected a live handle, got one after remove(); call offload() again");
  }
  return *pipeline_;
}

Plan Engine::plan() const {
  if (!pipeline().is_mine()) {
    throw StateError(
        "expected the plan to be read between forwards, or by the thread that runs one, got it "
        "from another thread; ask again afterwards");
  }
  return pipeline_->plan();
}

Engine::Rest::Rest(const Engine& engine, const std::string& call) : engine_(engine) {
  const bool is_mine = engine.rests_ == 0 || engine.rests_of_ == std::this_thread::get_id();
  if ((!engine.is_closed() && engine.pipeline_->in_pass()) || !is_mine) {
    throw StateError("expected " + call + " between forwards, got it while " +
                     (is_mine ? "one is running" : "another thread changes the model") +
                     "; call it afterwards");
  }
  engine.rests_of_ = std::this_thread::get_id();
  ++engine.rests_;
}

py::object Engine::at_rest(const std::string& call, const py::function& function) {
  const Rest rest(*this, call);
  return function();
}

// --- in and out --------------------------------------------------------------------------------

void Engine::move_parameter_in(std::size_t index) {
  StreamedParameter& parameter = parameters_[index];
  if (packs_masters()) {
    parameter.take_in_place();
    return;
  }
  const bool has_view = masters_->has_view(index);
  if (!has_view && !parameter.parameter().device().is_cpu()) {
    const py::gil_scoped_release no_gil;
    masters_->arena(index).prepare(
        index);  // a copy from the device runs at the link's rate into locked pages only
  }
  if (has_view && !parameter.parameter().device().is_cpu()) {
    parameter.move_out(parameter.plain_copy(at::kCPU));  // compared below, not written
  }
  std::byte* const master = masters_->memory(index);
  parameter.move_into(
      master, masters_->owner(index), [&](const void* source, std::size_t size_bytes) {
        const py::gil_scoped_release no_gil;
        if (!has_view) {
          masters_->arena(index).fill(index, source, size_bytes);
        } else if (source != master && std::memcmp(master, source, size_bytes) != 0) {
          std::memcpy(master, source, size_bytes);
        }
      });
  if (has_view) {
    // What it shows is what the file holds, unless something wrote to it before.
    leave_file_if_edited(index);
    parameter.note_copied();
  }
}

void Engine::move_in(UnitIndex unit) {
  UnitParameters& entry = units_.at(unit);
  for (std::size_t i = entry.range.begin; i < entry.range.end; ++i) {
    move_parameter_in(i);
  }
  const py::gil_scoped_release no_gil;
  masters_->seal(entry.range.begin, entry.range.end);
}

/// Data that the parameter was given at rest, and that no forward has seen, is not lost either.
/// What does not fit the master stays with the object that shows it: false where that is ours.
bool Engine::adopt_at_the_end(StreamedParameter& parameter) {
  const auto is_ours = [&] { return !parameter.shows_other_data(); };
  try {
    if (parameter.is_moved_in() &&
        parameter.edit_since_copy() == StreamedParameter::Edit::kReplaced) {
      parameter.adopt_replacement();
    }
  } catch (const StateError&) {
    return is_ours();  // it says: remove() first, and here we are
  } catch (const c10::OutOfMemoryError&) {
    throw;
  } catch (const c10::Error&) {
    return is_ours();  // what nobody may read: a view of a place
  }
  return is_ours();
}

std::vector<std::string> Engine::move_out() {
  const Rest rest(*this, "remove()");
  std::vector<std::string> moved_elsewhere;
  std::vector<std::size_t> moved_out;
  std::vector<StreamedParameter*> left_alone;
  try {
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      StreamedParameter& parameter = parameters_[i];
      if (!parameter.is_moved()) {
        continue;
      }
      if (!adopt_at_the_end(parameter)) {
        left_alone.push_back(&parameter);
        continue;
      }
      const bool was_in = parameter.is_moved_in();
      if (was_in && parameter.former_device().is_cpu() && masters_->has_view(i)) {
        parameter.keep_master();  // as a model that was loaded the usual way shows its file
        moved_out.push_back(i);
        continue;
      }
      at::Tensor plain;
      try {
        plain = parameter.plain_copy(parameter.former_device());
      } catch (const c10::OutOfMemoryError&) {
        plain = parameter.plain_copy(at::kCPU);
        moved_elsewhere.push_back(parameter.name());
      }
      parameter.move_out(plain);
      if (was_in) {
        moved_out.push_back(i);
      }
    }
  } catch (...) {
    const PythonErrorAside aside;
    // Back into the masters, which are still there: the model goes on streaming.
    for (const std::size_t i : moved_out) {
      move_parameter_in(i);
    }
    are_masters_ready_ = false;
    throw;
  }
  for (StreamedParameter* const parameter : left_alone) {
    parameter->let_go();  // only now: what has failed above goes on with its masters
  }
  return moved_elsewhere;
}

void Engine::refresh() {
  const Rest rest(*this, "refresh()");
  find_edits();
  make_masters_ready();
  for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
    if (!pipeline().plan().is_resident(unit)) {
      if (packs_masters() && !is_plain(units_[unit])) {
        adopt_packed_edits(unit);  // finds every edit, and packs what was unpacked
        continue;
      }
      mark_stale(unit);
    }
  }
}

void Engine::attach_log(std::shared_ptr<OpLog> log, bool with_times) {
  const Rest rest(*this, "attach_log()");
  if (log != nullptr) {
    std::vector<std::string> names;
    for (const Unit& unit : pipeline().plan().units) {
      names.push_back(unit.name);
    }
    log->set_unit_names(std::move(names));
  }
  const py::gil_scoped_release no_gil;
  detach_log();
  if (log != nullptr) {
    device_->attach_log(log.get(), with_times);
    log_ = std::move(log);
  }
}

void Engine::detach_log() {
  // Kept until the device has let go of it, whether that fails or not.
  const std::shared_ptr<OpLog> log = std::exchange(log_, nullptr);
  if (log != nullptr) {
    device_->attach_log(nullptr);
  }
}

void Engine::close() {
  const Rest rest(*this, "remove()");
  let_go();  // a handle that is kept must keep neither weights nor masters
}

// --- reports -----------------------------------------------------------------------------------

std::vector<std::string> Engine::parameter_names(UnitIndex unit) const {
  std::vector<std::string> names;
  const ParameterRange range = units_.at(unit).range;
  for (std::size_t i = range.begin; i < range.end; ++i) {
    names.push_back(parameters_[i].name());
  }
  return names;
}

std::vector<std::pair<std::string, c10::Stream>> Engine::streams() {
  const Rest rest(*this, "streams");
  std::vector<std::pair<std::string, c10::Stream>> streams;
  if (torch_device_.is_cpu()) {
    return streams;
  }
  // Device numbers its streams; torch says which of its own is current.
  const c10::impl::VirtualGuardImpl torch_streams(torch_device_.type());
  const StreamId current = device_->current_stream();
  for (const StreamId stream : pipeline().streams()) {
    device_->set_current_stream(stream);
    streams.emplace_back(device_->stream_name(stream), torch_streams.getStream(torch_device_));
  }
  device_->set_current_stream(current);
  return streams;
}

}  // namespace torch_offload
