#include "core/device.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <iterator>
#include <utility>

#include "core/error.h"

namespace torch_offload {

namespace {

Op op_of(OpKind kind, StreamId stream = kNoStream, EventId event = kNoEvent) {
  Op op;
  op.kind = kind;
  op.stream = stream;
  op.event = event;
  return op;
}

}  // namespace

Device::Device() : process_(getpid()) {}

bool Device::in_forked_child() const { return getpid() != process_; }

// --- the log -----------------------------------------------------------------------------------

std::int64_t Device::steady_time_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

MarkId Device::do_mark(StreamId /*stream*/, MarkPoint /*point*/) { return kNoMark; }

void Device::attach_log(OpLog* log, bool with_times) {
  detach_log();
  log_has_times_ = log != nullptr && with_times;
  if (log_has_times_) {
    do_start_marks();
  }
  if (log != nullptr) {
    log->begin(recorded_);
  }
  log_ = log;
}

void Device::detach_log() {
  OpLog* const log = std::exchange(log_, nullptr);  // first: whatever fails below, it is let go
  if (log == nullptr || in_forked_child()) {
    return;
  }
  StreamId num_streams = 0;
  for (const Op& op : log->ops()) {
    num_streams = op.stream == kNoStream ? num_streams : std::max(num_streams, op.stream + 1);
  }
  std::vector<std::string> names;
  names.reserve(num_streams);
  for (StreamId stream = 0; stream < num_streams; ++stream) {
    names.push_back(stream_name(stream));
  }
  log->set_stream_names(std::move(names));
  if (log_has_times_) {
    log->resolve(do_take_marks());
  }
}

/// Does `call` and logs it: what failed was not submitted. `call` may still add to the op.
template <typename Call>
void Device::submit(Op op, Call call) {
  if (log_ == nullptr) {
    call(op);
  } else {
    submit_logged(op, call);
  }
}

template <typename Call>
void Device::submit_logged(Op& op, Call call) {
  op.host_time_ns = do_host_time_ns();
  OpMarks marks;
  if (log_has_times_ &&
      (op.kind == OpKind::kCopy || op.kind == OpKind::kFill || op.kind == OpKind::kWait)) {
    marks.begin = do_mark(op.stream, MarkPoint::kNextBegins);
  }
  call(op);
  if (log_has_times_) {
    switch (op.kind) {
      case OpKind::kCopy:
      case OpKind::kFill:
      case OpKind::kWait:
        marks.end = do_mark(op.stream, MarkPoint::kReached);
        break;
      case OpKind::kRead:
      case OpKind::kReadEnd:
        marks.begin = marks.end = do_mark(op.stream, MarkPoint::kReached);
        break;
      case OpKind::kRecord:
        marks.begin = marks.end = do_mark(op.stream, MarkPoint::kRecorded);
        break;
      case OpKind::kSynchronize:
        op.begin_ns = op.host_time_ns;
        op.end_ns = do_host_time_ns();
        break;
      default:
        break;
    }
  }
  log_->append(op, marks);
}

void Device::check_recorded(EventId event, const char* call) const {
  if (event >= recorded_.size() || !recorded_[event]) {
    throw InternalError(std::string("torch_offload: internal error: ") + call + " on event " +
                        std::to_string(event) + ", which was never recorded");
  }
}

// --- the calls ---------------------------------------------------------------------------------

StreamId Device::create_stream(const StreamOptions& options) {
  const StreamId stream = do_create_stream(options);
  ++counters_.streams;
  return stream;
}

EventId Device::create_event() {
  const EventId event = do_create_event();
  ++counters_.events;
  if (event >= recorded_.size()) {
    recorded_.resize(event + 1, false);
  }
  return event;
}

void Device::leave_stream(StreamId stream) {
  submit(op_of(OpKind::kLeave, stream), [](Op& /*op*/) {});
}

void Device::enter_stream(StreamId stream) { go_to_stream(OpKind::kEnter, stream); }

void Device::return_to_stream(StreamId stream) { go_to_stream(OpKind::kReturn, stream); }

void Device::go_to_stream(OpKind kind, StreamId stream) {
  submit(op_of(kind, stream), [&](Op& /*op*/) { do_set_current_stream(stream); });
}

void Device::record(EventId event, StreamId stream) {
  submit(op_of(OpKind::kRecord, stream, event), [&](Op& /*op*/) {
    do_record(event, stream);
    recorded_.at(event) = true;
    ++counters_.records;
  });
}

void Device::wait(StreamId stream, EventId event) {
  check_recorded(event, "wait");
  submit(op_of(OpKind::kWait, stream, event), [&](Op& /*op*/) {
    do_wait(stream, event);
    ++counters_.waits;
  });
}

bool Device::is_done(EventId event) {
  check_recorded(event, "is_done");
  bool done = false;
  submit(op_of(OpKind::kQuery, kNoStream, event),
         [&](Op& op) { op.is_done = done = do_is_done(event); });
  return done;
}

void Device::synchronize(StreamId stream) {
  submit(op_of(OpKind::kSynchronize, stream), [&](Op& /*op*/) {
    do_synchronize(stream);
    ++counters_.host_synchronizes;
  });
}

void Device::copy(StreamId stream, const Copy& copy) {
  const AddressRange source = AddressRange::of(copy.source, copy.size_bytes);
  auto next = page_locked_.upper_bound(source.begin);
  if (next == page_locked_.begin() || std::prev(next)->second < source.end) {
    throw ValueError(
        "expected the source of a copy to be page-locked memory registered with this "
        "device, got " +
        std::to_string(copy.size_bytes) +
        " bytes that are not, or that cross from one registration into another; "
        "such a copy would block the host silently");
  }
  submit(op_of(OpKind::kCopy, stream), [&](Op& op) {
    do_copy(stream, copy);
    ++counters_.copies;
    counters_.bytes_copied += copy.size_bytes;
    op.unit = copy.unit;
    op.generation = copy.generation;
    op.memory = AddressRange::of(copy.destination, copy.size_bytes);
    op.source = source;
  });
}

void Device::begin_read(StreamId stream, const void* memory, std::size_t size_bytes, UnitIndex unit,
                        std::uint64_t generation) {
  submit(op_of(OpKind::kRead, stream), [&](Op& op) {
    op.unit = unit;
    op.generation = generation;
    op.memory = AddressRange::of(memory, size_bytes);
  });
}

void Device::end_read(StreamId stream, const void* memory, std::size_t size_bytes, UnitIndex unit,
                      std::uint64_t generation) {
  submit(op_of(OpKind::kReadEnd, stream), [&](Op& op) {
    op.unit = unit;
    op.generation = generation;
    op.memory = AddressRange::of(memory, size_bytes);
  });
}

void Device::fill(StreamId stream, void* memory, std::size_t size_bytes, std::uint8_t value,
                  UnitIndex unit) {
  submit(op_of(OpKind::kFill, stream), [&](Op& op) {
    do_fill(stream, memory, size_bytes, value);
    op.unit = unit;
    op.memory = AddressRange::of(memory, size_bytes);
  });
}

void* Device::allocate(std::size_t size_bytes) {
  void* memory = nullptr;
  // The allocator's memory is free behind the kernels of this stream, and of no other.
  submit(op_of(OpKind::kAllocate, do_current_stream()), [&](Op& op) {
    memory = do_allocate(size_bytes);
    allocations_.emplace(memory, size_bytes);
    ++counters_.allocations;
    counters_.allocated_bytes += size_bytes;
    op.memory = AddressRange::of(memory, size_bytes);
  });
  return memory;
}

void Device::free(void* memory) {
  const auto found = allocations_.find(memory);
  check_internal(found != allocations_.end(), "free of memory that this device did not allocate");
  submit(op_of(OpKind::kFree), [&](Op& op) {
    op.memory = AddressRange::of(memory, found->second);
    do_free(memory);
    counters_.allocated_bytes -= found->second;
    allocations_.erase(found);
  });
}

void Device::register_host(void* memory, std::size_t size_bytes) {
  const AddressRange range = AddressRange::of(memory, size_bytes);
  const auto next = page_locked_.lower_bound(range.begin);
  check_internal((next == page_locked_.end() || range.end <= next->first) &&
                     (next == page_locked_.begin() || std::prev(next)->second <= range.begin),
                 "registration of memory of which some is registered already");
  submit(op_of(OpKind::kRegister), [&](Op& op) {
    do_register_host(memory, size_bytes);
    page_locked_.emplace(range.begin, range.end);
    ++counters_.registrations;
    counters_.registered_bytes += size_bytes;
    op.memory = range;
  });
}

void Device::unregister_host(void* memory) {
  const auto found = page_locked_.find(reinterpret_cast<std::uintptr_t>(memory));
  check_internal(found != page_locked_.end(), "unregister of memory that is not registered");
  submit(op_of(OpKind::kUnregister), [&](Op& op) {
    do_unregister_host(memory);
    op.memory = {found->first, found->second};
    --counters_.registrations;
    counters_.registered_bytes -= op.memory.size_bytes();
    page_locked_.erase(found);
  });
}

void Device::host_read(const void* memory, std::size_t size_bytes, UnitIndex unit) {
  submit(op_of(OpKind::kHostRead), [&](Op& op) {
    op.unit = unit;
    op.memory = AddressRange::of(memory, size_bytes);
  });
}

void Device::host_write(const void* memory, std::size_t size_bytes, UnitIndex unit) {
  submit(op_of(OpKind::kHostWrite), [&](Op& op) {
    op.unit = unit;
    op.memory = AddressRange::of(memory, size_bytes);
  });
}

}  // namespace torch_offload
