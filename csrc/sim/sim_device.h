#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "core/device.h"
#include "sim/sim_costs.h"

namespace torch_offload {

/// A Device in virtual time: durations are given, not spent, and no byte is moved.
///
/// Two clocks. The *host's* moves on by the cost of each call, and in `synchronize` to the end of a
/// stream. The *device's* lags behind: it plays out only what the host could not change any more,
/// so that work which is submitted later but is ready earlier goes first, as on the hardware. See
/// Note [Virtual time].
///
/// Engines: copies of all streams share `num_copy_engines`, kernels of all streams share the SMs:
/// they run one after the other (two kernels that each fill the GPU take as long side by side as in
/// turn). A free engine takes what is ready: the stream of the higher priority first, then what has
/// been ready longer. Fills take no time; they are for debugging.
///
/// Memory: addresses are made up and never used again; nobody may read or write there.
///
/// Lifetime:  keeps about 100 bytes for each call until reset_clocks() or the end.
/// Threads:   one caller at a time.
/// Throws:    ValueError for a copy whose duration the costs do not say.
class SimDevice : public Device {
 public:
  /// Throws: ValueError for costs that cannot be.
  explicit SimDevice(SimCosts costs);

  const std::string& stream_name(StreamId stream) const override;
  bool can_decode() const override { return true; }

  /// Submits the kernels of one unit, as one piece of work. Costs the host `launch_ns`, or what
  /// launching costs by default.
  void run(StreamId stream, std::int64_t duration_ns, std::optional<std::int64_t> launch_ns = {});
  /// Lets the host do something else.
  void spend_host_time(std::int64_t duration_ns);

  /// Addresses for `size_bytes` of host memory, to be registered by the caller.
  void* make_host_memory(std::size_t size_bytes);

  std::int64_t host_time_ns() const { return host_ns_; }
  /// How long `synchronize` has kept the host waiting, all in all.
  std::int64_t host_blocked_ns() const { return host_blocked_ns_; }

  /// A point of a stream, whose time can be asked for later.
  class Point;
  /// The point where all that was submitted to `stream` so far is done, but not before now.
  Point end_of(StreamId stream) const;
  /// Blocks the host until the stream has come to that point; returns when that was.
  std::int64_t time_of(const Point& point);

  /// Sets both clocks back to zero and forgets what has been blocked. Everything must be done, no
  /// log with times be attached, and no Point be used any more.
  void reset_clocks();

  /// The calling thread's own stream; what current_stream() is unless set otherwise.
  static constexpr StreamId kCallerStream = 0;

 protected:
  StreamId do_create_stream(const StreamOptions& options) override;
  StreamId do_current_stream() override { return current_stream_; }
  void do_set_current_stream(StreamId stream) override;
  EventId do_create_event() override;
  void do_record(EventId event, StreamId stream) override;
  void do_wait(StreamId stream, EventId event) override;
  bool do_is_done(EventId event) override;
  void do_synchronize(StreamId stream) override;
  void do_copy(StreamId stream, const Copy& copy) override;
  void do_decode(StreamId stream, const Decode& decode) override;
  void do_fill(StreamId stream, void* memory, std::size_t size_bytes, std::uint8_t value) override;
  void* do_allocate(std::size_t size_bytes) override;
  void do_free(void* memory) override;
  void do_register_host(void* memory, std::size_t size_bytes) override;
  void do_unregister_host(void* memory) override;
  std::int64_t do_host_time_ns() const override { return host_ns_; }
  MarkId do_mark(StreamId stream, MarkPoint point) override;
  std::vector<std::int64_t> do_take_marks() override;

 private:
  using EntryIndex = std::uint32_t;
  static constexpr EntryIndex kNone = UINT32_MAX;
  static constexpr std::int64_t kNotYet = -1;

  enum class EntryKind : std::uint8_t { kCopy, kCompute, kFill, kRecord, kWait };

  /// One submission. Entries of a stream are a list, in the order of submission.
  struct Entry {
    std::int64_t visible_ns = 0;   // the device sees it from here on
    std::int64_t returned_ns = 0;  // the call that submits it returns
    std::int64_t duration_ns = 0;  // of a copy or a compute
    std::int64_t begin_ns = kNotYet;
    std::int64_t end_ns = kNotYet;  // known as soon as it has begun, but for a wait
    EntryIndex next = kNone;        // on the same stream
    EntryIndex awaited = kNone;     // of a wait: the record it is for
    EntryIndex waiter = kNone;      // of a record: the first that waits for it; of that: the next
    StreamId stream = kNoStream;
    EntryKind kind = EntryKind::kCopy;
  };

  enum class StreamState : std::uint8_t {
    kIdle,     // nothing is left to do
    kDue,      // its head is to be looked at, at `due_ns`
    kBlocked,  // its head waits for a record that was not reached
    kReady,    // its head waits for an engine, since `due_ns`
    kRunning,  // its head runs, until `due_ns`
  };

  struct Stream {
    int priority = 0;
    EntryIndex first = kNone;  // of all that were submitted
    EntryIndex head = kNone;   // the first that is not over
    EntryIndex tail = kNone;   // the last that was submitted
    StreamState state = StreamState::kIdle;
    std::int64_t due_ns = 0;
  };

  void check_known(StreamId stream) const;
  void submit(StreamId stream, EntryKind kind, std::int64_t call_ns, std::int64_t duration_ns = 0);
  bool step(std::int64_t limit_ns);
  void step_blocked();
  void go_on(Stream& stream);
  void release_waiters(const Entry& record);
  bool start_one();
  int& free_engines(EntryKind kind);
  void* make_address(std::size_t size_bytes);

  const SimCosts costs_;
  std::vector<Stream> streams_;
  std::deque<std::string> names_;  // a deque: stream_name() hands out references
  std::vector<Entry> entries_;
  std::vector<EntryIndex> last_record_;  // by EventId
  std::vector<Point> marks_;             // by MarkId
  StreamId current_stream_ = kCallerStream;
  std::int64_t host_ns_ = 0;
  std::int64_t host_blocked_ns_ = 0;
  std::int64_t device_ns_ = 0;
  int free_copy_engines_;
  int free_compute_engines_;
  std::uintptr_t next_address_;
};

class SimDevice::Point {
  friend class SimDevice;
  EntryIndex entry_ = kNone;  // the last one submitted before the point
  StreamId stream_ = kNoStream;
  std::int64_t marked_ns_ = 0;  // by the host's clock
  bool is_next_ = false;        // the beginning of the next entry is meant, not the end of this one
};

}  // namespace torch_offload
