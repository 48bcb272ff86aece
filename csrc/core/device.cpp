#include "core/device.h"

#include <unistd.h>

#include <chrono>
#include <iterator>

#include "core/error.h"

namespace torch_offload {

namespace {

std::int64_t host_time_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

Device::Device() : process_(getpid()) {}

bool Device::in_forked_child() const { return getpid() != process_; }

void Device::append(Op op) {
  if (log_ != nullptr) {
    op.host_time_ns = host_time_ns();
    log_->append(op);
  }
}

void Device::attach_log(OpLog* log) {
  if (log != nullptr) {
    if (!log->ops().empty()) {
      throw StateError("expected an empty op log, got one of " + std::to_string(log->ops().size()) +
                       " ops, from which what was submitted since is missing; clear() it, or "
                       "attach a new one");
    }
    log->set_recorded_before(recorded_);
  }
  log_ = log;
}

void Device::check_recorded(EventId event, const char* call) const {
  if (event >= recorded_.size() || !recorded_[event]) {
    throw InternalError(std::string("torch_offload: internal error: ") + call + " on event " +
                        std::to_string(event) + ", which was never recorded");
  }
}

StreamId Device::create_stream(const StreamOptions& options) { return do_create_stream(options); }

EventId Device::create_event() {
  const EventId event = do_create_event();
  if (event >= recorded_.size()) {
    recorded_.resize(event + 1, false);
  }
  return event;
}

void Device::leave_stream(StreamId stream) {
  Op op;
  op.kind = OpKind::kLeave;
  op.stream = stream;
  append(op);
}

void Device::enter_stream(StreamId stream) { go_to_stream(OpKind::kEnter, stream); }

void Device::return_to_stream(StreamId stream) { go_to_stream(OpKind::kReturn, stream); }

void Device::go_to_stream(OpKind kind, StreamId stream) {
  do_set_current_stream(stream);
  Op op;
  op.kind = kind;
  op.stream = stream;
  append(op);
}

// Each call is logged after the device has taken it: what failed was not submitted.

void Device::record(EventId event, StreamId stream) {
  do_record(event, stream);
  recorded_.at(event) = true;
  ++counters_.records;
  Op op;
  op.kind = OpKind::kRecord;
  op.stream = stream;
  op.event = event;
  append(op);
}

void Device::wait(StreamId stream, EventId event) {
  check_recorded(event, "wait");
  do_wait(stream, event);
  ++counters_.waits;
  Op op;
  op.kind = OpKind::kWait;
  op.stream = stream;
  op.event = event;
  append(op);
}

bool Device::is_done(EventId event) {
  check_recorded(event, "is_done");
  Op op;
  op.kind = OpKind::kQuery;
  op.event = event;
  op.is_done = do_is_done(event);
  append(op);
  return op.is_done;
}

void Device::synchronize(StreamId stream) {
  do_synchronize(stream);
  ++counters_.host_synchronizes;
  Op op;
  op.kind = OpKind::kSynchronize;
  op.stream = stream;
  append(op);
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
  do_copy(stream, copy);
  ++counters_.copies;
  counters_.bytes_copied += copy.size_bytes;
  Op op;
  op.kind = OpKind::kCopy;
  op.stream = stream;
  op.unit = copy.unit;
  op.generation = copy.generation;
  op.memory = AddressRange::of(copy.destination, copy.size_bytes);
  op.source = source;
  append(op);
}

void Device::begin_read(StreamId stream, const void* memory, std::size_t size_bytes, UnitIndex unit,
                        std::uint64_t generation) {
  Op op;
  op.kind = OpKind::kRead;
  op.stream = stream;
  op.unit = unit;
  op.generation = generation;
  op.memory = AddressRange::of(memory, size_bytes);
  append(op);
}

void Device::end_read(StreamId stream, const void* memory, std::size_t size_bytes, UnitIndex unit,
                      std::uint64_t generation) {
  Op op;
  op.kind = OpKind::kReadEnd;
  op.stream = stream;
  op.unit = unit;
  op.generation = generation;
  op.memory = AddressRange::of(memory, size_bytes);
  append(op);
}

void Device::fill(StreamId stream, void* memory, std::size_t size_bytes, std::uint8_t value,
                  UnitIndex unit) {
  do_fill(stream, memory, size_bytes, value);
  Op op;
  op.kind = OpKind::kFill;
  op.stream = stream;
  op.unit = unit;
  op.memory = AddressRange::of(memory, size_bytes);
  append(op);
}

void* Device::allocate(std::size_t size_bytes) {
  const StreamId stream = do_current_stream();  // an allocator's memory is free behind its kernels
  void* memory = do_allocate(size_bytes);
  allocations_.emplace(memory, size_bytes);
  ++counters_.allocations;
  counters_.allocated_bytes += size_bytes;
  Op op;
  op.kind = OpKind::kAllocate;
  op.stream = stream;
  op.memory = AddressRange::of(memory, size_bytes);
  append(op);
  return memory;
}

void Device::free(void* memory) {
  const auto found = allocations_.find(memory);
  check_internal(found != allocations_.end(), "free of memory that this device did not allocate");
  Op op;
  op.kind = OpKind::kFree;
  op.memory = AddressRange::of(memory, found->second);
  do_free(memory);
  counters_.allocated_bytes -= found->second;
  allocations_.erase(found);
  append(op);
}

void Device::register_host(void* memory, std::size_t size_bytes) {
  const AddressRange range = AddressRange::of(memory, size_bytes);
  const auto next = page_locked_.lower_bound(range.begin);
  check_internal((next == page_locked_.end() || range.end <= next->first) &&
                     (next == page_locked_.begin() || std::prev(next)->second <= range.begin),
                 "registration of memory of which some is registered already");
  do_register_host(memory, size_bytes);
  page_locked_.emplace(range.begin, range.end);
  ++counters_.registrations;
  counters_.registered_bytes += size_bytes;
  Op op;
  op.kind = OpKind::kRegister;
  op.memory = range;
  append(op);
}

void Device::unregister_host(void* memory) {
  const auto found = page_locked_.find(reinterpret_cast<std::uintptr_t>(memory));
  check_internal(found != page_locked_.end(), "unregister of memory that is not registered");
  do_unregister_host(memory);
  Op op;
  op.kind = OpKind::kUnregister;
  op.memory = {found->first, found->second};
  --counters_.registrations;
  counters_.registered_bytes -= op.memory.size_bytes();
  page_locked_.erase(found);
  append(op);
}

void Device::host_read(const void* memory, std::size_t size_bytes, UnitIndex unit) {
  Op op;
  op.kind = OpKind::kHostRead;
  op.unit = unit;
  op.memory = AddressRange::of(memory, size_bytes);
  append(op);
}

void Device::host_write(const void* memory, std::size_t size_bytes, UnitIndex unit) {
  Op op;
  op.kind = OpKind::kHostWrite;
  op.unit = unit;
  op.memory = AddressRange::of(memory, size_bytes);
  append(op);
}

}  // namespace torch_offload
