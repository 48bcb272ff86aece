#pragma once

#include <string>

namespace torch_offload {

/// The migration ladder. One pipeline; a mode is three answers.
enum class Mode { kSync, kStreams, kEvents, kPipeline };

/// Who carries copies and kernels.
enum class StreamLayout {
  kShared,  ///< One copy stream; kernels stay on the caller's stream.
  kSplit,   ///< A copy and a compute stream for each half of a layer.
};

/// How far ahead of the unit in use copies are issued.
enum class Lookahead {
  kNone,   ///< A unit is copied when it is asked for.
  kLayer,  ///< Copies of a layer start with that layer.
  kDepth,  ///< Across layers and across forwards, as far as depth and window allow.
};

struct Policy {
  bool has_copy_stream;    ///< Copies go to a stream of their own, not to the caller's.
  bool host_synchronizes;  ///< The host waits after each step, instead of streams for events.
  Lookahead lookahead;
};

/// All that differs between the four modes.
constexpr Policy policy_of(Mode mode) {
  switch (mode) {
    case Mode::kSync:
      return {false, true, Lookahead::kNone};
    case Mode::kStreams:
      return {true, true, Lookahead::kNone};
    case Mode::kEvents:
      return {true, false, Lookahead::kLayer};
    case Mode::kPipeline:
      break;
  }
  return {true, false, Lookahead::kDepth};
}

/// Throws: ValueError that lists the names there are.
Mode parse_mode(const std::string& name);
StreamLayout parse_stream_layout(const std::string& name);
const char* name_of(Mode mode);
const char* name_of(StreamLayout layout);

}  // namespace torch_offload
