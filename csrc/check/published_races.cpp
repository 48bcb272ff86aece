#include "check/published_races.h"

#include "check/hazard_checker.h"
#include "check/planted_races.h"
#include "core/error.h"
#include "core/op_log.h"

namespace torch_offload {

const std::vector<PublishedRace>& published_races() {
  using Caught = PublishedRace::Caught;
  using Kind = FindingKind;
  static const std::vector<PublishedRace> races{
      {"H1", "compute never waits for the copy after an onload", "diffusers#13502",
       "the stream that reads waits for `ready`", Caught::kByChecker, Kind::kUnordered,
       planted::compute_without_waiting},
      {"H2", "the current stream asked for inside the copy stream's context", "diffusers#12673",
       "`free` is recorded on the stream that was used", Caught::kByChecker, Kind::kUnordered,
       planted::ask_for_the_stream_inside},
      {"H3", "weights freed from the host while kernels still read them", "diffusers#14657",
       "fixed places, drained before they go", Caught::kByChecker, Kind::kFreedInFlight,
       planted::free_while_kernels_read},
      {"H4", "buffers not restored on one of two paths", "diffusers#13238", "buffers stay resident",
       Caught::kInPython, Kind::kUnordered, nullptr,
       "test_selfcheck.py::test_plant_is_seen_and_its_twin_is_not"},
      {"H5", "the compute stream kept from construction, the caller on another", "trl#7195",
       "streams are asked for live", Caught::kByChecker, Kind::kUnordered,
       planted::keep_the_stream},
      {"H6", "a clone on the copy stream after the wait was taken", "trl#7195",
       "`ready` is recorded behind all of an onload", Caught::kByChecker, Kind::kUnordered,
       planted::copy_after_the_wait},
      {"H7", "an event recorded on a hard-coded stream", "pytorch#160481",
       "`free` is recorded on the stream that was used", Caught::kByChecker, Kind::kUnordered,
       planted::record_on_a_fixed_stream},
      {"H8", "a buffer freed on its own stream while another still reads it",
       "pytorch#180665, Megatron-LM#6187", "fixed places, no reuse by an allocator",
       Caught::kByChecker, Kind::kFreedInFlight, planted::free_on_its_own_stream},
      {"H9", "the host reads a destination before the copy has drained", "pytorch#180666",
       "the host reads nothing in flight", Caught::kByChecker, Kind::kHostReadInFlight,
       planted::read_before_the_copy_has_drained},
      {"H10", "one tied weight with two owners, torn reads under prefetch", "cache-dit#1111",
       "one owner for each storage; no copy where a unit is in use", Caught::kByChecker,
       Kind::kOverwrittenInUse, planted::prefetch_for_a_second_owner},
      {"H11", "the offloader was never installed; every equality test passed", "vllm#51462",
       "copies and bytes are asserted", Caught::kInPython, Kind::kUnordered, nullptr,
       "test_selfcheck.py::test_plant_is_seen_and_its_twin_is_not"},
      {"H12", "a weight used without its module's forward", "transformers#46978",
       "at rest a parameter is its master", Caught::kInPython, Kind::kUnordered, nullptr,
       "test_published_races.py::test_h12_weight_used_without_its_module_is_its_master"},
      {"H13", "a host source freed while the copy is in flight", "cudf#22321",
       "a master outlives every copy from it", Caught::kByChecker, Kind::kFreedInFlight,
       planted::give_up_the_source},
      {"H14", "a prefetch race visible only where compute is slow", "pytorch#178142",
       "proof on the log, not by timing", Caught::kByChecker, Kind::kUnordered,
       planted::prefetch_faster_than_kernels},
      {"H15", "a capture waits for an event from before it", "sglang#29166",
       "a device takes no wait for an event that was not recorded", Caught::kByDevice,
       Kind::kWaitUnrecorded, planted::wait_for_an_event_of_another_set},
      {"H16", "a blocking copy orders against the default stream only", "Torch-FL#62",
       "everything goes through a Device", Caught::kByChecker, Kind::kUnordered,
       planted::copy_on_the_default_stream},
      {"H17", "wrong whenever another layer comes than the one expected", "diffusers#11981",
       "the order is only a guess", Caught::kByChecker, Kind::kStale,
       planted::use_what_was_not_copied},
      {"H18", "the wrap-around's target was not the range just freed", "vllm#54975",
       "each place has its own `free`", Caught::kByChecker, Kind::kUnordered,
       planted::wait_for_the_other_place},
      {"H19", "setting the data of a wrapper subclass does nothing", "tried, torchao 0.18",
       "refused by name", Caught::kInPython, Kind::kUnordered, nullptr,
       "test_quantized.py::test_wrapper_subclass_parameter_fails_by_name"},
      {"H20", "backward over a place that was overwritten", "tried, torch 2.11",
       "versions are bumped: backward raises", Caught::kInPython, Kind::kUnordered, nullptr,
       "test_backward.py::test_grad_mode_forward_warns_once_and_backward_raises"},
      {"H21", "a merge through `.data` moves neither version nor pointer", "tried, PEFT 0.21",
       "sampled words are compared", Caught::kInPython, Kind::kUnordered, nullptr,
       "test_edits.py::test_lora_merge_and_unmerge_between_forwards_are_seen"},
      {"H22", "an interrupt between swap and restore", "tried", "acquire inside the try",
       Caught::kInPython, Kind::kUnordered, nullptr,
       "test_interrupts.py::test_interrupt_at_every_operator_leaves_the_model_at_rest"},
      {"H23", "two threads through one unit", "tried", "a second thread is refused",
       Caught::kInPython, Kind::kUnordered, nullptr,
       "test_dropin_threads.py::test_second_thread_is_refused_and_the_first_unharmed"},
      {"H24", "autocast keeps a cast copy of every streamed weight", "tried",
       "its cache is off inside a unit", Caught::kInPython, Kind::kUnordered, nullptr,
       "test_dropin_calls.py::test_autocast_equals_plain_and_keeps_no_copies"},
  };
  return races;
}

bool RaceOutcome::is_caught(const PublishedRace& race) const {
  return race.caught == PublishedRace::Caught::kByDevice
             ? was_refused
             : !findings.empty() && findings.front().kind == race.expected;
}

RaceOutcome run_race(const PublishedRace& race, Device& device, bool planted) {
  check_internal(race.run != nullptr, "a race that lives in Python only");
  RaceOutcome outcome;
  OpLog log;
  device.attach_log(&log);
  try {
    race.run(device, planted);
  } catch (const InternalError&) {
    outcome.was_refused = true;
  } catch (...) {
    device.attach_log(nullptr);
    throw;
  }
  device.attach_log(nullptr);
  outcome.findings = HazardChecker().check(log);
  return outcome;
}

}  // namespace torch_offload
