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
  /// Gives the master new bytes, with the care that its owner has to take. A packed unit that no
  /// longer `fits` where there is room for it, or that could not be brought there, is raw from then
  /// on, until it is edited once more.
  void edit(UnitIndex unit, bool fits = true);
  /// Packs units as the pipeline's plan says, which has just been replanned.
  void pack();
  /// Lets the loader want so many bytes to be announced.
  void announce(std::size_t bytes, std::function<void(UnitIndex)> told) {
    announced_bytes_ = bytes;
    told_ = std::move(told);
  }

  /// The `call`-th submission from now on fails; 0: none does.
  void fail_at(int call) { device_.calls_until_failure = call; }
  /// Whether the device has no memory left to give.
  void set_out_of_memory(bool is_out) { device_.is_out_of_memory = is_out; }
  /// How often one has, so far.
  int num_failures() const { return device_.num_failures; }
  /// From now on nobody learns when what these streams were given is done.
  void lose(std::vector<StreamId> streams) { device_.lost_streams = std::move(streams); }

  /// Lets the device carry out all that it was given; the log does not hear of it.
  void settle();
  /// Ends everything and returns its log. What lost streams may still read or write stays.
  const OpLog& finish();

 private:
  class FailingDevice : public SimDevice {
   public:
    using SimDevice::SimDevice;
    int calls_until_failure = 0;
    int num_failures = 0;
    bool is_out_of_memory = false;
    std::vector<StreamId> lost_streams;

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
    std::size_t announced_bytes() const override { return rig_.announced_bytes_; }
    void announce(UnitIndex unit) override { rig_.told_(unit); }

    /// Nothing may be in flight.
    void pack(const Plan& plan, bool has_decode_stream);
    /// Packs the unit as it is now. Returns how it travels.
    Transport pack_anew(UnitIndex unit);
    /// It is raw from now on.
    void drop(UnitIndex unit);
    /// Leaves what a decoder may still read to the device.
    void leak();

   private:
    PackedSource source_of(UnitIndex unit) const;
    void copy(UnitIndex unit, std::byte* place, StreamId stream, std::uint64_t generation);
    StreamId own_stream_behind(StreamId copy_stream);

    ScheduleRig& rig_;
    const bool loads_elsewhere_;
    StreamId own_stream_ = kNoStream;
    EventId begun_ = kNoEvent;
    std::optional<PackedLoader> packed_;
    std::vector<Transport> transports_;  // by unit, as it was planned; empty: all are raw
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
  std::size_t announced_bytes_ = 0;
  std::function<void(UnitIndex)> told_;
  std::unique_ptr<Pipeline> pipeline_;
};

#ifdef TORCH_OFFLOAD_MUTANTS
}  // namespace mutants
#endif

}  // namespace torch_offload
