#include <gtest/gtest.h>
#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <mutex>
#include <set>
#include <system_error>
#include <thread>

#include "core/threads.h"

namespace torch_offload {
namespace {

/// No address space holds a stack of so many bytes.
constexpr std::size_t kHugeStack = std::size_t{1} << 47U;

/// While one lives, it can make that the process gets no more threads.
class ThreadShortage {
 public:
  ThreadShortage() { pthread_getattr_default_np(&former_); }
  ~ThreadShortage() {
    pthread_setattr_default_np(&former_);
    pthread_attr_destroy(&former_);
  }
  ThreadShortage(const ThreadShortage&) = delete;
  ThreadShortage& operator=(const ThreadShortage&) = delete;

  static void begin() {
    pthread_attr_t huge;
    pthread_attr_init(&huge);
    pthread_attr_setstacksize(&huge, kHugeStack);
    pthread_setattr_default_np(&huge);
    pthread_attr_destroy(&huge);
  }

 private:
  pthread_attr_t former_{};
};

/// Who has called, and waits there until as many as are expected are inside at once.
struct Meeting {
  std::size_t num_expected = 1;
  std::atomic<std::size_t> num_inside{0};
  std::atomic<std::size_t> num_done{0};
  std::mutex mutex;
  std::set<std::thread::id> ids;

  void join() {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      ids.insert(std::this_thread::get_id());
    }
    ++num_inside;
    while (num_inside < num_expected) {
      std::this_thread::yield();
    }
    ++num_done;
  }
};

TEST(ThreadsTest, AllRunAtOnceAndTheCallerIsOneOfThem) {
  for (const std::size_t num_threads : {0U, 1U, 2U, 5U}) {
    Meeting meeting;
    meeting.num_expected = num_threads == 0 ? 1 : num_threads;
    run_by_threads(num_threads, [&] { meeting.join(); });
    EXPECT_EQ(meeting.num_done, meeting.num_expected);  // nobody is left when it returns
    EXPECT_EQ(meeting.ids.size(), meeting.num_expected);
    EXPECT_EQ(meeting.ids.count(std::this_thread::get_id()), 1U);
  }
}

TEST(ThreadsTest, ShortageIsOne) {
  const ThreadShortage shortage;
  ThreadShortage::begin();
  EXPECT_THROW(std::thread([] {}).join(), std::system_error);
}

/// Each thread gets a copy of its own: before that of the thread after `num_left`, none is left.
struct CopiesUntilShortage {
  explicit CopiesUntilShortage(Meeting& met, std::size_t num_left)
      : meeting(&met), num_helpers_left(num_left) {}
  CopiesUntilShortage(const CopiesUntilShortage& other)
      : meeting(other.meeting), num_helpers_left(other.num_helpers_left) {
    if (other.num_copies++ == num_helpers_left) {
      ThreadShortage::begin();
    }
  }
  CopiesUntilShortage(CopiesUntilShortage&&) = default;
  CopiesUntilShortage& operator=(const CopiesUntilShortage&) = delete;
  CopiesUntilShortage& operator=(CopiesUntilShortage&&) = delete;
  ~CopiesUntilShortage() = default;

  void operator()() const { meeting->join(); }

  Meeting* meeting;
  std::size_t num_helpers_left;
  mutable std::size_t num_copies = 0;
};

TEST(ThreadsTest, FewerThanAskedForDoItAll) {
  for (const std::size_t num_left : {0U, 1U, 3U}) {
    const ThreadShortage shortage;
    Meeting meeting;
    meeting.num_expected = 1 + num_left;
    const CopiesUntilShortage run(meeting, num_left);
    run_by_threads(6, run);
    EXPECT_EQ(meeting.num_done, meeting.num_expected);
    EXPECT_EQ(meeting.ids.size(), meeting.num_expected);
    EXPECT_EQ(run.num_copies, num_left + 1) << "it asked again after it was refused";
  }
}

}  // namespace
}  // namespace torch_offload
