#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "check/hazard_checker.h"
#include "core/error.h"
#include "core/loader.h"
#include "core/packed_loader.h"
#include "core/pipeline.h"
#include "core/steps.h"
#include "lanes/adversary_device.h"
#include "lanes/placed_plan.h"

#ifndef TORCH_OFFLOAD_MUTANTS
#error "a mutant needs the pipeline whose steps can be left out"
#endif

namespace torch_offload::lanes {

/// Which step the pipeline leaves out, from when on. Only the submitting thread looks at it.
struct Mutation {
  Step step = Step::kNone;
  bool is_armed = false;
  std::map<Step, std::uint64_t> num_reached;  // how often each step was come to, armed or not
};
inline Mutation mutation;

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
  MutantRun(Plan plan, const PipelineOptions& options, const Choice& choice, Outcome& outcome)
      : device(choice.callers_go_last), choice_(choice), outcome_(outcome), units_(plan.units) {
    const std::vector<Transport> transports = plan.transports;
    mutation.is_armed = !choice.begins_late;
    device.attach_log(&outcome.log);
    std::size_t size_bytes = kPageBytes;
    std::size_t largest = 0;
    for (const Unit& unit : units_) {
      size_bytes += unit.size_bytes;
      largest = std::max(largest, unit.size_bytes);
    }
    masters_.resize(size_bytes + largest);
    device.register_host(masters_.data(), masters_.size());
    for (UnitIndex unit = 0; unit < units_.size(); ++unit) {
      edit(unit);
    }
    for (const char* name : {"caller", "other_caller"}) {
      callers.push_back(device.create_stream({name, StreamRole::kCompute, 0}));
    }
    device.set_current_stream(callers[0]);
    loader_ = std::make_unique<MasterLoader>(*this);
    if (!choice.begins_late) {
      hold(callers, 0);
    }
    pipeline = std::make_unique<Pipeline>(device, *loader_, std::move(plan), options);
    if (!transports.empty()) {
      if (!choice.begins_late) {
        hold(callers, 0);
      }
      loader_->pack(transports);
      if (!choice.begins_late) {
        hold_chosen();
      }
      loader_->upload_all();
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
    std::memset(masters_.data(), 0, masters_.size());  // as their next owner would
    device.unregister_host(masters_.data());
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
    const std::size_t size_bytes = units_[unit].size_bytes;
    device.begin_read(stream, place, size_bytes, unit, generations_[unit]);
    device.end_read(stream, place, size_bytes, unit, generations_[unit]);
    device.submit(stream, [this, place, expected = expected_[unit], turn = next_turn()] {
      const bool equal = std::memcmp(place, expected->data(), expected->size()) == 0;
      finish(equal, turn);
    });
    device.settle();
  }

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

  /// Gives the master new bytes; whoever has the unit in its place already does not see them.
  void edit(UnitIndex unit) {
    std::byte* memory = master(unit);
    auto bytes = std::make_shared<std::vector<std::byte>>(units_[unit].size_bytes);
    ++num_edits_;
    const std::size_t first = std::size_t{unit} * 31 + num_edits_ * 17;
    for (std::size_t i = 0; i < bytes->size(); ++i) {
      (*bytes)[i] = static_cast<std::byte>((first + i * 7) % 251);
    }
    device.host_write(memory, bytes->size(), unit);
    std::memcpy(memory, bytes->data(), bytes->size());
    expected_[unit] = std::move(bytes);
  }
  /// Packs the unit anew, if it stays packed on the device.
  void pack_anew(UnitIndex unit) { loader_->upload(unit); }

  AdversaryDevice device;
  std::vector<StreamId> callers;
  std::unique_ptr<Pipeline> pipeline;
  bool runs_in_turn = true;  // whether all kernels are meant to run in the order of submission

 private:
  static constexpr std::size_t kPageBytes = 4096;

  class MasterLoader : public Loader {
   public:
    explicit MasterLoader(MutantRun& run) : run_(run) {}
    StreamId load(UnitIndex unit, std::byte* place, StreamId copy_stream,
                  std::uint64_t generation) override {
      run_.generations_[unit] = generation;
      if (packed_ && packed_->has_source(unit)) {
        return packed_->load(unit, place, copy_stream, generation);
      }
      // In two pieces: the second may fail when the first is under way.
      const std::size_t half = run_.units_[unit].size_bytes / 2;
      const std::byte* master = run_.master(unit);
      run_.device.copy(copy_stream, {place, master, half, unit, generation});
      run_.device.copy(copy_stream, {place + half, master + half,
                                     run_.units_[unit].size_bytes - half, unit, generation});
      return copy_stream;
    }

    std::vector<StreamId> own_streams() const override {
      return packed_ ? packed_->own_streams() : std::vector<StreamId>{};
    }
    StreamId first_writer(UnitIndex unit, StreamId copy_stream) const override {
      return packed_ ? packed_->first_writer(unit, copy_stream) : copy_stream;
    }

    /// From here on units go through a staging ring, or stay packed, as is said of each.
    void pack(const std::vector<Transport>& transports) {
      PackedLoader::Options options;
      options.resident_bytes.resize(transports.size());
      for (UnitIndex unit = 0; unit < transports.size(); ++unit) {
        const std::size_t size_bytes = run_.units_[unit].size_bytes;
        if (transports[unit] == Transport::kPacked) {
          options.slot_bytes = std::max(options.slot_bytes, size_bytes);
        } else if (transports[unit] == Transport::kPackedResident) {
          options.resident_bytes[unit] = size_bytes;
        }
      }
      packed_.emplace(run_.device, transports.size(), options);
      for (UnitIndex unit = 0; unit < transports.size(); ++unit) {
        if (transports[unit] == Transport::kPacked) {
          packed_->set_source(unit, source_of(unit, run_.master(unit)));
        }
      }
    }

    void upload_all() {
      for (UnitIndex unit = 0; unit < run_.units_.size(); ++unit) {
        upload(unit);
      }
    }

    /// By way of memory that all units share.
    void upload(UnitIndex unit) {
      if (packed_ && packed_->has_room(unit)) {
        std::byte* const shared = run_.master(static_cast<UnitIndex>(run_.units_.size()));
        const std::size_t size_bytes = run_.units_[unit].size_bytes;
        run_.device.host_write(shared, size_bytes, unit);
        std::memcpy(shared, run_.master(unit), size_bytes);
        packed_->upload(unit, source_of(unit, shared));
      }
    }

   private:
    /// Nothing is packed here: see AdversaryDevice.
    PackedSource source_of(UnitIndex unit, const std::byte* memory) const {
      const std::size_t size_bytes = run_.units_[unit].size_bytes;
      return {memory, size_bytes, size_bytes, 1};
    }

    MutantRun& run_;
    std::optional<PackedLoader> packed_;
  };

  std::byte* master(UnitIndex unit) {
    std::size_t offset = 0;
    for (UnitIndex before = 0; before < unit; ++before) {
      offset += units_[before].size_bytes;
    }
    return masters_.data() + offset;
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
  std::vector<Unit> units_;
  std::vector<std::byte> masters_;
  std::map<UnitIndex, std::shared_ptr<const std::vector<std::byte>>> expected_;
  std::map<UnitIndex, std::uint64_t> generations_;
  std::unique_ptr<MasterLoader> loader_;
  std::size_t num_edits_ = 0;
  int num_kernels_ = 0;
  int num_kernels_run_ = 0;
};

}  // namespace torch_offload::lanes
