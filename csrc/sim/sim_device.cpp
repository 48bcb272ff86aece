#include "sim/sim_device.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

#include "core/error.h"

// Note [Virtual time]
// A submission is an entry at the end of its stream's list. What the device does with it is decided
// when the host asks for a time or an answer, never before: until then the host may still submit
// something that is ready earlier. So the device's clock may move up to the host's and no further,
// unless the host is blocked or has nothing more to submit.
//
// At every moment the device first does all that takes no time (records, waits that are over, the
// ends of what runs), on every stream; only then do free engines choose among all that is ready.
// Streams are few: the next moment is found by looking at each.
//
// Work begins at the earliest when its call begins and ends at the earliest when its call has
// returned: the host may take longer to launch a unit's kernels than they take to run. Records and
// waits are there from the return of their call on.
//
// Note [Two lines of time]
// What a unit's kernels take on the device and what their launches take on the host are two costs,
// and which of them a forward feels depends on the plan. Where all weights are resident, one token
// of a model takes as long as the host needs to launch it; where copies take longer, the host is
// far ahead and kernels run back to back. One duration cannot serve both: measured in the former it
// would make every kernel that a copy must wait for several times too long in the latter.

namespace torch_offload {

namespace {

constexpr std::int64_t kForever = std::numeric_limits<std::int64_t>::max();

// Where no process of Linux on 64 bits has memory of its own.
constexpr std::uintptr_t kFirstAddress = std::uintptr_t{1} << 56U;
constexpr std::uintptr_t kLastAddress = std::uintptr_t{1} << 62U;
constexpr std::uintptr_t kPageBytes = 4096;

}  // namespace

SimDevice::SimDevice(SimCosts costs)
    : costs_(std::move(costs)),
      free_copy_engines_(costs_.num_copy_engines),
      free_compute_engines_(costs_.shared_compute ? 1 : std::numeric_limits<int>::max()),
      next_address_(kFirstAddress) {
  check_costs(costs_);
  create_stream({"caller", StreamRole::kCompute, 0});
}

// --- streams, events, memory -------------------------------------------------------------------

void SimDevice::check_known(StreamId stream) const {
  check_internal(stream < streams_.size(), "no such stream");
}

const std::string& SimDevice::stream_name(StreamId stream) const {
  check_known(stream);
  return names_[stream];
}

StreamId SimDevice::do_create_stream(const StreamOptions& options) {
  Stream stream;
  stream.priority = options.priority;
  streams_.push_back(stream);
  names_.push_back(options.name);
  return static_cast<StreamId>(streams_.size() - 1);
}

void SimDevice::do_set_current_stream(StreamId stream) {
  check_known(stream);
  current_stream_ = stream;
}

EventId SimDevice::do_create_event() {
  last_record_.push_back(kNone);
  return static_cast<EventId>(last_record_.size() - 1);
}

void* SimDevice::make_address(std::size_t size_bytes) {
  const std::uintptr_t address = next_address_;
  if (size_bytes > kLastAddress - address) {
    throw MemoryError("expected " + std::to_string(size_bytes) +
                      " bytes of simulated memory, got more than there are addresses");
  }
  // A page between two ranges: what is beyond one is not in the next.
  next_address_ += (size_bytes / kPageBytes + 2) * kPageBytes;
  return reinterpret_cast<void*>(address);  // NOLINT(performance-no-int-to-ptr): that is the point
}

void* SimDevice::make_host_memory(std::size_t size_bytes) { return make_address(size_bytes); }
void* SimDevice::do_allocate(std::size_t size_bytes) { return make_address(size_bytes); }
void SimDevice::do_free(void* /*memory*/) {}
void SimDevice::do_register_host(void* /*memory*/, std::size_t /*size_bytes*/) {}
void SimDevice::do_unregister_host(void* /*memory*/) {}

// --- what the host submits ---------------------------------------------------------------------

void SimDevice::submit(StreamId stream, EntryKind kind, std::int64_t call_ns,
                       std::int64_t duration_ns) {
  check_known(stream);
  check_internal(entries_.size() < kNone, "too many calls for one simulation");
  Entry entry;
  entry.stream = stream;
  entry.kind = kind;
  entry.duration_ns = duration_ns;
  entry.returned_ns = host_ns_ + call_ns;
  const bool is_work = kind == EntryKind::kCopy || kind == EntryKind::kCompute;
  entry.visible_ns = is_work ? host_ns_ : entry.returned_ns;
  host_ns_ = entry.returned_ns;

  const auto index = static_cast<EntryIndex>(entries_.size());
  entries_.push_back(entry);
  Stream& queue = streams_[stream];
  (queue.tail == kNone ? queue.first : entries_[queue.tail].next) = index;
  queue.tail = index;
  if (queue.head == kNone) {
    queue.head = index;
    queue.state = StreamState::kDue;
    queue.due_ns = entry.visible_ns;
  }
}

void SimDevice::run(StreamId stream, std::int64_t duration_ns,
                    std::optional<std::int64_t> launch_ns) {
  submit(stream, EntryKind::kCompute, launch_ns.value_or(costs_.calls.launch_ns), duration_ns);
}

void SimDevice::spend_host_time(std::int64_t duration_ns) { host_ns_ += duration_ns; }

void SimDevice::do_copy(StreamId stream, const Copy& copy) {
  submit(stream, EntryKind::kCopy, costs_.calls.copy_ns, copy_duration_ns(costs_, copy));
}

void SimDevice::do_decode(StreamId stream, const Decode& decode) {
  submit(stream, EntryKind::kCompute, costs_.calls.launch_ns, decode_duration_ns(costs_, decode));
}

void SimDevice::do_fill(StreamId stream, void* /*memory*/, std::size_t /*size_bytes*/,
                        std::uint8_t /*value*/) {
  submit(stream, EntryKind::kFill, 0);
}

void SimDevice::do_record(EventId event, StreamId stream) {
  check_internal(event < last_record_.size(), "no such event");
  submit(stream, EntryKind::kRecord, costs_.calls.record_ns);
  last_record_[event] = streams_[stream].tail;
}

void SimDevice::do_wait(StreamId stream, EventId event) {
  submit(stream, EntryKind::kWait, costs_.calls.wait_ns);
  entries_.back().awaited = last_record_[event];  // kNone: recorded before the clocks were reset
}

// --- what the host asks ------------------------------------------------------------------------

bool SimDevice::do_is_done(EventId event) {
  const EntryIndex record = last_record_[event];
  if (record == kNone) {
    return true;
  }
  while (entries_[record].end_ns == kNotYet && step(host_ns_)) {
  }
  return entries_[record].end_ns != kNotYet;
}

void SimDevice::do_synchronize(StreamId stream) {
  check_known(stream);
  const std::int64_t called_ns = host_ns_;
  while (streams_[stream].head != kNone) {
    step_blocked();
  }
  host_ns_ = std::max(host_ns_, device_ns_);
  host_blocked_ns_ += host_ns_ - called_ns;
  host_ns_ += costs_.calls.synchronize_ns;
}

SimDevice::Point SimDevice::end_of(StreamId stream) const {
  check_known(stream);
  Point point;
  point.entry_ = streams_[stream].tail;
  point.stream_ = stream;
  point.marked_ns_ = host_ns_;
  return point;
}

std::int64_t SimDevice::time_of(const Point& point) {
  EntryIndex next = kNone;
  if (point.is_next_) {
    next = point.entry_ == kNone ? streams_[point.stream_].first : entries_[point.entry_].next;
  }
  // Nothing came next if its submission failed.
  const EntryIndex index = next != kNone ? next : point.entry_;
  if (index == kNone) {
    return point.marked_ns_;
  }
  const Entry& entry = entries_[index];
  const std::int64_t& reached_ns = next != kNone ? entry.begin_ns : entry.end_ns;
  while (reached_ns == kNotYet) {
    step_blocked();
  }
  const std::int64_t time_ns = std::max(reached_ns, point.marked_ns_);
  host_ns_ = std::max({host_ns_, device_ns_, time_ns});
  return time_ns;
}

MarkId SimDevice::do_mark(StreamId stream, MarkPoint point) {
  marks_.push_back(end_of(stream));
  marks_.back().is_next_ = point == MarkPoint::kNextBegins;
  return static_cast<MarkId>(marks_.size() - 1);
}

std::vector<std::int64_t> SimDevice::do_take_marks() {
  std::vector<std::int64_t> times_ns;
  times_ns.reserve(marks_.size());
  for (const Point& mark : marks_) {
    times_ns.push_back(time_of(mark));
  }
  marks_.clear();
  return times_ns;
}

void SimDevice::reset_clocks() {
  check_internal(marks_.empty(), "clocks set back under a log with times");
  for (Stream& stream : streams_) {
    check_internal(stream.head == kNone, "clocks set back while a stream is at work");
    stream.first = stream.tail = kNone;
  }
  std::fill(last_record_.begin(), last_record_.end(), kNone);
  entries_.clear();
  host_ns_ = host_blocked_ns_ = device_ns_ = 0;
}

// --- what the device does ----------------------------------------------------------------------

/// Lets the next thing happen that happens at `limit_ns` or before; false if there is none.
bool SimDevice::step(std::int64_t limit_ns) {
  Stream* next = nullptr;
  for (Stream& stream : streams_) {
    const bool has_date =
        stream.state == StreamState::kDue || stream.state == StreamState::kRunning;
    if (has_date && (next == nullptr || stream.due_ns < next->due_ns)) {
      next = &stream;
    }
  }
  if (next == nullptr || next->due_ns > device_ns_) {
    // All of this moment has happened; at the limit itself the host may still submit more.
    if (device_ns_ < limit_ns && start_one()) {
      return true;
    }
    if (next == nullptr || next->due_ns > limit_ns) {
      return false;
    }
    device_ns_ = next->due_ns;
  }
  if (next->state == StreamState::kRunning) {
    ++free_engines(entries_[next->head].kind);
    next->head = entries_[next->head].next;
  }
  go_on(*next);
  return true;
}

/// Lets the next thing happen while the host waits and submits nothing.
void SimDevice::step_blocked() {
  // A wait is for a record that was submitted before it, so the oldest entry can always go on.
  check_internal(step(kForever), "a deadlock in virtual time");
}

/// Carries a stream as far as it comes at this moment.
void SimDevice::go_on(Stream& stream) {
  for (; stream.head != kNone; stream.head = entries_[stream.head].next) {
    Entry& entry = entries_[stream.head];
    if (entry.visible_ns > device_ns_) {
      stream.state = StreamState::kDue;
      stream.due_ns = entry.visible_ns;
      return;
    }
    if (entry.kind == EntryKind::kCopy || entry.kind == EntryKind::kCompute) {
      stream.state = StreamState::kReady;
      stream.due_ns = device_ns_;
      return;
    }
    entry.begin_ns = device_ns_;
    if (entry.awaited != kNone && entries_[entry.awaited].end_ns == kNotYet) {
      entry.waiter = std::exchange(entries_[entry.awaited].waiter, stream.head);
      stream.state = StreamState::kBlocked;
      return;
    }
    entry.end_ns = device_ns_;
    if (entry.kind == EntryKind::kRecord) {
      release_waiters(entry);
    }
  }
  stream.state = StreamState::kIdle;
}

void SimDevice::release_waiters(const Entry& record) {
  for (EntryIndex waiter = record.waiter; waiter != kNone; waiter = entries_[waiter].waiter) {
    entries_[waiter].end_ns = device_ns_;
    Stream& stream = streams_[entries_[waiter].stream];
    stream.head = entries_[waiter].next;
    stream.state = StreamState::kDue;
    stream.due_ns = device_ns_;
  }
}

int& SimDevice::free_engines(EntryKind kind) {
  return kind == EntryKind::kCopy ? free_copy_engines_ : free_compute_engines_;
}

/// Gives a free engine to the first of those that are ready for it; false if there is none.
bool SimDevice::start_one() {
  Stream* first = nullptr;
  const auto rank = [](const Stream& stream) {
    return std::tuple(stream.priority, stream.due_ns, stream.head);
  };
  for (Stream& stream : streams_) {
    if (stream.state == StreamState::kReady && free_engines(entries_[stream.head].kind) > 0 &&
        (first == nullptr || rank(stream) < rank(*first))) {
      first = &stream;
    }
  }
  if (first == nullptr) {
    return false;
  }
  Entry& entry = entries_[first->head];
  --free_engines(entry.kind);
  entry.begin_ns = device_ns_;
  entry.end_ns = std::max(device_ns_ + entry.duration_ns, entry.returned_ns);
  first->state = StreamState::kRunning;
  first->due_ns = entry.end_ns;
  return true;
}

}  // namespace torch_offload
