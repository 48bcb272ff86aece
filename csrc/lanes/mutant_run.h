#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "core/pipeline.h"
#include "core/steps.h"
#include "lanes/moving_device.h"
#include "lanes/mutant_loader.h"
#include "lanes/mutant_masters.h"
#include "lanes/mutation.h"

#ifndef TORCH_OFFLOAD_MUTANTS
#error "a mutant needs the pipeline whose steps can be left out"
#endif

namespace torch_offload::lanes {

/// What is held back, and what goes wrong by itself.
struct Choice {
  std::uint32_t held = 0;        ///< Bit i: the i-th stream, callers first, stands still.
  bool callers_go_last = false;  ///< Whenever several streams could go on; else first.
  bool begins_late = false;      ///< All this and the mutation begin behind the first pass.
  int failing_call = 0;          ///< Of the device, in the part that a schedule lets fail.
};

/// What came of a run.
struct Outcome {
  int num_wrong = 0;         ///< Kernels that found other bytes, or ran out of turn.
  bool was_refused = false;  ///< The device would not take a call.
  bool has_failed = false;   ///< The failure asked for has come.
  OpLog log;
};

/// A pipeline on an AdversaryDevice, with kernels that check what they find when they run.
class MutantRun {
 public:
  MutantRun(Plan plan, const PipelineOptions& options, const FileLimits& files,
            const Choice& choice, Outcome& outcome)
      : device(choice.callers_go_last, &outcome.log),
        masters(device, plan.units),
        loader(device, masters),
        choice_(choice),
        outcome_(outcome) {
    const std::vector<Transport> transports = plan.transports;
    mutation.is_armed = !choice.begins_late;
    mutation.is_due = false;
    mutation.moved_ops.clear();
    for (const char* name : {"caller", "other_caller"}) {
      callers.push_back(device.create_stream({name, StreamRole::kCompute, 0}));
    }
    device.set_current_stream(callers[0]);
    if (files.are_used) {
      loader.open_file(files.told);
      device.limit_read_only(files.met);
    }
    if (!choice.begins_late) {
      hold(callers, 0);
    }
    pipeline = std::make_unique<Pipeline>(device, loader, std::move(plan), options);
    if (!transports.empty()) {
      if (!choice.begins_late) {
        hold(callers, 0);
      }
      loader.pack(transports);
      if (!choice.begins_late) {
        hold_chosen();
      }
      loader.upload_all();
    }
    if (!choice.begins_late) {
      hold_chosen();
    }
  }
  MutantRun(const MutantRun&) = delete;
  MutantRun& operator=(const MutantRun&) = delete;
  ~MutantRun() {
    pipeline.reset();  // with all that is held still standing
    device.settle();
    masters.give_up();
    loader.close_file();
    device.open_all();
    device.attach_log(nullptr);
    mutation.is_armed = false;
  }

  /// Begins what is to begin late.
  void begin_second_part() {
    hold_chosen();
    mutation.is_armed = true;
  }
  /// From here on the device may fail.
  void begin_failing() {
    hold_chosen();
    mutation.is_armed = true;
    device.fail_at(choice_.failing_call);
  }
  void end_failing() {
    outcome_.has_failed = device.has_failed();
    device.fail_at(0);
    hold_chosen();
  }

  /// A kernel of the unit on the current stream.
  void read(UnitIndex unit, const std::byte* place) {
    const StreamId stream = device.current_stream();
    const std::size_t size_bytes = masters.size_bytes(unit);
    device.begin_read(stream, place, size_bytes, unit, loader.generations[unit]);
    device.end_read(stream, place, size_bytes, unit, loader.generations[unit]);
    compare(unit, place);
  }
  /// Likewise, of a unit that is on the device for good.
  void read_resident(UnitIndex unit, const std::byte* memory) { compare(unit, memory); }

  /// A kernel of the caller's own on the current stream, which uses no unit.
  void compute() {
    device.submit(device.current_stream(), [this, turn = next_turn()] { finish(true, turn); });
    device.settle();
  }

  const std::byte* acquire(UnitIndex unit) {
    const std::byte* place = pipeline->acquire(unit);
    device.settle();
    return place;
  }
  void release(UnitIndex unit) {
    pipeline->release(unit);
    device.settle();
  }
  /// One call of a unit, as the wrapper makes it.
  void use(UnitIndex unit) {
    read(unit, acquire(unit));
    release(unit);
  }
  void pass(const std::vector<UnitIndex>& sequence) {
    pipeline->enter();
    for (const UnitIndex unit : sequence) {
      use(unit);
      compute();
    }
    pipeline->leave(true);
  }

  MovingDevice device;
  MutantMasters masters;
  MutantLoader loader;
  std::vector<StreamId> callers;
  std::unique_ptr<Pipeline> pipeline;
  bool runs_in_turn = true;  // whether all kernels are meant to run in the order of submission

 private:
  void compare(UnitIndex unit, const std::byte* memory) {
    device.submit(device.current_stream(), [this, memory, expected = masters.bytes(unit),
                                            turn = next_turn()] {
      const bool is_equal = std::memcmp(memory, expected->data(), expected->size()) == 0;
      finish(is_equal, turn);
    });
    device.settle();
  }

  /// Anew, should the host have had to let them go.
  void hold_chosen() {
    hold(callers, 0);
    hold(pipeline->streams(), callers.size());
  }

  void hold(const std::vector<StreamId>& streams, std::size_t first_bit) {
    for (std::size_t i = 0; i < streams.size(); ++i) {
      if ((choice_.held >> (first_bit + i) & 1U) != 0) {
        device.hold(streams[i]);
      }
    }
  }

  int next_turn() { return num_kernels_++; }

  void finish(bool is_equal, int turn) {
    const bool is_in_turn = !runs_in_turn || num_kernels_run_ == turn;
    ++num_kernels_run_;
    outcome_.num_wrong += is_equal && is_in_turn ? 0 : 1;
  }

  const Choice choice_;
  Outcome& outcome_;
  int num_kernels_ = 0;
  int num_kernels_run_ = 0;
};

}  // namespace torch_offload::lanes
