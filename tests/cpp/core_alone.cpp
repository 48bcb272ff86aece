// Linked with all of core, checker and codec and nothing else but threads: an object of theirs that
// needed torch, CUDA or Python would not link, and a header that included one of them is refused
// here.
#include "check/hazard_checker.h"
#include "codec/blob.h"
#include "codec/checksum.h"
#include "codec/chunk.h"
#include "codec/chunk_writer.h"
#include "codec/codec.h"
#include "codec/decoder.h"
#include "codec/encoder.h"
#include "codec/escape_writer.h"
#include "codec/exponents.h"
#include "codec/format.h"
#include "codec/group.h"
#include "codec/group_encoder.h"
#include "codec/palette.h"
#include "codec/parallel.h"
#include "codec/vectors.h"
#include "core/device.h"
#include "core/device_memory.h"
#include "core/error.h"
#include "core/host_limits.h"
#include "core/host_mapping.h"
#include "core/loader.h"
#include "core/mode.h"
#include "core/op_log.h"
#include "core/order.h"
#include "core/packed_loader.h"
#include "core/pinned_arena.h"
#include "core/pipeline.h"
#include "core/plan.h"
#include "core/stats.h"
#include "core/steps.h"
#include "core/unit.h"

#if defined(Py_PYTHON_H) || defined(CUDART_VERSION) || defined(TORCH_VERSION_MAJOR)
#error "a header of the core includes Python, CUDA or torch"
#endif

int main() {
  torch_offload::PlanRequest request;
  request.units = {torch_offload::Unit{}};
  try {
    torch_offload::make_plan(request);
  } catch (const torch_offload::ValueError&) {
    return 0;  // An empty unit is refused, and the exception crossed the library.
  }
  return 1;
}
