#include "sim/simulate.h"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <optional>
#include <string>

#include "core/error.h"
#include "core/loader.h"
#include "core/mode.h"
#include "core/packed_loader.h"
#include "sim/sim_device.h"

namespace torch_offload {

namespace {

constexpr std::size_t kPageBytes = 4096;

/// Brings units into their places from masters that are not there: raw ones by one copy, packed
/// ones as the product does.
class SimLoader : public Loader {
 public:
  SimLoader(SimDevice& device, const SimRequest& request)
      : device_(device), units_(request.plan.units) {
    const Plan& plan = request.plan;
    PackedLoader::Options options;
    options.has_decode_stream = policy_of(request.options.mode).has_copy_stream;
    options.num_slots = plan.staging_slots;
    options.resident_bytes.assign(units_.size(), 0);
    bool is_any_packed = false;
    std::size_t size_bytes = 0;
    for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
      offsets_.push_back(size_bytes);
      const Transport transport = plan.transport(unit);
      const bool is_packed = transport != Transport::kRaw;
      const std::size_t master_bytes =
          is_packed ? aligned_size(request.packed_bytes[unit]) : units_[unit].size_bytes;
      size_bytes += master_bytes;
      if (transport == Transport::kPacked) {
        options.slot_bytes = std::max(options.slot_bytes, master_bytes);
      } else if (transport == Transport::kPackedResident) {
        options.resident_bytes[unit] = master_bytes;
      }
      is_any_packed = is_any_packed || is_packed;
    }
    size_bytes = (size_bytes / kPageBytes + 1) * kPageBytes;
    masters_ = static_cast<std::byte*>(device_.make_host_memory(size_bytes));
    device_.register_host(masters_, size_bytes);
    if (!is_any_packed) {
      return;
    }
    packed_ = std::make_unique<PackedLoader>(device_, units_.size(), options);
    for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
      const PackedSource source{masters_ + offsets_[unit], request.packed_bytes.at(unit),
                                units_[unit].size_bytes, /*num_tiles=*/1};
      if (plan.transport(unit) == Transport::kPacked) {
        packed_->set_source(unit, source);
      } else if (plan.transport(unit) == Transport::kPackedResident) {
        packed_->upload(unit, source);
      }
    }
  }

  StreamId load(UnitIndex unit, std::byte* place, StreamId copy_stream,
                std::uint64_t generation) override {
    if (is_packed(unit)) {
      return packed_->load(unit, place, copy_stream, generation);
    }
    device_.copy(copy_stream,
                 {place, masters_ + offsets_[unit], units_[unit].size_bytes, unit, generation});
    return copy_stream;
  }
  StreamId first_writer(UnitIndex unit, StreamId copy_stream) const override {
    return is_packed(unit) ? packed_->first_writer(unit, copy_stream) : copy_stream;
  }
  std::vector<StreamId> own_streams() const override {
    return packed_ != nullptr ? packed_->own_streams() : std::vector<StreamId>{};
  }

 private:
  bool is_packed(UnitIndex unit) const { return packed_ != nullptr && packed_->has_source(unit); }

  SimDevice& device_;
  const std::vector<Unit>& units_;
  std::byte* masters_ = nullptr;
  std::vector<std::size_t> offsets_;
  std::unique_ptr<PackedLoader> packed_;  // none where the plan packs nothing
};

void check_request(const SimRequest& request) {
  const std::vector<Unit>& units = request.plan.units;
  check_costs(request.costs);
  const auto check_length = [&](const char* what, const std::vector<std::int64_t>& times_ns) {
    if (times_ns.size() != units.size()) {
      throw ValueError(std::string("expected ") + what +
                       " to have one time for each of the plan's " + std::to_string(units.size()) +
                       " units, got " + std::to_string(times_ns.size()));
    }
  };
  check_length("compute_ns", request.costs.compute_ns);
  if (!request.costs.launch_ns.empty()) {
    check_length("launch_ns", request.costs.launch_ns);
  }
  if (request.costs.copy_ns) {
    check_length("copy_ns", *request.costs.copy_ns);
  }
  for (UnitIndex unit = 0; unit < units.size(); ++unit) {
    if (request.plan.transport(unit) != Transport::kRaw &&
        (request.packed_bytes.size() != units.size() || request.packed_bytes[unit] == 0)) {
      throw ValueError("expected packed_bytes to say what unit '" + units[unit].name +
                       "' takes, which the plan packs, got " +
                       std::to_string(request.packed_bytes.size()) + " sizes of " +
                       std::to_string(units.size()) + " units");
    }
  }
  for (std::size_t pass = 0; pass < request.passes.size(); ++pass) {
    for (const UnitIndex unit : request.passes[pass]) {
      if (unit >= units.size()) {
        throw IndexError("expected passes of the plan's " + std::to_string(units.size()) +
                         " units, counted from 0, got unit " + std::to_string(unit) + " in pass " +
                         std::to_string(pass));
      }
    }
  }
}

/// One call of a unit, as the wrapper of its module makes it.
void use(SimDevice& device, Pipeline& pipeline, UnitIndex unit, const SimCosts& costs) {
  const std::int64_t compute_ns = costs.compute_ns[unit];
  std::optional<std::int64_t> launch_ns;
  if (!costs.launch_ns.empty()) {
    launch_ns = costs.launch_ns[unit];
  }
  if (pipeline.plan().is_resident(unit)) {
    const StreamId stream = device.current_stream();
    device.begin_read(stream, nullptr, 0, unit, 0);
    device.run(stream, compute_ns, launch_ns);
    device.end_read(stream, nullptr, 0, unit, 0);
    return;
  }
  pipeline.acquire(unit);
  device.run(device.current_stream(), compute_ns, launch_ns);
  pipeline.release(unit);
}

std::vector<std::string> names_of(const std::vector<Unit>& units) {
  std::vector<std::string> names;
  names.reserve(units.size());
  for (const Unit& unit : units) {
    names.push_back(unit.name);
  }
  return names;
}

}  // namespace

SimResult simulate(const SimRequest& request) {
  check_request(request);
  SimResult result;
  SimDevice device(request.costs);
  SimLoader loader(device, request);
  Pipeline pipeline(device, loader, request.plan, request.options);
  device.reset_clocks();
  const DeviceCounters before = device.counters();
  if (request.keep_log) {
    result.log.set_unit_names(names_of(request.plan.units));
    device.attach_log(&result.log, /*with_times=*/true);
  }

  std::vector<SimDevice::Point> ends;
  for (const std::vector<UnitIndex>& pass : request.passes) {
    result.pass_begin_ns.push_back(device.host_time_ns());
    pipeline.enter();
    for (const UnitIndex unit : pass) {
      use(device, pipeline, unit, request.costs);
    }
    pipeline.leave(/*completed=*/true);
    const StreamId caller = device.current_stream();
    ends.push_back(device.end_of(caller));
    if (request.synchronize_passes) {
      device.synchronize(caller);
    }
    result.host_end_ns.push_back(device.host_time_ns());
  }

  // Everything has been submitted: now the device may play out the rest.
  result.host_blocked_ns = device.host_blocked_ns();
  for (const SimDevice::Point& end : ends) {
    result.pass_end_ns.push_back(device.time_of(end));
  }
  if (!ends.empty()) {
    result.elapsed_ns = std::max(result.pass_end_ns.back(), result.host_end_ns.back());
  }
  result.stats = pipeline.stats();
  result.counters = device.counters();
  result.counters.host_synchronizes -= before.host_synchronizes;
  result.counters.copies -= before.copies;
  result.counters.bytes_copied -= before.bytes_copied;
  device.attach_log(nullptr);
  return result;
}

}  // namespace torch_offload
