#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/op_log.h"
#include "core/unit.h"

namespace torch_offload::lanes {

constexpr std::size_t kSlice = kAlignmentBytes;

/// Device memory of a log written by hand: `count` slices from `index` on.
inline AddressRange slices(std::size_t index, std::size_t count = 1) {
  constexpr std::uintptr_t kDeviceMemory = 0x100000;
  return {kDeviceMemory + index * kSlice, kDeviceMemory + (index + count) * kSlice};
}

/// Likewise host memory.
inline AddressRange masters(std::size_t index, std::size_t count = 1) {
  constexpr std::uintptr_t kHostMemory = 0x900000;
  return {kHostMemory + index * kSlice, kHostMemory + (index + count) * kSlice};
}

/// Writes a log op by op. Each call returns the index of its op.
class LogBuilder {
 public:
  std::size_t copy(StreamId stream, AddressRange to, AddressRange from, UnitIndex unit = kNoUnit,
                   std::uint64_t generation = 0) {
    return bring(OpKind::kCopy, stream, to, from, unit, generation);
  }
  std::size_t decode(StreamId stream, AddressRange to, AddressRange from, UnitIndex unit,
                     std::uint64_t generation) {
    return bring(OpKind::kDecode, stream, to, from, unit, generation);
  }
  std::size_t fill(StreamId stream, AddressRange memory) {
    return touch(OpKind::kFill, stream, memory);
  }
  std::size_t read(StreamId stream, AddressRange memory, UnitIndex unit = kNoUnit,
                   std::uint64_t generation = 0) {
    return touch(OpKind::kRead, stream, memory, unit, generation);
  }
  std::size_t read_end(StreamId stream, AddressRange memory, UnitIndex unit = kNoUnit,
                       std::uint64_t generation = 0) {
    return touch(OpKind::kReadEnd, stream, memory, unit, generation);
  }
  std::size_t leave(StreamId stream) { return add(on(OpKind::kLeave, stream)); }
  std::size_t enter(StreamId stream) { return add(on(OpKind::kEnter, stream)); }
  std::size_t return_to(StreamId stream) { return add(on(OpKind::kReturn, stream)); }
  std::size_t record(EventId event, StreamId stream) {
    return add(on(OpKind::kRecord, stream, event));
  }
  std::size_t wait(StreamId stream, EventId event) { return add(on(OpKind::kWait, stream, event)); }
  std::size_t query(EventId event, bool is_done) {
    Op op = on(OpKind::kQuery, kNoStream, event);
    op.is_done = is_done;
    return add(op);
  }
  std::size_t synchronize(StreamId stream) { return add(on(OpKind::kSynchronize, stream)); }
  std::size_t allocate(StreamId stream, AddressRange memory) {
    return touch(OpKind::kAllocate, stream, memory);
  }
  std::size_t free(AddressRange memory) { return touch(OpKind::kFree, kNoStream, memory); }
  std::size_t register_host(AddressRange memory) {
    return touch(OpKind::kRegister, kNoStream, memory);
  }
  std::size_t unregister_host(AddressRange memory) {
    return touch(OpKind::kUnregister, kNoStream, memory);
  }
  std::size_t host_read(AddressRange memory) { return touch(OpKind::kHostRead, kNoStream, memory); }
  std::size_t host_write(AddressRange memory) {
    return touch(OpKind::kHostWrite, kNoStream, memory);
  }
  std::size_t add(const Op& op) {
    log.append(op);
    return log.ops().size() - 1;
  }

  OpLog log;

 private:
  static Op on(OpKind kind, StreamId stream, EventId event = kNoEvent) {
    Op op;
    op.kind = kind;
    op.stream = stream;
    op.event = event;
    return op;
  }
  std::size_t bring(OpKind kind, StreamId stream, AddressRange to, AddressRange from,
                    UnitIndex unit, std::uint64_t generation) {
    Op op = on(kind, stream);
    op.memory = to;
    op.source = from;
    op.unit = unit;
    op.generation = generation;
    return add(op);
  }
  std::size_t touch(OpKind kind, StreamId stream, AddressRange memory, UnitIndex unit = kNoUnit,
                    std::uint64_t generation = 0) {
    Op op = on(kind, stream);
    op.memory = memory;
    op.unit = unit;
    op.generation = generation;
    return add(op);
  }
};

/// The ops without those by which rigs tell of each kernel: reads that end at once, inside a unit's
/// own.
inline std::vector<Op> without_kernels(const std::vector<Op>& ops) {
  std::vector<Op> rest;
  for (std::size_t at = 0; at < ops.size(); ++at) {
    if (ops[at].kind == OpKind::kRead && ops[at + 1].kind == OpKind::kReadEnd) {
      ++at;
    } else {
      rest.push_back(ops[at]);
    }
  }
  return rest;
}

}  // namespace torch_offload::lanes
