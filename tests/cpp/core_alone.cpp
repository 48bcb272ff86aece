// Linked with the core and nothing else: were torch, CUDA or Python needed, this would not link.
#include <cstdio>

#include "core/device.h"
#include "core/error.h"
#include "core/loader.h"
#include "core/mode.h"
#include "core/op_log.h"
#include "core/order.h"
#include "core/pinned_arena.h"
#include "core/pipeline.h"
#include "core/plan.h"
#include "core/stats.h"
#include "core/unit.h"

#if defined(Py_PYTHON_H) || defined(CUDART_VERSION) || defined(TORCH_VERSION)
#error "a header of the core includes Python, CUDA or torch"
#endif

int main() {
  // Taking the addresses keeps the linker from dropping what the library would need.
  using namespace torch_offload;
  auto* plan = &make_plan;
  auto* acquire = &Pipeline::acquire;
  if (plan == nullptr || acquire == nullptr) {
    return 1;
  }
  PlanRequest request;
  try {
    make_plan(request);
  } catch (const ValueError& error) {
    std::printf("an empty request is refused: %s\n", error.what());
  }
  return 0;
}
