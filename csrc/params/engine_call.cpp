// One wrapped call: the parameters of a unit show their places while it runs.

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <utility>

#include "core/error.h"
#include "params/engine.h"
#include "params/outputs.h"
#include "params/python_errors.h"
#include "params/user_warning.h"

namespace py = pybind11;

namespace torch_offload {

namespace {

/// Adds the time until the end of the scope.
class Stopwatch {
 public:
  explicit Stopwatch(std::uint64_t& sum_ns) : sum_ns_(sum_ns), start_(Clock::now()) {}
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;
  ~Stopwatch() {
    sum_ns_ += static_cast<std::uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start_).count());
  }

 private:
  using Clock = std::chrono::steady_clock;
  std::uint64_t& sum_ns_;
  Clock::time_point start_;
};

}  // namespace

py::object Engine::call(UnitIndex unit, const py::handle& call_plain, const py::handle& module,
                        const py::tuple& args, const py::dict& kwargs) {
  std::vector<PyObject*> arguments{nullptr, module.ptr()};  // the first is for vectorcall's own use
  arguments.insert(arguments.end(), PySequence_Fast_ITEMS(args.ptr()),
                   PySequence_Fast_ITEMS(args.ptr()) + args.size());
  CallToken token;
  py::object output;
  try {
    acquire(token, unit);
    output = py::reinterpret_steal<py::object>(PyObject_VectorcallDict(
        call_plain.ptr(), arguments.data() + 1,
        (arguments.size() - 1) | PY_VECTORCALL_ARGUMENTS_OFFSET, kwargs.ptr()));
    if (!output) {
      throw py::error_already_set();
    }
    if (unit != kNoUnit) {
      const Stopwatch stopwatch(cpu_ns_);
      OutputGuard guard(*pipeline_, unit);
      output = guard.outside_window(output);
      token.has_graph = guard.has_graph();
    }
    token.completed = true;
  } catch (...) {
    release_after_failure(token);
    throw;
  }
  release(token);
  return output;
}

void Engine::acquire(CallToken& token, UnitIndex unit) {
  const Stopwatch stopwatch(cpu_ns_);
  if (rests_ > 0) {
    throw StateError(
        "expected one forward at a time per offloaded model, and none while its plan changes, got "
        "a call in the middle of a change; guard the model with a lock, or call it afterwards");
  }
  pipeline();
  const bool begins_pass = !pipeline_->in_pass();
  pipeline_->enter();  // first of all: it refuses a second thread before anything is read
  token.entered = true;
  if (begins_pass && device_->is_capturing()) {
    throw StateError(
        "expected a forward that runs, got one that is captured into a CUDA graph: its copies "
        "would wait for events from before the capture; capture the plain model, after "
        "handle.remove()");
  }
  if (begins_pass && masters_->has_files()) {
    masters_->files().check_unchanged();
  }
  if (begins_pass) {
    make_masters_ready();
  }
  if (unit == kNoUnit) {
    return;
  }
  UnitParameters& entry = units_.at(unit);
  if (entry.uses == 0) {
    warn_of_backward(entry);
    adopt_edits(unit);
  }
  std::byte* place = nullptr;
  {
    const py::gil_scoped_release no_gil;
    place = pipeline_->acquire(unit);
  }
  token.unit = unit;
  if (entry.uses++ == 0) {
    auto offset = entry.offsets.begin();
    for (StreamedParameter& parameter : parameters_of(entry)) {
      parameter.show_place(place + *offset++, torch_device_);
      note_acquired(parameter);
    }
  }
  if (at::autocast::is_autocast_cache_enabled()) {
    // The cache would keep a cast copy of every streamed weight: the model fills the device, and
    // edits of the masters go unseen.
    token.restores_autocast_cache = true;
    at::autocast::set_autocast_cache_enabled(false);
  }
}

/// Takes note of what the forward of the unit must leave alone. The parameter shows its place.
void Engine::note_acquired(StreamedParameter& parameter) const {
  parameter.note_acquired();
  if (samples_places_) {
    parameter.take_place_sample();
  }
}

void Engine::warn_of_backward(const UnitParameters& entry) {
  if (has_warned_of_backward_ || !at::GradMode::is_enabled()) {
    return;
  }
  for (const StreamedParameter& parameter : parameters_of(entry)) {
    if (parameter.parameter().requires_grad()) {
      has_warned_of_backward_ = true;
      warn_user(
          "this forward runs in grad mode, but a backward through streamed weights is not "
          "supported and will raise; use torch.no_grad() or torch.inference_mode()",
          PyExc_UserWarning);
      return;
    }
  }
}

/// What was copied or packed of the unit is older than its masters. At once where they are given
/// other bytes: what fails later must not leave an edit that nobody sees any more.
void Engine::mark_stale(UnitIndex unit) {
  units_[unit].is_to_be_packed = is_packed(unit);
  pipeline_->invalidate(unit);
}

/// Brings the masters up to date with what the user did to the parameters at rest.
void Engine::adopt_edits(UnitIndex unit) {
  UnitParameters& entry = units_[unit];
  if (packs_masters() && !is_plain(entry)) {
    adopt_packed_edits(unit);
    return;
  }
  // Bytes that were copied in an earlier pass may be older than an edit that no counter shows:
  // `weight.data += d`, fused optimizers, numpy. Within a pass nobody edits behind our back.
  // What was packed is older still: from when that was.
  const bool compares =
      (is_packed(unit) || pipeline_->copied_before_this_pass(unit)) && !entry.is_compared;
  bool is_stale = entry.is_to_be_packed;
  for (std::size_t index = entry.range.begin; index < entry.range.end; ++index) {
    StreamedParameter& parameter = parameters_[index];
    const StreamedParameter::Edit edit = parameter.edit_since_copy();
    if (edit == StreamedParameter::Edit::kReplaced) {
      {
        const py::gil_scoped_release no_gil;
        pipeline_->synchronize_onload(unit);  // a copy may still read the master that is rewritten
      }
      device_->host_write(masters_->memory(index), parameter.size_bytes(), unit);
      parameter.adopt_replacement();
      mark_stale(unit);
    }
    if (masters_->is_in_file(index)) {
      // A copy from the file is never newer than an edit, whenever it was made.
      const bool may_be_edited = edit != StreamedParameter::Edit::kNone ||
                                 (!entry.is_checked && masters_->looks_edited(index));
      if (may_be_edited && leave_file_if_edited(index)) {
        entry.segments.clear();
        mark_stale(unit);
        is_stale = true;
      } else if (may_be_edited) {
        parameter.note_copied();
      }
      continue;
    }
    is_stale = is_stale || edit != StreamedParameter::Edit::kNone ||
               (compares && !(entry.is_sampled && parameter.sample_is_equal()));
  }
  entry.is_compared = true;
  entry.is_checked = true;
  if (is_stale) {
    mark_stale(unit);
    if (is_packed(unit)) {
      pack_anew(unit);
    }
  }
}

StreamId Engine::load(UnitIndex unit, std::byte* place, StreamId copy_stream,
                      std::uint64_t generation) {
  UnitParameters& entry = units_[unit];
  if (is_packed(unit)) {
    return packed_->load(unit, place, copy_stream,
                         generation);  // what was noted when it was packed
  }
  if (packs_masters() && !is_plain(entry)) {
    throw MemoryError("expected packed masters of unit '" + pipeline_->plan().units[unit].name +
                      "', got none, as memory was missing when it was packed anew; free memory "
                      "and call the model again");
  }
  const std::vector<CopySegment>& segments = segments_of(entry);
  const auto submit = [&](const CopySegment& segment) {
    device_->copy(copy_stream,
                  {place + segment.offset, segment.source, segment.size_bytes, unit, generation});
  };
  LockedFiles& files = masters_->files();
  if (is_there(entry)) {
    files.submit(segments, copy_stream, submit);
  } else {
    entry.is_announced = false;
    files.load(segments, copy_stream, submit);
    entry.is_locked = true;
  }
  for (std::size_t index = entry.range.begin; index < entry.range.end; ++index) {
    if (!masters_->is_in_file(index)) {  // there an edit before the copy has still to be found
      parameters_[index].note_copied();
    }
  }
  entry.is_sampled = false;
  entry.is_compared = true;
  return copy_stream;
}

void Engine::release(CallToken& token) {
  if (!std::exchange(token.entered, false)) {
    return;
  }
  const Stopwatch stopwatch(cpu_ns_);
  std::exception_ptr failure;
  std::string edited;
  std::vector<DroppedPlace> dropped;
  if (token.restores_autocast_cache) {
    at::autocast::set_autocast_cache_enabled(true);
  }
  if (const UnitIndex unit = token.unit; unit != kNoUnit) {
    UnitParameters& entry = units_[unit];
    if (--entry.uses == 0) {
      // The parameters first: whatever fails later, the model is at rest. A graph may hold this
      // use even if grad mode is off by now: the unit may have switched it on for itself.
      const bool bumps = !c10::InferenceMode::is_enabled();
      // A graph keeps views rightfully: a backward through them raises.
      const bool refuses_views = token.completed && !token.has_graph && !at::GradMode::is_enabled();
      for (StreamedParameter& parameter : parameters_of(entry)) {
        try {
          if (parameter.was_changed_in_forward() && edited.empty()) {
            edited = parameter.name();
          }
        } catch (...) {  // the device has failed
          failure = std::current_exception();
        }
        parameter.show_master();
        if (bumps) {
          parameter.bump_version();
        }
        if (parameter.place_may_be_shared()) {
          // The next use gets a tensor of its own, so that it does not see the views of this one,
          // which nobody can read from now on: the next units overwrite what they show.
          DroppedPlace place{&parameter, parameter.drop_place()};
          if (refuses_views) {
            dropped.push_back(std::move(place));
          }
        }
      }
    }
    try {
      const py::gil_scoped_release no_gil;
      pipeline_->release(unit);
      if (!edited.empty()) {
        pipeline_->invalidate(unit);  // else the next use finds its place as this one has left it
      }
    } catch (...) {
      failure = std::current_exception();
    }
  }
  pipeline_->leave(token.completed && failure == nullptr && edited.empty());
  if (!pipeline_->in_pass()) {
    end_pass();
  }
  if (failure != nullptr) {
    std::rethrow_exception(failure);
  }
  if (!edited.empty() && token.completed) {
    throw StateError(
        "expected a forward that leaves its streamed weights alone, got one that "
        "changes '" +
        edited +
        "'; the change is lost and the weight is as before: "
        "keep it on the device with resident=['" +
        edited + "']");
  }
  refuse_kept_views(std::move(dropped));
}

/// Raises if somebody keeps a tensor over a place of one of these. To read it raises as well, but
/// here the forward that keeps it is still known.
void Engine::refuse_kept_views(std::vector<DroppedPlace> dropped) {
  const auto forget_what_is_gone = [&] {
    const auto is_gone = [](const DroppedPlace& one) { return one.place.expired(); };
    dropped.erase(std::remove_if(dropped.begin(), dropped.end(), is_gone), dropped.end());
  };
  forget_what_is_gone();
  if (dropped.empty()) {
    return;
  }
  py::module_::import("gc").attr("collect")();  // what only a cycle keeps, nobody reads
  forget_what_is_gone();
  if (!dropped.empty()) {
    const std::string& name = dropped.front().parameter->name();
    throw StateError("expected a forward that keeps no view of its streamed weights, got one of '" +
                     name +
                     "' that outlives the call of its unit (kept as an attribute, in an output or "
                     "by a hook): the next units overwrite what it shows; keep a clone, or the "
                     "weight on the device with resident=['" +
                     name + "']");
  }
}

/// The error that the call has raised is the one to be told; this one must not take its place.
void Engine::release_after_failure(CallToken& token) noexcept {
  const PythonErrorAside aside;
  try {
    release(token);
  } catch (std::exception& error) {
    std::fprintf(stderr,
                 "torch_offload: after a call that failed, its release failed as well: %s\n",
                 words_of(error).c_str());
  }
}

/// What is still whole may be used in the next pass without a copy: takes the samples that tell
/// then whether its masters are still the same.
void Engine::end_pass() {
  for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
    UnitParameters& entry = units_[unit];
    entry.is_compared = false;
    entry.is_checked = false;
    if (pipeline_->is_whole(unit) && !entry.is_sampled) {
      for (std::size_t index = entry.range.begin; index < entry.range.end; ++index) {
        if (!masters_->is_in_file(index)) {
          parameters_[index].take_sample();
        }
      }
      entry.is_sampled = true;
    }
  }
}

}  // namespace torch_offload
