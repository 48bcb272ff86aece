#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "codec/unit_packer.h"
#include "core/device.h"
#include "core/loader.h"
#include "core/masters.h"
#include "core/packed_loader.h"
#include "core/pipeline.h"
#include "params/streamed_parameter.h"

namespace torch_offload {

/// What Python says of one parameter of a unit.
struct ParameterSpec {
  std::string name;
  at::Tensor parameter;
  std::vector<ParameterSlot> slots;
  /// What it shows of checkpoint files, to be streamed from there; or none.
  std::shared_ptr<FileView> view;
};

/// Consecutive parameters [begin, end) of the engine's list: what one unit holds.
struct ParameterRange {
  std::size_t begin = 0;
  std::size_t end = 0;
};

/// The parameters of one model, their masters and places, and the pipeline between them.
///
/// Each parameter has a master of its own, in the arena or in a checkpoint file; a unit is a run of
/// consecutive parameters, so that units can be cut anew (`recut`) without moving a byte.
///
/// Lifetime:  holds the arena and the parameters; the model's wrappers hold the engine; nothing
///            here holds a module. `close` or the destructor drains the copies.
/// Threads:   every call needs the GIL on entry. Around what the pipeline and the arena submit,
///            wait for, lock and unlock it is let go; copies made by torch's own operators hold it.
///            A second thread in the middle of a forward gets a StateError.
class Engine : private Loader {
 public:
  /// Allocates the window, reserves the arena and prepares streams; moves no parameter.
  ///
  /// With `packed_class_of`, the Python function that gives the class of a parameter at rest,
  /// masters are packed: see Note [Packed masters]. `tensors_of_model` is another one, without
  /// arguments, which lists all that the model has.
  ///
  /// Throws: ValueError for a parameter that cannot be streamed, or if `ranges` and `plan` do not
  ///         fit together; MemoryError.
  Engine(std::shared_ptr<Device> device, const at::Device& torch_device,
         const PipelineOptions& options, std::vector<ParameterSpec> parameters, Plan plan,
         const std::vector<ParameterRange>& ranges,
         std::size_t lock_limit_bytes = LockedFiles::kNoLimit,
         const std::vector<std::shared_ptr<FileView>>& residents = {},
         pybind11::object packed_class_of = {}, pybind11::object tensors_of_model = {});
  ~Engine() override;

  /// Moves a streamed unit's parameters into their masters; units in order, each once. Those of a
  /// checkpoint file stay there, and their pages are locked when they are first copied.
  /// Blocking: copies the bytes. Throws: MemoryError if they cannot be page-locked; call move_out.
  void move_in(UnitIndex unit);
  /// Page-locks what copies of the unit read of checkpoint files, as the first copy will otherwise.
  /// Blocking: while pages are read and locked. Throws: as LockedFiles::lock.
  void lock_files(UnitIndex unit);
  /// Packs without loss, as they are now, the units that are to travel or to stay packed by the
  /// plan: from here on they are decoded on the device, behind a copy or from where they stay. A
  /// unit that takes more than `most_bytes` says of it is raw, and the plan says so afterwards: so
  /// no more is taken than was planned. Masters stay what they are; a unit whose weights are edited
  /// is packed anew.
  ///
  /// With packed masters the blobs are the masters, and what is raw is plain.
  ///
  /// `counts` has what count_exponents has made of parameters, by their position, since when they
  /// have not changed: those are not counted again. Undefined, or not there: they are.
  ///
  /// Blocking:  reads and writes all bytes, on all cores; page-locks the packed ones, of those that
  ///            stay only where they are masters; waits for those that stay to be on the device.
  /// Throws:    ValueError unless `most_bytes` has an answer for each unit; StateError during a
  ///            forward or after an earlier call; NotImplementedError if the device cannot decode;
  ///            MemoryError. Plain masters are then copied raw; packed ones are packed by the next
  ///            forward.
  void pack(const std::vector<std::size_t>& most_bytes, std::vector<at::Tensor> counts = {});
  /// What a unit's blob is made from: where each parameter lies in the place, and its bytes.
  struct ParameterContent {
    std::string name;
    std::size_t place_offset = 0;
    std::size_t size_bytes = 0;
    std::uint64_t checksum = 0;  ///< Of the bytes that its master holds now.
  };
  /// Blocking: reads all of the unit, on all cores. Throws: StateError during a forward.
  std::vector<ParameterContent> content(UnitIndex unit);
  /// Blobs for the next `pack`, by unit, of what the units' masters hold; undefined: none. A
  /// damaged one is not taken.
  void offer_blobs(std::vector<at::Tensor> blobs);
  /// The units for which the last `pack` has taken the blob that was offered.
  const std::vector<UnitIndex>& blobs_taken() const { return blobs_taken_; }
  /// The blob of a packed unit, as bytes that live on with it; undefined for a raw one.
  /// Blocking: copies one that is nowhere but on the device. Throws: StateError during a forward.
  at::Tensor packed_blob(UnitIndex unit) const;
  /// Bytes of each unit as it is copied: packed, all of it, or none where it stays packed.
  std::vector<std::size_t> transport_bytes() const;
  /// The staging ring on the device.
  std::size_t staging_bytes() const { return packed_ == nullptr ? 0 : packed_->ring_bytes(); }
  /// The packed units that stay on the device.
  std::size_t packed_resident_bytes() const {
    return packed_ == nullptr ? 0 : packed_->resident_bytes();
  }
  std::uint64_t bytes_copied() const { return device_->counters().bytes_copied; }

  /// Copies one of `residents` to a dense tensor on the device by way of locked pages, at the
  /// link's rate. Returns false, having done nothing, if its bytes are not the file's any more.
  ///
  /// Ordering: as soon as it returns, on the current stream; the copy itself may still run.
  /// Blocking: while pages are read and locked. Throws: as LockedFiles::lock; ValueError.
  bool copy_resident(const std::shared_ptr<FileView>& view, const at::Tensor& destination);
  /// Unlocks the pages that only those copies needed. Blocks until they are done.
  void unlock_residents();
  /// Moves all parameters back into ordinary memory, where they were if they fit. Returns the names
  /// of those which did not fit there and are on the CPU now. What shows data of another shape or
  /// dtype by now keeps that. Blocks while copying.
  std::vector<std::string> move_out();

  /// Goes on with another plan, and units cut anew where `ranges` are others. Parameters that are
  /// in no streamed unit any more move to the device, others from there into masters; the rest
  /// stays where it is. Returns how many bytes more are on the device now, the window not counted.
  ///
  /// What leaves the device does so first, then the window changes its size, then the others come:
  /// at no moment is more in use than the larger of both plans takes.
  ///
  /// Blocking: drains what is in flight, and copies what moves.
  /// Throws:   StateError during a forward; ValueError as the constructor; MemoryError,
  ///           c10::OutOfMemoryError. Units and parameters are then as before, their places empty.
  std::int64_t recut(Plan plan, const std::vector<ParameterRange>& ranges);

  /// Calls `call_plain(module, *args, **kwargs)`. Until it returns or raises, the parameters of the
  /// unit show their places; kNoUnit: a call of the model's own or an ancestor's, which only
  /// counts. Returns what it returned, tensors that lie in a place cloned.
  ///
  /// An interrupt cannot strike between its steps: Python delivers it within the call, or later.
  ///
  /// Warns once if a backward could follow: it will raise.
  /// Blocking: as the mode says (Policy), and at the first use of a parameter that was replaced.
  /// Throws:   what the call raised; StateError on a second thread, if a parameter was replaced by
  ///           another kind, if the call has changed its own weights, or, outside grad mode, if it
  ///           keeps a view of them. A view that is kept in grad mode, where a graph may hold it
  ///           rightfully, is an error to read.
  pybind11::object call(UnitIndex unit, const pybind11::handle& call_plain,
                        const pybind11::handle& module, const pybind11::tuple& args,
                        const pybind11::dict& kwargs);

  /// Reads all masters anew at the next use, and finds every edit of those in checkpoint files.
  /// Blocking: about 2 ms for each GiB in files. Throws: StateError during a forward; MemoryError.
  void refresh();
  /// Finds every edit of masters in checkpoint files, without reading anything anew.
  /// Returns the names of the parameters that have left the file so far.
  /// Blocking and Throws: as refresh.
  std::vector<std::string> find_edits();
  /// Writes every later call to the device into `log`, until called with another one or nullptr;
  /// recut() and close() detach it as well. With times, see Device::attach_log.
  /// Blocking: where times are to begin or to be resolved.
  /// Throws:   StateError during a forward, and for a log after close().
  void attach_log(std::shared_ptr<OpLog> log, bool with_times);
  /// Drains the pipeline and gives back window, streams, arena and parameters; those that were not
  /// moved out keep their masters alive. Throws: StateError during a forward.
  void close();
  bool is_closed() const { return pipeline_ == nullptr; }
  /// Calls `function` and keeps forwards, and other threads' changes, out meanwhile: they get a
  /// StateError. For what takes several steps between two forwards, and for each of what an
  /// installation does step by step (move_in, lock_files, copy_resident, unlock_residents); every
  /// other call here that lets go of the GIL keeps them out by itself.
  /// Throws: what it raised; StateError, of `call`, during a forward or another thread's change.
  pybind11::object at_rest(const std::string& call, const pybind11::function& function);

  /// Throws: StateError after close().
  const Pipeline& pipeline() const;
  /// A copy of the plan. Throws: StateError while another thread's pass may be changing it.
  Plan plan() const;
  /// Throws: StateError after close().
  std::uint64_t host_bytes() const {
    pipeline();
    return device_->counters().registered_bytes;
  }
  /// As LockedFiles::bytes_brought_in.
  std::uint64_t file_bytes_locked() const {
    pipeline();
    return masters_->files().bytes_brought_in();
  }
  /// Time spent in `call` so far, what it calls excluded, in seconds.
  double cpu_seconds() const { return static_cast<double>(cpu_ns_) * 1e-9; }
  std::vector<std::string> parameter_names(UnitIndex unit) const;
  /// How many copies an onload of the unit takes; none for a resident one.
  std::size_t num_copies(UnitIndex unit) const;
  /// How many of its bytes copies read from checkpoint files.
  std::size_t bytes_in_files(UnitIndex unit) const;
  /// Our streams by name, copy streams first. On the host device they are threads of ours that
  /// torch knows nothing of: there are none to return. Needs the pass's thread, or no pass.
  std::vector<std::pair<std::string, c10::Stream>> streams();

 private:
  /// What one call has acquired, so that just that is given back.
  struct CallToken {
    bool entered = false;
    bool completed = false;  // the call has returned, rather than raised
    bool has_graph = false;  // autograd's, on an output: it may hold views of the parameters
    UnitIndex unit = kNoUnit;
    bool restores_autocast_cache = false;
  };

  struct UnitParameters {
    ParameterRange range;
    std::vector<std::size_t> offsets;        // of each parameter in master and place
    std::vector<CopySegment> segments;       // of the master, as copies
    std::uint32_t uses = 0;                  // under way; the parameters show the place while > 0
    bool is_sampled = false;                 // since the last copy
    bool is_compared = false;                // with the sample, in this pass
    bool is_checked = false;                 // against the files, in this pass
    bool is_locked = false;                  // all its pages of files, as long as none takes turns
    bool is_announced = false;               // since it was last loaded
    bool is_to_be_packed = false;            // whatever a comparison would say
    std::shared_ptr<const PackedBlob> blob;  // its master, where that is packed
  };

  /// The parameters of one unit, to iterate over.
  class ParametersView {
   public:
    ParametersView(StreamedParameter* begin, StreamedParameter* end) : begin_(begin), end_(end) {}
    StreamedParameter* begin() const { return begin_; }
    StreamedParameter* end() const { return end_; }

   private:
    StreamedParameter* begin_;
    StreamedParameter* end_;
  };

  /// Keeps forwards and other threads' changes out of its scope, which begins and ends with the GIL
  /// held: that guards what is counted.
  class Rest {
   public:
    Rest(const Engine& engine, const std::string& call);
    Rest(const Rest&) = delete;
    Rest& operator=(const Rest&) = delete;
    ~Rest() { --engine_.rests_; }

   private:
    const Engine& engine_;
  };

  /// A place that somebody else may still show.
  struct DroppedPlace {
    const StreamedParameter* parameter;
    StreamedParameter::PlaceRef place;
  };

  StreamId load(UnitIndex unit, std::byte* place, StreamId copy_stream,
                std::uint64_t generation) override;
  StreamId first_writer(UnitIndex unit, StreamId copy_stream) const override;
  std::size_t announced_bytes() const override;
  void announce(UnitIndex unit) override;
  std::vector<StreamId> own_streams() const override;
  bool is_packed(UnitIndex unit) const { return packed_ != nullptr && packed_->has_source(unit); }
  UnitPacker packer_of(UnitIndex unit, std::vector<at::Tensor>& unpacked) const;
  std::vector<TensorSource> sources_of(const UnitParameters& entry,
                                       std::vector<at::Tensor>& unpacked) const;
  KeptBlob offered_blob(UnitIndex unit) const;
  const ExponentCounts* counts_of(std::size_t parameter) const;
  void pack_beside_masters();
  std::vector<std::optional<UnitPacker>> packers_within_limits();
  void make_room_for(const std::vector<std::size_t>& rooms);
  void write_packed(UnitIndex unit, UnitPacker& packer);
  void set_packed_source(UnitIndex unit, const PackedSource& source);
  bool packs_masters() const { return static_cast<bool>(packed_class_of_); }
  bool is_plain(const UnitParameters& entry) const;
  void take_found(const UnitParameters& entry);
  void pack_masters(bool keeps_shared);
  void make_masters_ready();
  bool hold(UnitIndex unit, bool keeps_shared);
  void show_packed(const UnitParameters& entry, bool keeps_shared);
  std::vector<at::Tensor> our_tensors() const;
  bool adopt_blob(UnitIndex unit);
  void load_from_blob(UnitIndex unit);
  void drop_blob(UnitIndex unit);
  std::size_t most_blob_bytes(UnitIndex unit) const;
  void make_plain(UnitIndex unit);
  void adopt_packed_edits(UnitIndex unit);
  void pack_anew(UnitIndex unit);
  void note_content(UnitParameters& entry);
  void drop_packed();
  void drop_blobs_if_unused();
  void pack_as_before(const std::vector<Transport>& transports) noexcept;
  std::vector<UnitParameters> cut(const Plan& plan,
                                  const std::vector<ParameterRange>& ranges) const;
  std::vector<std::size_t> master_sizes(const Plan& plan,
                                        const std::vector<ParameterRange>& ranges) const;
  ParametersView parameters_of(const UnitParameters& entry);
  void acquire(CallToken& token, UnitIndex unit);
  void release(CallToken& token);
  void release_after_failure(CallToken& token) noexcept;
  void let_go();
  void move_parameter_in(std::size_t index);
  void look_at_found(const Plan& plan, const std::vector<ParameterRange>& ranges);
  static bool adopt_at_the_end(StreamedParameter& parameter);
  bool leave_file_if_edited(std::size_t index);
  const std::vector<CopySegment>& segments_of(UnitParameters& entry);
  bool is_there(const UnitParameters& entry) const;
  void note_acquired(StreamedParameter& parameter) const;
  void warn_of_backward(const UnitParameters& entry);
  static void refuse_kept_views(std::vector<DroppedPlace> dropped);
  void mark_stale(UnitIndex unit);
  void adopt_edits(UnitIndex unit);
  void end_pass();
  void detach_log();

  std::shared_ptr<Device> device_;
  at::Device torch_device_;
  std::vector<StreamedParameter> parameters_;
  std::vector<UnitParameters> units_;
  std::unique_ptr<Masters> masters_;  // by position in parameters_
  std::unique_ptr<Pipeline> pipeline_;
  // One piece per unit that is copied packed, the others empty; the last one is shared by those
  // that stay packed on the device.
  std::shared_ptr<PinnedArena> blobs_;
  std::unique_ptr<PackedLoader> packed_;
  PackedStreams packed_streams_;                // of the device: they outlive the loader
  std::vector<std::size_t> most_packed_bytes_;  // of the last pack()
  std::vector<at::Tensor> counts_;              // by parameter, during a pack() that was given any
  pybind11::object packed_class_of_;            // none: masters are plain
  pybind11::object tensors_of_model_;           // or none
  bool are_masters_ready_ = false;              // packed, or plain, as copies need them
  std::vector<at::Tensor> offered_blobs_;       // by unit, while they are packed
  std::vector<UnitIndex> blobs_taken_;
  EventId handover_ = kNoEvent;  // between the streams that residents are copied on and read on
  std::shared_ptr<OpLog> log_;   // attached to the device; or none
  mutable std::uint32_t rests_ = 0;
  mutable std::thread::id rests_of_;  // while there are any
  std::uint64_t cpu_ns_ = 0;
  // Whether forwards that write to a place past all counters are looked for: where the host may
  // read a place without waiting, or waits for everything anyway.
  bool samples_places_ = false;
  bool has_warned_of_backward_ = false;
};

}  // namespace torch_offload
