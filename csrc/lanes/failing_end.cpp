#include "lanes/failing_end.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "lanes/complaints.h"
#include "lanes/expect.h"

namespace torch_offload {

namespace {

constexpr const char* kComplaint = "torch_offload: could not drain stream ";
/// A stream is asked again once.
constexpr std::size_t kAttempts = 2;

}  // namespace

void end_well(ScheduleRig& rig) {
  rig.finish();
  expect(rig.device().counters().allocated_bytes == 0, "all memory to be given back");
  expect(rig.device().counters().registrations == 0, "masters to be given back");
}

void end_with_a_failing_drain(ScheduleRig& rig, int call) {
  Complaints complaints;
  const int num_failures = rig.num_failures();
  rig.fail_at(call);
  end_well(rig);
  expect(complaints.take(kComplaint) == static_cast<std::size_t>(rig.num_failures() - num_failures),
         "a word for each failure");
}

void end_with_lost_streams(ScheduleRig& rig, const std::vector<StreamId>& lost) {
  Complaints complaints;
  const std::uint64_t allocated_bytes = rig.device().counters().allocated_bytes;
  const std::vector<StreamId> ours = rig.pipeline().streams();
  const auto num_ours =
      static_cast<std::size_t>(std::count_if(lost.begin(), lost.end(), [&](StreamId stream) {
        return std::find(ours.begin(), ours.end(), stream) != ours.end();
      }));
  rig.lose(lost);
  rig.finish();
  // The owner has drained, then the pipeline itself: each has asked twice.
  const std::size_t num_told = complaints.take(kComplaint);
  expect(num_told % (2 * kAttempts) == 0, "each lost stream to be asked as often");
  expect(num_told >= num_ours * 2 * kAttempts, "a word for each lost stream");
  const bool is_kept = num_told != 0;  // a caller's stream that no unit was used on is not drained
  expect(rig.device().counters().allocated_bytes == (is_kept ? allocated_bytes : 0),
         "memory to stay where streams are lost, and nowhere else");
  expect(rig.device().counters().registrations == (is_kept ? 1U : 0U),
         "masters to stay where streams are lost, and nowhere else");
}

}  // namespace torch_offload
