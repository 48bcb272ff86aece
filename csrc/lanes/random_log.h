#pragma once

#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "lanes/linearisations.h"
#include "lanes/log_builder.h"

namespace torch_offload::lanes {

/// One random log, drawn from its seed alone.
class RandomLog {
 public:
  explicit RandomLog(unsigned seed) : random_(seed) {
    num_streams_ = 1 + draw(3);
    num_events_ = 1 + draw(3);
    const std::size_t num_ops = 5 + draw(10);
    if (draw(2) == 0) {
      while (size() < num_ops) {
        any_op();
      }
    } else {
      pipeline(num_ops);
    }
    while (!open_.empty() && draw(4) != 0) {
      end_read();
    }
  }

  LogBuilder build;

 private:
  static constexpr std::size_t kMostOpsOfAUse = 10;

  struct Use {
    StreamId stream = kNoStream;
    AddressRange memory;
    UnitIndex unit = kNoUnit;
    std::uint64_t generation = 0;
  };

  std::size_t draw(std::size_t bound) { return random_() % bound; }
  std::size_t size() const { return build.log.ops().size(); }
  StreamId stream() { return static_cast<StreamId>(draw(num_streams_)); }
  EventId event() { return static_cast<EventId>(draw(num_events_)); }
  AddressRange place() {
    const std::size_t begin = draw(3);
    return slices(begin, 1 + draw(3 - begin));
  }
  AddressRange packed() { return slices(3 + draw(2)); }
  AddressRange master() { return masters(draw(2)); }

  void any_op() {
    switch (draw(18)) {
      case 0:
      case 1:
      case 2:
        copy(stream(), place());
        break;
      case 3:
        build.fill(stream(), place());
        break;
      case 4:
      case 5:
        begin_read(stream(), place());
        break;
      case 6:
      case 7:
        end_read();
        break;
      case 8:
      case 9:
        build.record(event(), stream());
        break;
      case 10:
      case 11:
        build.wait(stream(), event());
        break;
      case 12:
        build.synchronize(stream());
        break;
      case 13:
        build.query(event(), draw(2) == 0);
        break;
      case 14:
      case 15:
        decode(stream(), packed());
        break;
      case 16:
        draw(2) == 0 ? build.host_write(master()) : build.host_read(master());
        break;
      default:
        rare_op();
    }
  }

  void rare_op() {
    switch (draw(6)) {
      case 0:
        build.free(place());
        break;
      case 1:
        build.allocate(stream(), place());
        break;
      case 2:
        build.unregister_host(master());
        break;
      case 3:
        build.register_host(master());
        break;
      case 4:
        build.leave(stream());
        break;
      default:
        draw(2) == 0 ? build.enter(stream()) : build.return_to(stream());
    }
  }

  /// Uses as the pipeline makes them, each edge left out now and then.
  void pipeline(std::size_t num_ops) {
    while (size() < num_ops && size() + kMostOpsOfAUse < Linearisations::kMaxOps) {
      const StreamId copies = stream();
      const StreamId compute = stream();
      const AddressRange memory = place();
      if (freed_ != kNoEvent && draw(5) != 0) {
        build.wait(copies, freed_);
      }
      const Use use = draw(3) == 0 ? bring_packed(copies, memory) : copy(copies, memory);
      const EventId ready = event();
      if (draw(5) != 0) {
        build.record(ready, use.stream);
      }
      if (draw(5) != 0) {
        build.wait(compute, ready);
      }
      begin_read(compute, memory, use);
      if (draw(6) != 0) {
        end_read();
        freed_ = event();
        build.record(freed_, compute);
      }
    }
  }

  Use copy(StreamId on, AddressRange memory) {
    const Use use{on, memory, next_unit_++, 1};
    const std::size_t size = (memory.end - memory.begin) / kAlignmentBytes;
    build.copy(on, memory, size == 1 ? master() : masters(0, size), use.unit, use.generation);
    last_copy_ = use;
    return use;
  }

  /// Packed bytes of the unit, behind which a decoder fills its place.
  Use bring_packed(StreamId copies, AddressRange memory) {
    Use use{stream(), memory, next_unit_++, 1};
    const AddressRange source = packed();
    // What stays packed on the device was copied for every use.
    build.copy(copies, source, master(), use.unit, draw(3) == 0 ? 0 : use.generation);
    if (use.stream != copies && draw(5) != 0) {
      const EventId copied = event();
      build.record(copied, copies);
      build.wait(use.stream, copied);
    }
    build.decode(use.stream, memory, source, use.unit, use.generation);
    last_copy_ = use;
    return use;
  }

  /// Of what was copied last, or of a unit that never was.
  void decode(StreamId on, AddressRange source) {
    const Use use =
        last_copy_.unit != kNoUnit && draw(2) == 0 ? last_copy_ : Use{on, place(), next_unit_++, 1};
    build.decode(on, place(), source, use.unit, use.generation);
  }

  void begin_read(StreamId on, AddressRange memory) {
    Use use{on, memory, next_unit_++, 0};
    if (last_copy_.unit != kNoUnit && draw(2) == 0) {
      use = last_copy_;
    }
    begin_read(on, use.memory, use);
  }

  void begin_read(StreamId on, AddressRange memory, Use use) {
    for (const Use& open : open_) {
      if (open.unit == use.unit) {
        return;
      }
    }
    if (!used_.insert(use.unit).second) {
      return;  // one use of each unit keeps the ends of this file apart
    }
    use.stream = on;
    use.memory = memory;
    build.read(on, memory, use.unit, use.generation);
    open_.push_back(use);
  }

  void end_read() {
    if (open_.empty()) {
      return;
    }
    const std::size_t index = draw(open_.size());
    const Use use = open_[index];
    if (draw(6) == 0 && num_streams_ > 1) {  // the use has spread to another stream
      const auto other = static_cast<StreamId>((use.stream + 1) % num_streams_);
      build.read_end(other, use.memory, use.unit, use.generation);
      return;
    }
    build.read_end(use.stream, use.memory, use.unit, use.generation);
    open_.erase(open_.begin() + static_cast<std::ptrdiff_t>(index));
  }

  std::mt19937 random_;
  std::size_t num_streams_ = 0;
  std::size_t num_events_ = 0;
  UnitIndex next_unit_ = 0;
  Use last_copy_;
  EventId freed_ = kNoEvent;
  std::set<UnitIndex> used_;
  std::vector<Use> open_;
};

/// A range of addresses in words. Note [No numbers through iostreams] says why by hand.
inline std::string text_of(const AddressRange& range) {
  const auto hex = [](std::uintptr_t address) {
    std::array<char, 2 * sizeof(address)> digits{};
    char* const end = std::to_chars(digits.data(), digits.data() + digits.size(), address, 16).ptr;
    return std::string(digits.data(), end);
  };
  return hex(range.begin) + "-" + hex(range.end);
}

/// What happened, an op a line; ids that an op has not are -1.
inline std::string text_of(const OpLog& log) {
  std::string text;
  for (std::size_t i = 0; i < log.ops().size(); ++i) {
    const Op& op = log.ops()[i];
    const auto id = [](std::uint32_t value) { return std::to_string(static_cast<int>(value)); };
    text += "  " + std::to_string(i) + ": " + name_of(op.kind) + " stream " + id(op.stream) +
            " event " + id(op.event) + " unit " + id(op.unit) + " memory " + text_of(op.memory) +
            " source " + text_of(op.source) + (op.is_done ? " done" : "") + "\n";
  }
  return text;
}

}  // namespace torch_offload::lanes
