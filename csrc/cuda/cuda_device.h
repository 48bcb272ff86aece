#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/device.h"

namespace torch_offload {

/// A Device over one GPU and PyTorch's own streams, events and allocator.
///
/// Streams come from PyTorch's pool, which hands out 32 a priority, round robin: a stream made
/// here is none that this device has seen before (as long as there are others), but other code of
/// the process may be given the same one. Then the two share a queue, which costs time and never
/// order. The callers' streams are numbered as they appear, PyTorch's default stream included.
///
/// Memory comes from PyTorch's caching allocator, so `memory_allocated` and out-of-memory reports
/// know of it. See Note [A block's other users] for what that takes.
///
/// Times in a log come from timing events, two for each copy and four for each use of a unit; see
/// CudaMarks and Note [Marks on copy streams].
///
/// All calls work whichever GPU is current, and leave it so.
///
/// Blocking:  as Device says. The first call of a process sets CUDA up.
/// Lifetime:  the destructor frees what is still allocated. In a forked child it leaks instead,
///            because CUDA must not be called there.
/// Threads:   one caller at a time; `current_stream` is the calling thread's.
/// Throws:    c10::Error with CUDA's words where CUDA fails, an earlier asynchronous failure
///            included.
class CudaDevice : public Device {
 public:
  /// Throws: IndexError if there is no such GPU.
  explicit CudaDevice(int device_index);
  ~CudaDevice() override;

  const std::string& stream_name(StreamId stream) const override;
  int device_index() const;
  bool is_capturing() const override;
  std::optional<int> host_node() const override;
  /// Whether this build has kernels; see cmake/Nvcc.cmake.
  bool can_decode() const override;

 protected:
  StreamId do_create_stream(const StreamOptions& options) override;
  StreamId do_current_stream() override;
  void do_set_current_stream(StreamId stream) override;
  EventId do_create_event() override;
  void do_record(EventId event, StreamId stream) override;
  void do_wait(StreamId stream, EventId event) override;
  bool do_is_done(EventId event) override;
  void do_synchronize(StreamId stream) override;
  void do_copy(StreamId stream, const Copy& copy) override;
  void do_decode(StreamId stream, const Decode& decode) override;
  void do_fill(StreamId stream, void* memory, std::size_t size_bytes, std::uint8_t value) override;
  void* do_allocate(std::size_t size_bytes) override;
  void do_free(void* memory) override;
  void do_register_host(void* memory, std::size_t size_bytes) override;
  void do_register_read_only(void* memory, std::size_t size_bytes) override;
  void do_unregister_host(void* memory) override;
  void do_start_marks() override;
  MarkId do_mark(StreamId stream, MarkPoint point) override;
  std::vector<std::int64_t> do_take_marks() override;

 private:
  struct State;  // what CUDA must be called to destroy
  std::unique_ptr<State> state_;
};

}  // namespace torch_offload
