#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "core/loader.h"
#include "core/op_log.h"
#include "core/packed_loader.h"
#include "core/pipeline.h"
#include "core/plan.h"
#include "lanes/planted_failure.h"
#include "sim/sim_device.h"

namespace torch_offload {

#ifdef TORCH_OFFLOAD_MUTANTS
inline namespace mutants {  // see core/steps.h
#endif

/// The real pipeline on a SimDevice whose costs are nothing, and kernels that the log is told of.
///
/// The log is attached from before the window is allocated until after masters are unregistered:
/// what comes before the first pass and after the last is checked as well.
///
/// Units that the plan wants packed go through the real PackedLoader, with masters for packed ones:
/// in virtual time nobody can tell.
class ScheduleRig {
 public:
  /// `loads_elsewhere`: the loader copies on a stream of its own, as one that decodes would.
  ScheduleRig(Plan plan, const PipelineOptions& options, bool loads_elsewhere = false);
  ScheduleRig(const ScheduleRig&) = delete;
  ScheduleRig& operator=(const ScheduleRig&) = delete;
  ~ScheduleRig();

  Pipeline& pipeline() { return *pipeline_; }
  Device& device() { return device_; }
  const std::vector<StreamId>& callers() const { return callers_; }
  const std::byte* masters() const { return masters_; }
  std::size_t log_size() const { return log_.ops().size(); }
  const OpLog& log() const { return log_; }
  /// By unit: its onload last seen.
  const std::vector<std::uint64_t>& generations() const { return generations_; }
  /// Another pipeline on the same device and masters.
  std::unique_ptr<Pipeline> make_pipeline(Plan plan, const PipelineOptions& options) {
    return std::make_unique<Pipeline>(device_, loader_, std::move(plan), options);
  }

  /// One call of a unit, as the wrapper makes it: whatever was acquired is released. `inside` is
  /// called between two kernels of the unit, and told its place.
  void call(UnitIndex unit, const std::function<void(const std::byte*)>& inside);
  /// One call whose module does nothing but its kernels.
  void call(UnitIndex unit);
  /// Gives the master new bytes, with the care that its owner has to take.
  void edit(UnitIndex unit);
  /// Packs units as the pipeline's plan says, which has just been replanned.
  void pack();

  /// The `call`-th submission from now on fails; 0: none does.
  void fail_at(int call) { device_.calls_until_failure = call; }
  /// Whether the device has no memory left to give.
  void set_out_of_memory(bool is_out) { device_.is_out_of_memory = is_out; }
  bool has_failed() const { return device_.calls_until_failure == 0; }

  /// Lets the device carry out all that it was given; the log does not hear of it.
  void settle();
  /// Ends everything and returns its log.
  const OpLog& finish();

 private:
  class FailingDevice : public SimDevice {
   public:
    using SimDevice::SimDevice;
    int calls_until_failure = 0;
    bool is_out_of_memory = false;

   protected:
    void do_set_current_stream(StreamId stream) override;
    void do_record(EventId event, StreamId stream) override;
    void do_wait(StreamId stream, EventId event) override;
    void do_synchronize(StreamId stream) override;
    void do_copy(StreamId stream, const Copy& copy) override;
    void do_decode(StreamId stream, const Decode& decode) override;
    void do_fill(StreamId stream, void* memory, std::size_t size_bytes,
                 std::uint8_t value) override;
    void* do_allocate(std::size_t size_bytes) override;

   private:
    void count_down();
  };

  class MasterLoader : public Loader {
   public:
    MasterLoader(ScheduleRig& rig, bool loads_elsewhere)
        : rig_(rig), loads_elsewhere_(loads_elsewhere) {}
    StreamId load(UnitIndex unit, std::byte* place, StreamId copy_stream,
                  std::uint64_t generation) override;
    StreamId first_writer(UnitIndex unit, StreamId copy_stream) const override;
    std::vector<StreamId> own_streams() const override;

    /// Nothing may be in flight.
    void pack(const Plan& plan, bool has_decode_stream);
    /// Brings a unit that stays packed to the device as it is now.
    void upload(UnitIndex unit);

   private:
    PackedSource source_of(UnitIndex unit) const;
    void copy(UnitIndex unit, std::byte* place, StreamId stream, std::uint64_t generation);
    StreamId own_stream_behind(StreamId copy_stream);

    ScheduleRig& rig_;
    const bool loads_elsewhere_;
    StreamId own_stream_ = kNoStream;
    EventId begun_ = kNoEvent;
    std::optional<PackedLoader> packed_;
    PackedStreams packed_streams_;
  };

  /// Calls that must not fail, whatever the device has been told.
  template <typename Calls>
  void without_failure(const Calls& calls) {
    const int calls_until_failure = std::exchange(device_.calls_until_failure, 0);
    calls();
    device_.calls_until_failure = calls_until_failure;
  }
  void kernel(UnitIndex unit, const std::byte* place);

  OpLog log_;
  FailingDevice device_;
  MasterLoader loader_;
  std::vector<std::size_t> sizes_;
  std::vector<std::size_t> offsets_;
  std::vector<std::uint64_t> generations_;
  std::byte* masters_ = nullptr;
  std::vector<StreamId> callers_;
  std::unique_ptr<Pipeline> pipeline_;
};

#ifdef TORCH_OFFLOAD_MUTANTS
}  // namespace mutants
#endif

}  // namespace torch_offload
