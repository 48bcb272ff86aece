#include "core/op_log.h"

namespace torch_offload {

const char* name_of(OpKind kind) {
  switch (kind) {
    case OpKind::kCopy:
      return "copy";
    case OpKind::kFill:
      return "fill";
    case OpKind::kRead:
      return "read";
    case OpKind::kReadEnd:
      return "read_end";
    case OpKind::kLeave:
      return "leave";
    case OpKind::kEnter:
      return "enter";
    case OpKind::kReturn:
      return "return";
    case OpKind::kRecord:
      return "record";
    case OpKind::kWait:
      return "wait";
    case OpKind::kQuery:
      return "query";
    case OpKind::kSynchronize:
      return "synchronize";
    case OpKind::kAllocate:
      return "allocate";
    case OpKind::kFree:
      return "free";
    case OpKind::kRegister:
      return "register";
    case OpKind::kUnregister:
      return "unregister";
    case OpKind::kHostRead:
      return "host_read";
    case OpKind::kHostWrite:
      return "host_write";
  }
  return "?";
}

}  // namespace torch_offload
