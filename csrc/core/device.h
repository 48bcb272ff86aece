#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/op_log.h"
#include "core/unit.h"

namespace torch_offload {

enum class StreamRole : std::uint8_t {
  kCopy,     ///< Host-to-device copies, or decoders; nobody else submits to it.
  kCompute,  ///< The model's own kernels.
};

struct StreamOptions {
  std::string name;
  StreamRole role = StreamRole::kCopy;
  int priority = 0;  ///< As in CUDA: lower runs first.
};

/// One asynchronous copy from page-locked host memory to device memory.
struct Copy {
  void* destination = nullptr;
  const void* source = nullptr;
  std::size_t size_bytes = 0;
  UnitIndex unit = kNoUnit;
  std::uint64_t generation = 0;
};

/// The decoding of one packed unit, from device memory to device memory.
struct Decode {
  void* destination = nullptr;  ///< The unit's place ...
  std::size_t size_bytes = 0;   ///< ... all of it.
  const void* source = nullptr;
  std::size_t packed_bytes = 0;
  std::uint32_t num_tiles = 0;  ///< As the packed unit's header says.
  UnitIndex unit = kNoUnit;
  std::uint64_t generation = 0;
};

/// Which point of a stream is to be marked.
enum class MarkPoint : std::uint8_t {
  kReached,     ///< All that was submitted to the stream is done.
  kNextBegins,  ///< What is submitted next begins: later than kReached if it waits for an engine.
  kRecorded,  ///< As kReached, behind a record. A device to which marks cost may decline: kNoMark.
};

/// What was asked of a Device since it was made. Plain counts, never reset.
struct DeviceCounters {
  std::uint64_t copies = 0;
  std::uint64_t bytes_copied = 0;
  std::uint64_t decodes = 0;
  std::uint64_t records = 0;
  std::uint64_t waits = 0;
  std::uint64_t host_synchronizes = 0;  ///< The host waited because it was told to.
  std::uint64_t caller_waits = 0;       ///< HostDevice: the caller's stream is the calling thread.
  std::uint64_t allocations = 0;
  std::uint64_t allocated_bytes = 0;   ///< Live now.
  std::uint64_t registrations = 0;     ///< Live now.
  std::uint64_t registered_bytes = 0;  ///< Live now.
  std::uint64_t streams = 0;           ///< Made; they live as long as the device.
  std::uint64_t events = 0;            ///< Likewise.
};

/// Streams, events and memory, as the pipeline sees them: CUDA, host threads, or virtual time.
///
/// The public calls check, count and log, then call the `do_` half that a device implements: what
/// the log says is by construction what was submitted, on every device.
///
/// Ordering:  what is submitted to one stream runs in that order; nothing else is promised.
/// Blocking:  only `synchronize` blocks the host. (HostDevice's caller stream is the calling
///            thread, so a wait on it blocks too; that is counted as `caller_waits`.)
/// Threads:   one caller at a time.
class Device {
 public:
  Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  virtual ~Device() = default;

  /// Makes a stream that lives as long as the device.
  StreamId create_stream(const StreamOptions& options);
  /// Name of any stream seen so far, the callers' streams included.
  virtual const std::string& stream_name(StreamId stream) const = 0;

  /// The stream that the calling thread's kernels go to at this very moment. Never cache it.
  StreamId current_stream() { return do_current_stream(); }
  /// Sends the calling thread's later kernels to `stream`.
  void set_current_stream(StreamId stream) { do_set_current_stream(stream); }

  /// Declares that the calling thread's kernels went to `stream` so far; only logged. Whoever means
  /// to send them elsewhere says so before he orders the other stream behind this one ...
  void leave_stream(StreamId stream);
  /// ... and then sends the later ones, which need what the earlier have done, to `stream`.
  void enter_stream(StreamId stream);
  /// Likewise, back to the stream that was left for the one entered last.
  void return_to_stream(StreamId stream);

  EventId create_event();
  /// Marks the point that `stream` has reached. An event may be recorded again and again.
  void record(EventId event, StreamId stream);
  /// Lets later work on `stream` start only when `event`, as recorded last, is done.
  /// Throws: InternalError on an event that was never recorded (CUDA would silently not wait).
  void wait(StreamId stream, EventId event);
  /// Whether `event`, as recorded last, is done. Throws InternalError if it never was recorded.
  bool is_done(EventId event);
  /// Blocks the host until all that was submitted to `stream` is done.
  void synchronize(StreamId stream);

  /// Submits a copy.
  /// Lifetime: source and destination must stay valid until the copy is done.
  /// Throws: ValueError if the source is not page-locked memory of this device: such a copy would
  /// block the host without saying so.
  void copy(StreamId stream, const Copy& copy);

  /// Submits the decoding of a packed unit that was checked on the host.
  /// Lifetime: source and destination must stay valid until it is done.
  /// Throws: NotImplementedError if this device cannot (see can_decode).
  void decode(StreamId stream, const Decode& decode);
  virtual bool can_decode() const { return false; }

  /// Declares that work submitted to `stream` from now on may read the place of `unit` ...
  ///
  /// A unit that is in use on one stream may come to be used on another as well: begun there or
  /// not, the reads end there with an end_read of that stream, and all with that of the first.
  void begin_read(StreamId stream, const void* memory, std::size_t size_bytes, UnitIndex unit,
                  std::uint64_t generation);
  /// ... and that no work submitted later does. Both only leave their trace in the log.
  void end_read(StreamId stream, const void* memory, std::size_t size_bytes, UnitIndex unit,
                std::uint64_t generation);

  /// Sets every byte of device memory to `value`. For poisoning places that nobody may read.
  void fill(StreamId stream, void* memory, std::size_t size_bytes, std::uint8_t value,
            UnitIndex unit);

  /// Device memory, aligned to kAlignmentBytes. Throws MemoryError.
  /// Ordering: kernels submitted to the current stream so far may still use it, as they belong to
  /// whoever had it before: other streams' first access comes behind them.
  void* allocate(std::size_t size_bytes);
  /// Lifetime: nothing may be in flight to or from `memory`.
  void free(void* memory);

  /// Page-locks host memory; `memory` and `size_bytes` are multiples of the page size, and no
  /// byte is registered twice. Throws MemoryError with nothing registered.
  void register_host(void* memory, std::size_t size_bytes);
  /// Page-locks ranges of a read-only mapping of a file, all or none, by several threads. Each is a
  /// registration of its own; begins and ends are multiples of the page size, and no byte is
  /// registered twice. `prepare` is called for each before, on the thread that registers it.
  ///
  /// Blocking:  until they are locked; no thread outlives the call.
  /// Throws:    what `prepare` throws; MemoryError, with nothing registered.
  void register_read_only(const std::vector<AddressRange>& ranges,
                          const std::function<void(const AddressRange&)>& prepare);
  /// Lifetime: nothing may be in flight from `memory`.
  void unregister_host(void* memory);

  /// Declares that the host itself reads or writes memory that copies use; only logged.
  void host_read(const void* memory, std::size_t size_bytes, UnitIndex unit);
  void host_write(const void* memory, std::size_t size_bytes, UnitIndex unit);

  /// Whether what is submitted to the current stream is captured instead of carried out: then no
  /// event may be waited for that was recorded before.
  virtual bool is_capturing() const { return false; }

  /// The node of host memory that the device's link ends at; none where the system does not say.
  virtual std::optional<int> host_node() const { return std::nullopt; }

  /// Appends every later call to `log`, until called with another one or with nullptr. With times,
  /// each op also tells when the device carried it out, from when the log is detached on.
  ///
  /// Blocking:  attaching and detaching a log with times wait for what was submitted to streams.
  /// Lifetime:  `log` must outlive its being attached. It belongs to this device.
  void attach_log(OpLog* log, bool with_times = false);

  const DeviceCounters& counters() const { return counters_; }

  /// Whether this process was forked from the one that made the device. Streams, threads and CUDA
  /// do not survive a fork: nothing may be submitted, waited for or given back here.
  bool in_forked_child() const;

 protected:
  virtual StreamId do_create_stream(const StreamOptions& options) = 0;
  virtual StreamId do_current_stream() = 0;
  virtual void do_set_current_stream(StreamId stream) = 0;
  virtual EventId do_create_event() = 0;
  virtual void do_record(EventId event, StreamId stream) = 0;
  virtual void do_wait(StreamId stream, EventId event) = 0;
  virtual bool do_is_done(EventId event) = 0;
  virtual void do_synchronize(StreamId stream) = 0;
  virtual void do_copy(StreamId stream, const Copy& copy) = 0;
  virtual void do_decode(StreamId stream, const Decode& decode);
  virtual void do_fill(StreamId stream, void* memory, std::size_t size_bytes,
                       std::uint8_t value) = 0;
  virtual void* do_allocate(std::size_t size_bytes) = 0;
  virtual void do_free(void* memory) = 0;
  virtual void do_register_host(void* memory, std::size_t size_bytes) = 0;
  /// Called by several threads at once. Memory that nobody writes is locked like any other where
  /// the device makes no difference.
  virtual void do_register_read_only(void* memory, std::size_t size_bytes) {
    do_register_host(memory, size_bytes);
  }
  virtual void do_unregister_host(void* memory) = 0;

  // Called only while a log is attached; all but the first only while it keeps times.

  /// The host's clock, which is monotonic.
  virtual std::int64_t do_host_time_ns() const { return steady_time_ns(); }
  /// Prepares for marks. Nothing is marked now.
  virtual void do_start_marks() {}
  /// Marks a point of `stream`, to be told by do_take_marks when the stream came there. A device
  /// that keeps no times declines with kNoMark.
  virtual MarkId do_mark(StreamId stream, MarkPoint point);
  /// Blocks the host until every marked point is reached. Returns when that was, by MarkId and by
  /// the host's clock, and forgets the marks.
  virtual std::vector<std::int64_t> do_take_marks() { return {}; }

  static std::int64_t steady_time_ns();

  DeviceCounters counters_;

 private:
  template <typename Call>
  void submit(Op op, Call call);
  template <typename Call>
  void submit_logged(Op& op, Call call);
  void check_unregistered(const AddressRange& range) const;
  void note_registered(const AddressRange& range);
  void check_recorded(EventId event, const char* call) const;
  void go_to_stream(OpKind kind, StreamId stream);
  void detach_log();

  const std::int64_t process_;  // that made the device
  OpLog* log_ = nullptr;
  bool log_has_times_ = false;
  std::vector<bool> recorded_;                            // by EventId
  std::map<void*, std::size_t> allocations_;              // live device memory
  std::map<std::uintptr_t, std::uintptr_t> page_locked_;  // live registrations, begin -> end
};

}  // namespace torch_offload
