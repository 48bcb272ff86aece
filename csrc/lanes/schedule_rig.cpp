#include "lanes/schedule_rig.h"

#include <algorithm>
#include <utility>

#include "core/error.h"
#include "core/mode.h"

namespace torch_offload {

namespace {

constexpr std::size_t kPageBytes = 4096;

SimCosts no_costs() {
  SimCosts costs;
  costs.copy_bytes_per_second = 1e12;
  return costs;
}

}  // namespace

// --- the device --------------------------------------------------------------------------------

void ScheduleRig::FailingDevice::count_down() {
  if (calls_until_failure > 0) {
    --calls_until_failure;
    if (calls_until_failure == 0) {
      ++num_failures;
      throw PlantedFailure();
    }
  }
}

void ScheduleRig::FailingDevice::do_set_current_stream(StreamId stream) {
  count_down();
  SimDevice::do_set_current_stream(stream);
}

void ScheduleRig::FailingDevice::do_record(EventId event, StreamId stream) {
  count_down();
  SimDevice::do_record(event, stream);
}

void ScheduleRig::FailingDevice::do_wait(StreamId stream, EventId event) {
  count_down();
  SimDevice::do_wait(stream, event);
}

void ScheduleRig::FailingDevice::do_synchronize(StreamId stream) {
  count_down();
  if (std::find(lost_streams.begin(), lost_streams.end(), stream) != lost_streams.end()) {
    throw PlantedFailure();
  }
  SimDevice::do_synchronize(stream);
}

void ScheduleRig::FailingDevice::do_copy(StreamId stream, const Copy& copy) {
  count_down();
  SimDevice::do_copy(stream, copy);
}

void ScheduleRig::FailingDevice::do_decode(StreamId stream, const Decode& decode) {
  count_down();
  SimDevice::do_decode(stream, decode);
}

void ScheduleRig::FailingDevice::do_fill(StreamId stream, void* memory, std::size_t size_bytes,
                                         std::uint8_t value) {
  count_down();
  SimDevice::do_fill(stream, memory, size_bytes, value);
}

void* ScheduleRig::FailingDevice::do_allocate(std::size_t size_bytes) {
  count_down();
  if (is_out_of_memory) {
    throw MemoryError("planted: no memory");
  }
  return SimDevice::do_allocate(size_bytes);
}

// --- the loader --------------------------------------------------------------------------------

PackedSource ScheduleRig::MasterLoader::source_of(UnitIndex unit) const {
  const std::size_t size_bytes = rig_.sizes_[unit];
  return {rig_.masters_ + rig_.offsets_[unit], size_bytes, size_bytes, 1};
}

void ScheduleRig::MasterLoader::pack(const Plan& plan, bool has_decode_stream) {
  packed_.reset();
  transports_ = plan.transports;
  PackedLoader::Options options;
  options.has_decode_stream = has_decode_stream;
  options.streams = packed_streams_;
  options.resident_bytes.assign(plan.units.size(), 0);
  const auto is_any = [&](Transport transport) {
    return std::count(plan.transports.begin(), plan.transports.end(), transport) != 0;
  };
  if (!is_any(Transport::kPacked) && !is_any(Transport::kPackedResident)) {
    return;
  }
  for (UnitIndex unit = 0; unit < plan.units.size(); ++unit) {
    if (plan.transport(unit) == Transport::kPacked) {
      options.slot_bytes = std::max(options.slot_bytes, rig_.sizes_[unit]);
    } else if (plan.stays_packed(unit)) {
      options.resident_bytes[unit] = rig_.sizes_[unit];
    }
  }
  PackedLoader& loader = packed_.emplace(rig_.device_, plan.units.size(), options);
  packed_streams_ = loader.streams();
  for (UnitIndex unit = 0; unit < plan.units.size(); ++unit) {
    pack_anew(unit);
  }
}

Transport ScheduleRig::MasterLoader::pack_anew(UnitIndex unit) {
  if (!packed_) {
    return Transport::kRaw;
  }
  if (transports_[unit] == Transport::kPacked) {
    packed_->set_source(unit, source_of(unit));
  } else if (transports_[unit] == Transport::kPackedResident) {
    packed_->upload(unit, source_of(unit));
  }
  return transports_[unit];
}

void ScheduleRig::MasterLoader::drop(UnitIndex unit) {
  if (packed_) {
    packed_->drop_source(unit);
  }
}

void ScheduleRig::MasterLoader::leak() {
  if (packed_) {
    packed_->leak();
  }
}

StreamId ScheduleRig::MasterLoader::first_writer(UnitIndex unit, StreamId copy_stream) const {
  return packed_ ? packed_->first_writer(unit, copy_stream) : copy_stream;
}

std::vector<StreamId> ScheduleRig::MasterLoader::own_streams() const {
  return packed_ ? packed_->own_streams() : std::vector<StreamId>{};
}

StreamId ScheduleRig::MasterLoader::load(UnitIndex unit, std::byte* place, StreamId copy_stream,
                                         std::uint64_t generation) {
  rig_.generations_[unit] = generation;
  if (packed_ && packed_->has_source(unit)) {
    return packed_->load(unit, place, copy_stream, generation);
  }
  if (!loads_elsewhere_) {
    copy(unit, place, copy_stream, generation);
    return copy_stream;
  }
  const StreamId own_stream = own_stream_behind(copy_stream);
  try {
    copy(unit, place, own_stream, generation);
  } catch (...) {
    rig_.without_failure([&] { rig_.device_.synchronize(own_stream); });
    throw;
  }
  return own_stream;
}

StreamId ScheduleRig::MasterLoader::own_stream_behind(StreamId copy_stream) {
  if (own_stream_ == kNoStream) {
    own_stream_ = rig_.device_.create_stream({"loader", StreamRole::kCopy, 0});
    begun_ = rig_.device_.create_event();
  }
  rig_.device_.record(begun_, copy_stream);
  rig_.device_.wait(own_stream_, begun_);
  return own_stream_;
}

/// In two copies: the second may fail when the first is under way.
void ScheduleRig::MasterLoader::copy(UnitIndex unit, std::byte* place, StreamId stream,
                                     std::uint64_t generation) {
  const std::size_t size_bytes = rig_.sizes_[unit];
  const std::size_t half = size_bytes / 2 / kAlignmentBytes * kAlignmentBytes;
  const std::byte* master = rig_.masters_ + rig_.offsets_[unit];
  if (half > 0) {
    rig_.device_.copy(stream, {place, master, half, unit, generation});
  }
  rig_.device_.copy(stream, {place + half, master + half, size_bytes - half, unit, generation});
}

// --- the rig -----------------------------------------------------------------------------------

ScheduleRig::ScheduleRig(Plan plan, const PipelineOptions& options, bool loads_elsewhere)
    : device_(no_costs()), loader_(*this, loads_elsewhere), generations_(plan.units.size(), 0) {
  device_.attach_log(&log_);
  std::size_t size_bytes = 0;
  for (const Unit& unit : plan.units) {
    offsets_.push_back(size_bytes);
    sizes_.push_back(unit.size_bytes);
    size_bytes += unit.size_bytes;
  }
  size_bytes = (size_bytes / kPageBytes + 1) * kPageBytes;
  masters_ = static_cast<std::byte*>(device_.make_host_memory(size_bytes));
  device_.register_host(masters_, size_bytes);
  device_.host_write(masters_, size_bytes, kNoUnit);
  callers_ = {device_.create_stream({"caller", StreamRole::kCompute, 0}),
              device_.create_stream({"other_caller", StreamRole::kCompute, 0})};
  device_.set_current_stream(callers_[0]);
  pipeline_ = std::make_unique<Pipeline>(device_, loader_, std::move(plan), options);
  pack();
}

void ScheduleRig::pack() {
  without_failure([&] {
    pipeline_->synchronize();
    loader_.pack(pipeline_->plan(), policy_of(pipeline_->options().mode).has_copy_stream);
  });
}

ScheduleRig::~ScheduleRig() { finish(); }

const OpLog& ScheduleRig::finish() {
  if (pipeline_) {
    // An owner asks before he gives up what is his; where all can be drained, the pipeline will.
    const bool is_drained = device_.lost_streams.empty() || pipeline_->drain();
    if (!is_drained) {
      loader_.leak();
    }
    pipeline_.reset();
    fail_at(0);
    loader_.pack({}, false);
    if (is_drained) {
      device_.unregister_host(masters_);
    }
    device_.attach_log(nullptr);
  }
  return log_;
}

void ScheduleRig::settle() {
  for (const auto& streams : {pipeline_->streams(), callers_}) {
    for (const StreamId stream : streams) {
      device_.time_of(device_.end_of(stream));
    }
  }
}

void ScheduleRig::kernel(UnitIndex unit, const std::byte* place) {
  const StreamId stream = device_.current_stream();
  device_.begin_read(stream, place, sizes_[unit], unit, generations_[unit]);
  device_.end_read(stream, place, sizes_[unit], unit, generations_[unit]);
}

void ScheduleRig::call(UnitIndex unit) {
  const std::byte* place = pipeline_->acquire(unit);
  kernel(unit, place);
  pipeline_->release(unit);
}

void ScheduleRig::call(UnitIndex unit, const std::function<void(const std::byte*)>& inside) {
  const std::byte* place = pipeline_->acquire(unit);
  const StreamId found = device_.current_stream();
  try {
    kernel(unit, place);
    inside(place);
    kernel(unit, place);
  } catch (...) {
    // A module that fails puts back the stream that it switched from, as torch's guard does.
    without_failure([&] { device_.set_current_stream(found); });
    pipeline_->release(unit);
    throw;
  }
  pipeline_->release(unit);
}

void ScheduleRig::edit(UnitIndex unit, bool fits) {
  pipeline_->synchronize_onload(unit);
  device_.host_write(masters_ + offsets_[unit], sizes_[unit], unit);
  pipeline_->invalidate(unit);
  loader_.drop(unit);  // raw, unless all goes well
  pipeline_->set_transport(unit, Transport::kRaw);
  if (fits) {
    pipeline_->set_transport(unit, loader_.pack_anew(unit));
  }
}

}  // namespace torch_offload
