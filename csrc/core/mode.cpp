#include "core/mode.h"

#include "core/error.h"

namespace torch_offload {

Mode parse_mode(const std::string& name) {
  for (const Mode mode : {Mode::kSync, Mode::kStreams, Mode::kEvents, Mode::kPipeline}) {
    if (name == name_of(mode)) {
      return mode;
    }
  }
  throw ValueError("expected mode to be 'sync', 'streams', 'events' or 'pipeline', got '" + name +
                   "'; 'pipeline' is the one for production");
}

StreamLayout parse_stream_layout(const std::string& name) {
  for (const StreamLayout layout : {StreamLayout::kShared, StreamLayout::kSplit}) {
    if (name == name_of(layout)) {
      return layout;
    }
  }
  throw ValueError("expected streams to be 'shared' or 'split', got '" + name +
                   "'; 'shared' is the one for production");
}

const char* name_of(Mode mode) {
  switch (mode) {
    case Mode::kSync:
      return "sync";
    case Mode::kStreams:
      return "streams";
    case Mode::kEvents:
      return "events";
    case Mode::kPipeline:
      return "pipeline";
  }
  return "?";
}

const char* name_of(StreamLayout layout) {
  return layout == StreamLayout::kShared ? "shared" : "split";
}

}  // namespace torch_offload
