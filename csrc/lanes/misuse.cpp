#include "lanes/misuse.h"

#include <exception>
#include <stdexcept>
#include <string>
#include <thread>

#include "core/error.h"
#include "lanes/expect.h"

namespace torch_offload {

namespace {

template <typename Error, typename Call>
void expect_refused(const char* what, const Call& call) {
  try {
    call();
  } catch (const Error&) {
    return;
  }
  throw std::logic_error(std::string("the pipeline has allowed ") + what);
}

}  // namespace

void Misuse::between_passes(UnitIndex unit) {
  Pipeline& pipeline = rig_.pipeline();
  expect_refused<StateError>("acquire outside a pass", [&] { pipeline.acquire(unit); });
  expect_refused<ValueError>("sync with two streams", [&] {
    rig_.make_pipeline(pipeline.plan(), {Mode::kSync, StreamLayout::kSplit});
  });
  expect(pipeline.is_mine(), "the pipeline to be this thread's");
}

void Misuse::without_memory(UnitIndex unit) {
  Pipeline& pipeline = rig_.pipeline();
  expect(!pipeline.has_window() || pipeline.window_bytes() == 0, "no window");
  expect(!pipeline.owns(rig_.masters()), "a master not to be the pipeline's");
  pipeline.enter();
  expect_refused<StateError>("acquire without a window", [&] { pipeline.acquire(unit); });
  pipeline.leave(false);
}

void Misuse::in_a_use(UnitIndex held, const std::byte* place, UnitIndex other) {
  Pipeline& pipeline = rig_.pipeline();
  expect_refused<StateError>("replan in a pass", [&] { pipeline.replan(pipeline.plan()); });
  expect_refused<StateError>("an edit of what is in use", [&] { pipeline.invalidate(held); });
  if (pipeline.plan().is_resident(other)) {
    expect_refused<StateError>("acquire of a resident unit", [&] { pipeline.acquire(other); });
  }
  expect(pipeline.is_mine(), "the pipeline to be this thread's");
  expect(pipeline.owns(place), "a place to be the pipeline's");
  expect(!pipeline.owns(rig_.masters()), "a master not to be");
  expect(!pipeline.owns(&rig_), "nothing else to be");
  // A thread costs more than the rest of a schedule: not every time.
  if (rig_.log_size() % 8 == 0) {
    from_another_thread(held);
  }
}

void Misuse::from_another_thread(UnitIndex unit) {
  std::exception_ptr wrong;
  std::thread([&] {
    try {
      Pipeline& pipeline = rig_.pipeline();
      expect(!pipeline.is_mine(), "the pipeline to be another thread's");
      expect_refused<StateError>("a second thread's pass", [&] { pipeline.enter(); });
      expect_refused<StateError>("a second thread's acquire", [&] { pipeline.acquire(unit); });
    } catch (...) {
      wrong = std::current_exception();
    }
  }).join();
  if (wrong) {
    std::rethrow_exception(wrong);
  }
}

}  // namespace torch_offload
