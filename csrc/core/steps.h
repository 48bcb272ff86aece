#pragma once

#include <cstdint>

namespace torch_offload {

/// What keeps the pipeline's order: its waits, records, drains, and what it remembers for them.
///
/// Each is named at the place where it is taken. The lanes build the pipeline a second time with
/// TORCH_OFFLOAD_MUTANTS, leave the steps out or move them, one at a time, and see that this is
/// noticed: no step is there in vain, and none could go missing in silence. That pipeline lives in
/// a namespace of its own, so that both can be linked together; the product's leaves nothing out
/// and pays nothing.
enum class Step : std::uint8_t {
  // A reader behind its copy.
  kReadyRecord,      ///< Behind the copy.
  kReadyWait,        ///< Of the stream that reads.
  kNestedReadyWait,  ///< Of another stream, to which a unit called inside itself has come.
  kHostReadyWait,    ///< Of the host, in the modes without events.

  // A copy behind the readers, and the copies, whose bytes it overwrites.
  kFreeRecord,          ///< Behind the last kernel of a use.
  kPendingFree,         ///< Remembers it for the copy that comes.
  kPendingReady,        ///< Remembers a copy for one on the other copy stream.
  kOwnPendingWait,      ///< For the last use of the unit itself.
  kOverlapPendingWait,  ///< For that of each unit that shares bytes with it.
  kOverlapForget,       ///< Those units are no longer whole.
  kHeldGuard,           ///< Nothing is copied where a unit is in use.
  kHostFreeWait,        ///< Of the host, in the modes without events.
  kPoisonForget,        ///< A poisoned unit is no longer whole.

  // A use that comes to several streams.
  kEarlierStreamWait,  ///< A use on another stream than the last one, whose `free` it records anew.
  kLaterStreamsNote,   ///< Remembers the streams that the use comes to.
  kLaterStreamsJoin,   ///< The first one waits for them before `free` is recorded.

  // The caller's kernels, in `split`.
  kEnterOrder,      ///< The unit behind what its caller has computed.
  kReturnOrder,     ///< The caller behind the unit.
  kCallerReturn,    ///< The caller's stream is current again.
  kHandoverRecord,  ///< One half of every order between two streams,
  kHandoverWait,    ///< and the other.

  // Memory that is new or goes.
  kNewWindowDrain,    ///< The allocator's last tenant may still use the window.
  kNewPlaceOrder,     ///< Likewise a place that a nested unit gets.
  kOldPlaceWait,      ///< Its old place is left to copies that will not ask for it.
  kDrainOwnStreams,   ///< Before masters and window go.
  kDrainUsedStreams,  ///< Likewise, of the callers.
  kReplanDrain,       ///< Before the window is divided anew.
  kOnloadDrain,       ///< Before a master is edited.

  // A packed unit on its way through the staging ring, or to where it stays.
  kNewStagingDrain,  ///< The allocator's last tenant may still use the memory.
  kStagedRecord,     ///< Behind the copy into the ring,
  kStagedWait,       ///< which the decoder must not overtake.
  kDecodedRecord,    ///< Behind the decoder,
  kDecodedWait,      ///< which the next copy into the same slot must not overtake.
  kUploadDrain,      ///< Before what was packed to stay on the device is packed anew.

  // Pages of checkpoint files, which are locked while copies read them.
  kChunkRecord,  ///< Behind the last copy from a chunk,
  kChunkDrain,   ///< which is waited for before the chunk is unlocked.
  kLimitDrain,   ///< Of copies from before chunks took turns, which no record tells of.
  kOnceDrain,    ///< Likewise, before chunks are unlocked that were locked for a single copy.

  // After a failure.
  kFailedOnloadDrain,   ///< Half a copy, that no event tells of.
  kFailedUploadDrain,   ///< Likewise, of what was to stay packed.
  kFailedAcquireDrain,  ///< A copy that no event tells of, in the modes without.
  kFailedReleaseDrain,  ///< A use that no event tells of, and those of the streams that it came to.
  kFailedAcquireReturn,  ///< The caller's stream is current again,
  kFailedReleaseReturn,  ///< whichever call failed.

  kNone,  ///< Of what nothing hangs on but the pace.
};

#ifdef TORCH_OFFLOAD_MUTANTS
inline namespace mutants {
/// Whether a lane wants the pipeline to go wrong here.
bool is_left_out(Step step);
}  // namespace mutants
#else
constexpr bool is_left_out(Step /*step*/) { return false; }
#endif

}  // namespace torch_offload
