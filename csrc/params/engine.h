#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/device.h"
#include "core/loader.h"
#include "core/pinned_arena.h"
#include "core/pipeline.h"
#include "params/streamed_parameter.h"

namespace torch_offload {

/// What Python says of one parameter of a unit.
struct ParameterSpec {
  std::string name;
  at::Tensor parameter;
  std::vector<ParameterSlot> slots;
};

/// What one wrapped call has acquired, so that its `finally` gives back just that: an interrupt may
/// strike between any two steps, and a call that was refused must not touch another's.
class CallToken {
 public:
  /// Whether the call has returned, rather than raised.
  bool completed = false;

 private:
  friend class Engine;
  bool entered_ = false;
  UnitIndex unit_ = kNoUnit;
  std::optional<bool> autocast_cache_;  // as it was before
};

/// The parameters of one model, their masters and places, and the pipeline between them.
///
/// Lifetime:  holds the arena and the parameters; the model's wrappers hold the engine; nothing
///            here holds a module. `close` or the destructor drains the copies.
/// Threads:   every call needs the GIL on entry and lets it go around what may touch the driver. A
///            second thread in the middle of a forward gets a StateError.
class Engine : private Loader {
 public:
  /// Allocates the window, reserves the arena and prepares streams; moves no parameter.
  ///
  /// `plan` must have been made from units whose sizes are unit_size_bytes of `parameters`.
  /// Throws: ValueError for a parameter that cannot be streamed, MemoryError.
  Engine(std::shared_ptr<Device> device, const at::Device& torch_device, Plan plan,
         const PipelineOptions& options, std::vector<std::vector<ParameterSpec>> parameters);
  ~Engine() override;

  /// Flat size of a unit: its parameters one after the other, each aligned to kAlignmentBytes.
  static std::size_t unit_size_bytes(const std::vector<std::size_t>& parameter_size_bytes);

  /// Moves a streamed unit's parameters into the arena; units in order, each once.
  /// Blocking: copies the bytes. Throws: MemoryError if they cannot be page-locked; call move_out.
  void move_in(UnitIndex unit);
  /// Moves the unit's parameters back into ordinary memory, where they were if they fit. Returns
  /// the names of those which did not fit there and are on the CPU now. Does nothing for a unit
  /// that was not moved in.
  std::vector<std::string> move_out(UnitIndex unit);

  /// Begins a wrapped call that uses no unit: the model's own or an ancestor's.
  void enter(CallToken& token);
  /// Begins a wrapped call of a unit: its parameters show their places until release.
  /// Warns once if a backward could follow: it will raise.
  /// Blocking: never, but for the first use of a parameter that was edited by replacing it.
  /// Throws:   StateError on a second thread, or if a parameter was replaced by another kind.
  void acquire(CallToken& token, UnitIndex unit);
  /// Marks the call as completed and returns its output, tensors that lie in the window cloned.
  pybind11::object finish(CallToken& token, pybind11::object output) const;
  /// Ends what `token` began, which may be nothing.
  /// Throws: StateError if the forward has changed its own weights.
  void release(CallToken& token);

  /// Reads all masters anew at the next use. Throws: StateError during a forward.
  void refresh();
  /// Drains the pipeline and gives back window and streams. Throws: StateError during a forward.
  void close();
  bool is_closed() const { return pipeline_ == nullptr; }

  /// Throws: StateError after close().
  const Pipeline& pipeline() const;
  const Device& device() const { return *device_; }
  std::uint64_t host_bytes() const { return device_->counters().registered_bytes; }
  /// Time spent in acquire, release, enter and finish so far, in seconds.
  double cpu_seconds() const { return static_cast<double>(cpu_ns_) * 1e-9; }
  /// Streamed parameters' names, unit by unit.
  std::vector<std::string> parameter_names(UnitIndex unit) const;

 private:
  struct UnitParameters {
    std::vector<StreamedParameter> parameters;
    std::uint32_t uses = 0;     // under way; the parameters show the place while > 0
    bool is_moved_in = false;
    bool is_sampled = false;    // since the last copy
    bool is_compared = false;   // with the sample, in this pass
  };

  StreamId load(UnitIndex unit, std::byte* place, StreamId copy_stream,
                std::uint64_t generation) override;
  void adopt_edits(UnitIndex unit);
  void end_pass();
  void warn_of_backward(const UnitParameters& entry);
  pybind11::object outside_window(const pybind11::handle& output) const;
  void check_at_rest(const char* call) const;

  std::shared_ptr<Device> device_;
  at::Device torch_device_;
  std::vector<UnitParameters> units_;
  std::shared_ptr<PinnedArena> arena_;
  std::unique_ptr<Pipeline> pipeline_;
  std::uint64_t cpu_ns_ = 0;
  bool has_warned_of_backward_ = false;
};

}  // namespace torch_offload
