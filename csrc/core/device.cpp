#include "core/device.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <iterator>
#include <utility>

#include "core/error.h"
#include "core/threads.h"

namespace torch_offload {

namespace {

Op op_of(OpKind kind, StreamId stream = kNoStream, EventId event = kNoEvent) {
  Op op;
  op.kind = kind;
  op.stream = stream;
  op.event = event;
  return op;
}

void* memory_of(const AddressRange& range) {
  return reinterpret_cast<void*>(range.begin);  // NOLINT(performance-no-int-to-ptr)
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
  const bool takes_time =
      is_onload(op.kind) || op.kind == OpKind::kFill || op.kind == OpKind::kWait;
  if (log_has_times_ && takes_time) {
    marks.begin = do_mark(op.stream, MarkPoint::kNextBegins);
  }
  call(op);
  if (log_has_times_ && takes_time) {
    marks.end = do_mark(op.stream, MarkPoint::kReached);
  } else if (log_has_times_) {
    switch (op.kind) {
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

void Device::decode(StreamId stream, const Decode& decode) {
  submit(op_of(OpKind::kDecode, stream), [&](Op& op) {
    do_decode(stream, decode);
    ++counters_.decodes;
    op.unit = decode.unit;
    op.generation = decode.generation;
    op.memory = AddressRange::of(decode.destination, decode.size_bytes);
    op.source = AddressRange::of(decode.source, decode.packed_bytes);
  });
}

void Device::do_decode(StreamId /*stream*/, const Decode& /*decode*/) {
  throw NotImplementedError(
      "expected a device that decodes packed weights, got one that does not; use "
      "transport='raw', or build torch_offload where there is a CUDA compiler");
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

void Device::check_unregistered(const AddressRange& range) const {
  const auto next = page_locked_.lower_bound(range.begin);
  check_internal((next == page_locked_.end() || range.end <= next->first) &&
                     (next == page_locked_.begin() || std::prev(next)->second <= range.begin),
                 "registration of memory of which some is registered already");
}

void Device::note_registered(const AddressRange& range) {
  page_locked_.emplace(range.begin, range.end);
  ++counters_.registrations;
  counters_.registered_bytes += range.size_bytes();
}

void Device::register_host(void* memory, std::size_t size_bytes) {
  const AddressRange range = AddressRange::of(memory, size_bytes);
  check_unregistered(range);
  submit(op_of(OpKind::kRegister), [&](Op& op) {
    do_register_host(memory, size_bytes);
    note_registered(range);
    op.memory = range;
  });
}

void Device::register_read_only(const std::vector<AddressRange>& ranges,
                                const std::function<void(const AddressRange&)>& prepare) {
  // One thread locks 39 GB/s of the page cache, four 56; the link moves 55.
  constexpr std::size_t kThreads = 4;
  std::for_each(ranges.begin(), ranges.end(),
                [this](const AddressRange& range) { check_unregistered(range); });
  std::vector<std::exception_ptr> failures(ranges.size());
  std::vector<char> locked(ranges.size(), 0);  // not bool: each thread writes its own bytes
  std::atomic<std::size_t> next{0};
  std::atomic<bool> has_failed{false};
  run_by_threads(std::min(kThreads, ranges.size()), [&] {
    for (;;) {
      const std::size_t i = next.fetch_add(1);
      if (i >= ranges.size() || has_failed) {
        return;
      }
      try {
        prepare(ranges[i]);
        do_register_read_only(memory_of(ranges[i]), ranges[i].size_bytes());
        locked[i] = 1;
      } catch (...) {
        failures[i] = std::current_exception();
        has_failed = true;
      }
    }
  });
  if (has_failed) {
    for (std::size_t i = 0; i < ranges.size(); ++i) {
      try {
        if (locked[i] != 0) {
          do_unregister_host(memory_of(ranges[i]));
        }
      } catch (const std::exception&) {
        failures.push_back(std::current_exception());  // behind what is thrown below
      }
    }
    std::rethrow_exception(*std::find_if(failures.begin(), failures.end(),
                                         [](const auto& failure) { return failure != nullptr; }));
  }
  for (const AddressRange& range : ranges) {
    submit(op_of(OpKind::kRegister), [&](Op& op) {
      note_registered(range);
      op.memory = range;
    });
  }
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
