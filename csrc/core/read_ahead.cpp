#include "core/read_ahead.h"

#include <unistd.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

namespace torch_offload {

/// The thread and what it has still to do.
class ReadAhead::Reader {
 public:
  Reader() : process_(getpid()), thread_([this] { run(); }) {}
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;
  ~Reader() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      is_closing_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  bool is_of_this_process() const { return process_ == getpid(); }

  void push(std::shared_ptr<const FileMapping> file, const std::byte* begin,
            std::size_t size_bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      requests_.push_back({std::move(file), begin, size_bytes});
    }
    changed_.notify_all();
  }

  void drain() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return requests_.empty() && !is_busy_; });
  }

 private:
  struct Request {
    std::shared_ptr<const FileMapping> file;
    const std::byte* begin;
    std::size_t size_bytes;
  };

  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return is_closing_ || !requests_.empty(); });
      if (is_closing_) {
        return;
      }
      {
        const Request request = std::move(requests_.front());
        requests_.pop_front();
        is_busy_ = true;
        lock.unlock();  // asking the disk can block
        request.file->read_ahead(request.begin, request.size_bytes);
      }
      lock.lock();
      is_busy_ = false;
      changed_.notify_all();
    }
  }

  const pid_t process_;
  std::mutex mutex_;  // guards all that follows but the thread
  std::condition_variable changed_;
  std::deque<Request> requests_;
  bool is_busy_ = false;
  bool is_closing_ = false;
  std::thread thread_;  // last: it uses the others
};

ReadAhead::ReadAhead() = default;

ReadAhead::~ReadAhead() {
  if (reader_ != nullptr && !reader_->is_of_this_process()) {
    // The thread is the parent's, and its lock may be held for ever here: leak on purpose.
    [[maybe_unused]] const Reader* leaked = reader_.release();
  }
}

void ReadAhead::ask(std::shared_ptr<const FileMapping> file, const std::byte* begin,
                    std::size_t size_bytes) {
  if (reader_ == nullptr) {
    try {
      reader_ = std::make_unique<Reader>();
    } catch (const std::system_error&) {
      return;  // no thread is left: slower, not broken
    }
  }
  if (reader_->is_of_this_process()) {
    reader_->push(std::move(file), begin, size_bytes);
  }
}

void ReadAhead::drain() {
  if (reader_ != nullptr && reader_->is_of_this_process()) {
    reader_->drain();
  }
}

}  // namespace torch_offload
