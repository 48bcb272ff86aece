// Masters in checkpoint files: what locks their pages, and what finds their edits.

#include "core/error.h"
#include "params/engine.h"

namespace py = pybind11;

namespace torch_offload {

const std::vector<CopySegment>& Engine::segments_of(UnitParameters& entry) {
  if (entry.segments.empty()) {
    entry.segments = masters_->segments(entry.range.begin, entry.range.end, entry.offsets);
  }
  return entry.segments;
}

/// Whether copies of the unit may begin at once: nothing of it has to be locked.
bool Engine::is_there(const UnitParameters& entry) const {
  // A limit may have been met since it was locked.
  return !masters_->has_files() || (entry.is_locked && !masters_->files().takes_turns());
}

std::size_t Engine::announced_bytes() const {
  return masters_->has_files() ? masters_->files().read_ahead_bytes() : 0;
}

void Engine::announce(UnitIndex unit) {
  UnitParameters& entry = units_[unit];
  if (!is_there(entry) && !entry.is_announced && !is_packed(unit)) {
    entry.is_announced = masters_->files().read_ahead(segments_of(entry));
  }
}

void Engine::lock_files(UnitIndex unit) {
  const py::gil_scoped_release no_gil;
  UnitParameters& entry = units_.at(unit);
  if (!is_there(entry)) {
    entry.is_announced = false;
    masters_->files().lock(segments_of(entry));
    entry.is_locked = true;
  }
}

bool Engine::copy_resident(const std::shared_ptr<FileView>& view, const at::Tensor& destination) {
  if (!destination.is_non_overlapping_and_dense() || destination.nbytes() != view->size_bytes() ||
      destination.device() != torch_device_) {
    throw ValueError("expected a dense tensor of " + std::to_string(view->size_bytes()) +
                     " bytes on " + torch_device_.str() + ", got " +
                     std::to_string(destination.nbytes()) + " on " + destination.device().str());
  }
  pipeline();
  const py::gil_scoped_release no_gil;
  if (view->is_edited()) {
    return false;
  }
  std::vector<CopySegment> segments;
  std::size_t offset = 0;
  for (const FileBlock& block : view->blocks()) {
    append_segment(segments, {block.data(), offset, block.size_bytes});
    offset += block.size_bytes;
  }
  LockedFiles& files = masters_->files();
  segments = files.cut(segments);
  files.lock(segments, LockedFiles::Hold::kOnce);
  const StreamId current = device_->current_stream();
  const std::vector<StreamId> ours = pipeline_->streams();
  const StreamId copies = ours.empty() ? current : ours.front();  // `sync` has no stream of its own
  if (handover_ == kNoEvent) {
    handover_ = device_->create_event();
  }
  // One event for all of them: a wait means the record before it, whatever is recorded later.
  const auto order_after = [this](StreamId later, StreamId earlier) {
    if (later != earlier) {
      device_->record(handover_, earlier);
      device_->wait(later, handover_);
    }
  };
  order_after(copies, current);  // whoever had the destination before may still use it
  auto* const memory = static_cast<std::byte*>(destination.mutable_data_ptr());
  files.submit(segments, copies, [&](const CopySegment& segment) {
    device_->copy(copies,
                  {memory + segment.offset, segment.source, segment.size_bytes, kNoUnit, 0});
  });
  order_after(current, copies);  // kernels read it behind the copy
  return true;
}

void Engine::unlock_residents() {
  pipeline();
  const py::gil_scoped_release no_gil;
  masters_->files().unlock_once();
}

/// Lets the parameter's copies read its own bytes if they are not the file's any more.
bool Engine::leave_file_if_edited(std::size_t index) {
  if (!masters_->is_edited(index)) {
    return false;
  }
  const py::gil_scoped_release no_gil;
  masters_->make_own(index);
  return true;
}

std::vector<std::string> Engine::find_edits() {
  const Rest rest(*this, "a search for edits");
  pipeline();
  std::vector<std::string> names;
  for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
    UnitParameters& entry = units_[unit];
    for (std::size_t i = entry.range.begin; i < entry.range.end; ++i) {
      if (parameters_[i].is_moved_in() && leave_file_if_edited(i)) {
        entry.segments.clear();
        mark_stale(unit);
      }
      if (masters_->has_view(i) && !masters_->is_in_file(i)) {
        names.push_back(parameters_[i].name());
      }
    }
  }
  return names;
}

std::size_t Engine::num_copies(UnitIndex unit) const {
  const UnitParameters& entry = units_.at(unit);
  const Plan& plan = pipeline().plan();
  if (plan.is_resident(unit) || plan.stays_packed(unit)) {
    return 0;
  }
  return is_packed(unit)
             ? 1
             : masters_->segments(entry.range.begin, entry.range.end, entry.offsets).size();
}

std::size_t Engine::bytes_in_files(UnitIndex unit) const {
  const ParameterRange range = units_.at(unit).range;
  std::size_t bytes = 0;
  for (std::size_t i = range.begin; i < range.end; ++i) {
    bytes +=
        parameters_[i].is_moved_in() && masters_->is_in_file(i) ? parameters_[i].size_bytes() : 0;
  }
  return bytes;
}

}  // namespace torch_offload
