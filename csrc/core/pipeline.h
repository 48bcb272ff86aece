#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/device.h"
#include "core/device_memory.h"
#include "core/loader.h"
#include "core/mode.h"
#include "core/order.h"
#include "core/plan.h"
#include "core/stats.h"
#include "core/stepped_device.h"
#include "core/steps.h"

namespace torch_offload {

struct PipelineOptions {
  Mode mode = Mode::kPipeline;
  StreamLayout layout = StreamLayout::kShared;
  /// Overwrites a place with NaN bytes when its unit is released, so that a late reader shows.
  /// For tests and debugging: no place is ever hit again.
  bool poison_on_release = false;
  /// Waits for every onload and every use as soon as it is submitted, and asks a ready event
  /// whether it is done before its unit is read: then no fault is a matter of timing. For
  /// debugging.
  bool wait_for_each = false;
  /// Told of an answer of "not yet" to such a question: without more waiting, the bytes would have
  /// been read too early. May throw, which ends the acquire.
  void (*warn)(const std::string& text) = nullptr;
};

/// What happened to one unit since the pipeline was made.
struct UnitStats {
  std::uint64_t acquired = 0;
  std::uint64_t onloads = 0;
  std::uint64_t misses = 0;
};

#ifdef TORCH_OFFLOAD_MUTANTS
inline namespace mutants {  // see steps.h
#endif

/// The scheduler: brings each unit into its place just before the device needs it.
///
/// `enter` and `leave` bracket every call of a wrapped module; the outermost pair is a pass.
/// `acquire` and `release` bracket the use of one unit, within a pass.
///
/// Ordering:  see Note [Ready and free]: a kernel reads a place only behind its ready event, a
///            copy writes a range only behind the free events of all that used it; and for the rest
///            Note [All that is order].
/// Blocking:  never blocks the host, except in the modes that say so (Policy), in `synchronize`,
///            `synchronize_onload`, `replan`, constructor and destructor, and when a submission
///            fails halfway: what it has left under way is waited for.
/// Lifetime:  device and loader must outlive the pipeline. The destructor drains what is in flight
///            and frees the window.
/// Threads:   one pass at a time; a second thread gets a StateError and changes nothing.
/// Throws:    what the device throws. A failed submission is undone first: afterwards nothing is
///            held that was not held before, and the next acquire copies afresh.
class Pipeline {
 public:
  /// Throws: ValueError for `sync` with `split`, MemoryError if the window does not fit.
  Pipeline(Device& device, Loader& loader, Plan plan, const PipelineOptions& options);
  Pipeline(const Pipeline&) = delete;
  Pipeline& operator=(const Pipeline&) = delete;
  ~Pipeline();

  /// Begins a pass, or counts one more nested call.
  /// Throws: StateError while another thread's pass is running, and in a forked child.
  void enter();
  /// Ends the pass with the outermost call; `completed` is false if an exception ended it.
  void leave(bool completed);

  /// Starts anew with another plan: empty places, an order still to be learned, counts per unit
  /// from zero. A window of another size is given back before the new one is taken.
  ///
  /// Blocking:  until nothing of ours is in flight any more.
  /// Throws:    StateError during a pass; MemoryError if the new window does not fit. The pipeline
  ///            then has its former plan again, with empty places. Where somebody else has taken
  ///            the former window's memory meanwhile there is no window, and every acquire throws
  ///            until a plan is found for which there is room.
  void replan(Plan plan);
  /// As replan, of a plan that there was before, to undo another one: where that fails there is no
  /// window, as above.
  void return_to(Plan plan);

  /// Makes the calling thread's stream wait for the unit's bytes, and lets copies run ahead.
  /// Returns where the bytes are; until the matching release they stay there.
  /// Throws: StateError outside a pass of this thread, or for a resident unit.
  std::byte* acquire(UnitIndex unit);
  /// Ends one use of the unit, after its last kernel was submitted.
  void release(UnitIndex unit);

  /// Says how the unit really travels from now on, for who reads the plan and for what runs ahead.
  /// Its place stays what it is.
  void set_transport(UnitIndex unit, Transport transport);

  /// Forgets the bytes in the unit's place, because its master has changed.
  /// Throws: StateError while the unit is acquired.
  void invalidate(UnitIndex unit);

  /// Blocks the host until no onload of the unit reads its master any more.
  void synchronize_onload(UnitIndex unit);
  /// Blocks the host until nothing of ours is in flight any more.
  void synchronize();
  /// Likewise, stream by stream, whatever fails. Returns whether nothing is in flight any more;
  /// else window and masters must stay where they are for good.
  bool drain() noexcept;

  /// Whether the unit's place holds its master's bytes, or will behind its ready event.
  bool is_whole(UnitIndex unit) const { return states_.at(unit).whole; }
  /// Whether those bytes were copied before the running pass began.
  bool copied_before_this_pass(UnitIndex unit) const {
    return states_.at(unit).whole && states_.at(unit).copied_in_pass != pass_;
  }
  bool is_acquired(UnitIndex unit) const { return states_.at(unit).acquired > 0; }
  bool in_pass() const { return nesting_ > 0; }
  /// Whether the calling thread may use the pipeline: no other thread's pass is running.
  bool is_mine() const;

  const Plan& plan() const { return plan_; }
  const Stats& stats() const { return stats_; }
  const UnitStats& unit_stats(UnitIndex unit) const { return unit_stats_.at(unit); }
  const PipelineOptions& options() const { return options_; }
  /// Copy streams first, then the compute streams of `split`, then the loader's.
  std::vector<StreamId> streams() const;
  /// False only after a replan for which there was no room.
  bool has_window() const { return window_.has_value(); }
  std::size_t window_bytes() const { return window_ ? window_->size_bytes() : 0; }
  AddressRange window() const {
    return AddressRange::of(window_ ? window_->memory() : nullptr, window_bytes());
  }
  /// Whether the address lies in the window or in a place of a unit's own.
  bool owns(const void* address) const;

 private:
  friend class PipelineState;  // of the lanes: what later calls depend on

  static constexpr std::size_t kNumKinds = 2;

  /// One unit and its place. Note [Pending] says what is behind the last group.
  struct UnitState {
    // What the place holds.
    std::byte* memory = nullptr;  // the place; nullptr for a resident unit
    bool whole = false;           // its master's bytes, or will behind `ready`
    bool awaited = false;         // whole and expected to be used: no prefetch may overwrite it
    bool fresh = false;           // whole and not used since: decides only what counts as a hit
    std::uint64_t generation = 0;
    std::uint64_t copied_in_pass = 0;

    // Who uses it.
    std::uint32_t acquired = 0;          // uses under way (a module may call itself)
    StreamId used_on = kNoStream;        // stream of the use under way, or of the last one
    std::vector<StreamId> also_used_on;  // streams that the use under way has come to since
    StreamId caller = kNoStream;         // `split`: the caller's stream, to go back to

    // Who must wait, and for what.
    EventId ready = kNoEvent;        // recorded behind each onload: for who reads
    EventId free = kNoEvent;         // recorded behind each use: for who writes
    StreamId loaded_on = kNoStream;  // stream that `ready` was recorded on
    EventId pending = kNoEvent;      // `ready` or `free`: for who writes into this range next,
    std::vector<StreamId> behind_pending;  // unless it is one of these

    void set_pending(EventId event) {
      pending = event;
      behind_pending.clear();
    }
    /// Whether the fields go together, as they do whenever nothing of this unit is being submitted.
    /// Only what is whole is awaited, fresh or in use, and what is in use is not fresh. (It may be
    /// awaited: it is expected once more.) Between two uses there is nothing to go back to.
    bool is_consistent() const {
      const bool is_in_use = acquired > 0;
      return (whole || !(awaited || fresh || is_in_use)) && !(fresh && is_in_use) &&
             (is_in_use || (also_used_on.empty() && caller == kNoStream)) &&
             (pending == kNoEvent || pending == ready || pending == free);
    }
  };

  /// Units that are brought ahead in one way, whatever becomes of those that come in the other.
  struct PrefetchQueue {
    std::size_t depth_bytes = 0;
    std::size_t ahead_bytes = 0;
    bool is_first = true;  // no unit of it was met yet
    bool is_over = false;  // nothing more of it comes ahead now
  };

  // --- one use of a unit: pipeline.cpp ---

  /// Throws: StateError unless this thread's pass may acquire the unit.
  void check_may_acquire(UnitIndex unit) const;
  /// Counts one more use of a unit in use, on the stream that is current now.
  void acquire_again(UnitIndex unit);
  /// Onloads the unit unless it is whole; counts a miss or a hit.
  void make_whole(UnitIndex unit);
  /// Holds the unit for a use on `stream`, which waits for its bytes.
  void begin_use(UnitIndex unit, StreamId stream);
  /// Undoes a begin_use whose unit could not be acquired.
  void give_up_acquire(UnitState& state);
  /// The state of a unit in use.
  UnitState& held_state(UnitIndex unit);
  /// Ends the use on all its streams; the first one waits for the others.
  void end_reads(UnitIndex unit);
  /// Overwrites the unit's bytes behind its use.
  void poison(UnitIndex unit);
  /// Remembers the end of the use for who writes into the place next; or has the host wait for it.
  void mark_free(UnitState& state);
  /// Waits for a use that could not be marked; if it was the last one, the unit is at rest then.
  void give_up_release(UnitState& state, bool is_last);
  /// Remembers that the use has come to `stream`. Returns whether that is news.
  static bool note_stream(UnitState& state, StreamId stream);
  /// Tells the log that `stream` reads the unit's place from now on.
  void begin_read(UnitIndex unit, StreamId stream);
  /// Tells the log that it no longer does.
  void end_read(UnitIndex unit, StreamId stream);
  /// Its place does not hold the master's bytes any more.
  static void forget(UnitState& state);
  /// With wait_for_each: warns if the unit's copy is not done; checks what is known of all units.
  void check_while_debugging(UnitIndex unit) const;

  // --- one stream behind another, and the host behind both: pipeline_streams.cpp ---

  /// Lets later work on `later` start only when all submitted to `earlier` so far is done.
  void order_after(StreamId later, StreamId earlier, Step step);
  /// The stream that the unit is to be used on, now current: in `split` behind the caller's.
  StreamId enter_compute_stream(UnitIndex unit);
  /// Goes back to the caller's stream, now behind the use, if another one was entered.
  void leave_compute_stream(UnitState& state);
  /// Makes the caller's stream current again, without any order.
  void return_to_caller(UnitState& state, Step step);
  /// Waits for the stream, whatever fails. Returns whether nothing is in flight there any more.
  bool drain(StreamId stream, Step step) noexcept;
  /// All streams that may have something of ours in flight.
  std::vector<std::pair<StreamId, Step>> streams_to_drain() const;

  // --- when units are copied, and behind what: pipeline_copies.cpp ---

  /// Which of copy_streams_ the unit is copied on.
  std::size_t copy_stream_index(UnitIndex unit) const;
  /// That stream, or the caller's in the mode that knows one.
  StreamId copy_stream(UnitIndex unit);
  /// The streams on which bytes may first reach a place.
  std::vector<StreamId> writers() const;
  /// Whether nothing in use would be overwritten, nor, unless `awaited_too`, what is awaited.
  bool may_overwrite(UnitIndex unit, bool awaited_too) const;
  /// Makes `writer` wait for what is pending on the unit's place, unless it is behind that already.
  void await_users(UnitState& state, StreamId writer, Step step);
  /// Submits what brings the unit into its place. The caller has made sure that it may_overwrite.
  void onload(UnitIndex unit);
  /// A miss: overwrites what was expected in vain, or gives the unit a place of its own.
  void onload_on_demand(UnitIndex unit);
  /// Brings units ahead along the expected order, as far as policy, depth and places allow.
  void prefetch_ahead();
  /// Brings the unit ahead. Returns whether others of its queue may follow.
  bool prefetch(UnitIndex unit, PrefetchQueue& queue);
  /// Whether the unit runs ahead among those that a decoder alone brings.
  bool is_in_decode_queue(UnitIndex unit) const {
    return plan_.stays_packed(unit) && !plan_.one_ring;
  }
  /// Tells the loader which units it will be asked for, by prefetches that come now as well.
  void announce_ahead();
  /// The pass went another way than expected: what was copied ahead may be overwritten again.
  void forget_expectations();

  // --- where units have their places: pipeline_places.cpp ---

  /// Goes on with this plan and empty places in the window that is there.
  void adopt(Plan plan);
  /// Makes what events the units of this plan need beyond those that are there.
  void make_events(const Plan& plan);
  /// What is known of units whose places are empty.
  std::vector<UnitState> states_of(const Plan& plan) const;
  /// Finds out which of the two ways to run ahead there are units for.
  void note_queues();
  /// For a unit called inside another one that its place overlaps: it keeps the new place for good.
  void give_own_place(UnitIndex unit);

  Device& device_;
  SteppedDevice steps_;  // the same one, for all that keeps order
  Loader& loader_;
  Plan plan_;  // without the overlaps of units that were given places of their own
  PipelineOptions options_;
  Policy policy_;
  std::unique_ptr<Order> order_;
  std::optional<DeviceMemory> window_;    // none only after a replan for which there was no room
  std::vector<DeviceMemory> own_places_;  // of units that are called inside one they overlap
  std::vector<UnitState> states_;         // by unit of the plan
  std::vector<UnitStats> unit_stats_;
  Stats stats_;
  std::array<StreamId, kNumKinds> copy_streams_{kNoStream, kNoStream};     // equal in `shared`
  std::array<StreamId, kNumKinds> compute_streams_{kNoStream, kNoStream};  // `split` only
  EventId handover_ = kNoEvent;  // recorded on the stream left, waited for by the one entered
  // Ready and free of one streamed unit after the other. Those of the plan with the most units stay
  // for the next one: an event lives as long as the device.
  std::vector<EventId> unit_events_;
  bool has_copied_units_ = false;  // units of the plan that come by copies, or share their ring,
  bool has_packed_units_ = false;  // and units that stay packed and have a ring of their own
  UnitIndex current_ = kNoUnit;    // the unit acquired last; copies run ahead of it
  std::uint64_t pass_ = 0;
  std::uint32_t nesting_ = 0;             // wrapped calls under way; guarded by owner_
  std::atomic<std::thread::id> owner_{};  // thread whose pass is running, or none
};

#ifdef TORCH_OFFLOAD_MUTANTS
}  // namespace mutants
#endif

}  // namespace torch_offload
