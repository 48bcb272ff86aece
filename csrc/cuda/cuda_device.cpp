#include "cuda/cuda_device.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <deque>
#include <unordered_map>
#include <utility>

#include "core/error.h"
#include "core/host_limits.h"
#include "cuda/cuda_marks.h"
#include "cuda/driver_calls.h"
#ifdef TORCH_OFFLOAD_WITH_KERNELS
#include "cuda/packed_decoder.h"
#endif

namespace torch_offload {

namespace {

/// As many as PyTorch's pool has for one priority: after so many draws it begins anew.
constexpr int kPoolStreams = 32;

std::string name_of(c10::DeviceIndex device_index) {
  return "cuda:" + std::to_string(static_cast<int>(device_index));
}

c10::DeviceIndex checked_device_index(int device_index) {
  const c10::DeviceIndex num_devices = at::cuda::device_count();
  if (device_index < 0 || device_index >= num_devices) {
    throw IndexError("expected the index of one of this machine's " + std::to_string(num_devices) +
                     " GPUs, counted from 0, got " + std::to_string(device_index));
  }
  at::globalContext().lazyInitDevice(c10::kCUDA);
  return static_cast<c10::DeviceIndex>(device_index);
}

/// Whether the answer of cudaHostRegister is about this memory; everything else, such as a kernel
/// that failed earlier, is not ours to explain.
bool is_refused_registration(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
    case cudaErrorInvalidValue:  // what the driver says when the kernel could not pin the pages
    case cudaErrorHostMemoryAlreadyRegistered:
    case cudaErrorNotSupported:
    case cudaErrorNotPermitted:
    case cudaErrorOperatingSystem:
      return true;
    default:
      return false;
  }
}

/// Throws: MemoryError with nothing registered.
void register_pages(void* memory, std::size_t size_bytes, unsigned int flags) {
  const cudaError_t error = cudaHostRegister(memory, size_bytes, flags);
  if (error == cudaSuccess) {
    return;
  }
  if (!is_refused_registration(error)) {
    C10_CUDA_CHECK(error);
  }
  // CUDA registers all or nothing, but remembers the failure for whoever asks next.
  static_cast<void>(cudaGetLastError());
  const HostLimits limits = read_host_limits();
  throw MemoryError(
      "expected to page-lock " + format_bytes(size_bytes) + " of host memory, got " +
      cudaGetErrorName(error) + " (" + cudaGetErrorString(error) +
      "); the locked-memory limit is " +
      (limits.locked_limit_bytes ? format_bytes(*limits.locked_limit_bytes) : "none"));
}

}  // namespace

/// Note [A block's other users]
/// The allocator knows one stream per block, the one that was current when it was allocated; it
/// may hand out a block whose last tenant's kernels are still queued there, and hands it on behind
/// that stream alone. The window is used on other streams. So every other stream first waits for
/// the point that the allocating one had reached, whether it is known by then or appears later;
/// and when the block is freed, the allocator is told of every stream that may have used it. That
/// is the only use of record_stream here: what places and their events order in between needs
/// none.
///
/// Note [Marks on copy streams]
/// Nobody else submits to a copy stream: between two calls of ours it stays where it is. There the
/// mark behind the last copy or wait serves as the begin of what comes next, and as the time of a
/// record. (OpLog knows that nothing begins before it was submitted.) On other streams the model's
/// kernels lie between our calls, so each mark there is an event of its own, and records have none:
/// they stand directly behind a mark of the unit's end.
struct CudaDevice::State {
  struct Stream {
    at::cuda::CUDAStream stream;
    cudaStream_t handle;  // for good: CUDAStream looks it up anew, under a guard of its own
    std::string name;
    bool is_ours = false;        // nobody else submits to it
    MarkId last_mark = kNoMark;  // of the point that it has been brought to; only if it is ours
  };
  struct Block {
    c10::DataPtr data;
    at::cuda::CUDAEvent allocated;
  };

  explicit State(c10::DeviceIndex index) : device_index(index) {}

  const c10::DeviceIndex device_index;
  std::deque<Stream> streams;  // by StreamId; a deque, because names are handed out by reference
  std::deque<at::cuda::CUDAEvent> events;  // by EventId
  std::unordered_map<void*, Block> blocks;
  CudaMarks marks;
  const DriverCalls driver;

  bool knows(const at::cuda::CUDAStream& stream) const {
    return std::any_of(streams.begin(), streams.end(),
                       [&](const Stream& known) { return known.stream == stream; });
  }

  StreamId add(const at::cuda::CUDAStream& stream, std::string name, bool is_ours = false) {
    for (auto& [memory, block] : blocks) {
      block.allocated.block(stream);  // the last tenant of the block may still use it
    }
    streams.push_back({stream, stream.stream(), std::move(name), is_ours});
    return static_cast<StreamId>(streams.size() - 1);
  }

  const at::cuda::CUDAStream& stream(StreamId id) const {
    check_internal(id < streams.size(), "a stream that this device does not know");
    return streams[id].stream;
  }

  /// The stream to submit work to: from here on it is not where its last mark was.
  cudaStream_t handle_for_work(StreamId id) {
    check_internal(id < streams.size(), "a stream that this device does not know");
    streams[id].last_mark = kNoMark;
    return streams[id].handle;
  }

  cudaStream_t handle(StreamId id) const {
    check_internal(id < streams.size(), "a stream that this device does not know");
    return streams[id].handle;
  }

  /// A stream of the pool that this device has not seen yet, as long as there is one.
  at::cuda::CUDAStream draw_stream(int priority) const {
    at::cuda::CUDAStream stream = at::cuda::getStreamFromPool(priority, device_index);
    for (int draw = 1; draw < kPoolStreams && knows(stream); ++draw) {
      stream = at::cuda::getStreamFromPool(priority, device_index);
    }
    return stream;
  }

  at::cuda::CUDAEvent& event(EventId id) {
    check_internal(id < events.size(), "an event that this device does not know");
    return events[id];
  }
};

CudaDevice::CudaDevice(int device_index)
    : state_(std::make_unique<State>(checked_device_index(device_index))) {}

CudaDevice::~CudaDevice() {
  if (in_forked_child()) {
    // On purpose: destroying it would call CUDA.
    [[maybe_unused]] const State* leaked = state_.release();
  }
}

bool CudaDevice::is_capturing() const {
  const c10::cuda::CUDAGuard guard(state_->device_index);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(
      cudaStreamIsCapturing(at::cuda::getCurrentCUDAStream(state_->device_index), &status));
  return status != cudaStreamCaptureStatusNone;
}

std::optional<int> CudaDevice::host_node() const {
  std::array<char, 32> address{};
  if (cudaDeviceGetPCIBusId(address.data(), static_cast<int>(address.size()),
                            state_->device_index) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return std::nullopt;
  }
  return read_pci_node(address.data());
}

int CudaDevice::device_index() const { return state_->device_index; }

const std::string& CudaDevice::stream_name(StreamId stream) const {
  check_internal(stream < state_->streams.size(), "a stream that this device does not know");
  return state_->streams[stream].name;
}

StreamId CudaDevice::do_create_stream(const StreamOptions& options) {
  if (options.priority > 0) {
    throw ValueError("expected a stream priority of 0 or below (lower runs first), got " +
                     std::to_string(options.priority));
  }
  return state_->add(state_->draw_stream(options.priority), options.name,
                     options.role == StreamRole::kCopy);
}

StreamId CudaDevice::do_current_stream() {
  const at::cuda::CUDAStream current = at::cuda::getCurrentCUDAStream(state_->device_index);
  // A handful of streams: a search is quicker than hashing.
  for (std::size_t index = 0; index < state_->streams.size(); ++index) {
    if (state_->streams[index].stream == current) {
      return static_cast<StreamId>(index);
    }
  }
  const bool is_default = current == at::cuda::getDefaultCUDAStream(state_->device_index);
  return state_->add(current, is_default ? "caller (default stream)"
                                         : "caller (stream " + std::to_string(current.id()) + ")");
}

void CudaDevice::do_set_current_stream(StreamId stream) {
  at::cuda::setCurrentCUDAStream(state_->stream(stream));
}

EventId CudaDevice::do_create_event() {
  state_->events.emplace_back();  // timing off; CUDA makes its half when it is first recorded
  return static_cast<EventId>(state_->events.size() - 1);
}

// PyTorch's event asks at every record and wait whether the current stream is being captured. After
// its first record, which makes it, the same CUDA calls are made without that question.

void CudaDevice::do_record(EventId id, StreamId stream) {
  at::cuda::CUDAEvent& event = state_->event(id);
  if (!event.isCreated()) {
    event.record(state_->stream(stream));
    return;
  }
  const cudaStream_t handle = state_->handle(stream);
  if (!state_->driver.record(event.event(), handle)) {
    const c10::cuda::CUDAGuard guard(state_->device_index);
    C10_CUDA_CHECK(cudaEventRecord(event.event(), handle));
  }
}

void CudaDevice::do_wait(StreamId stream, EventId id) {
  const cudaStream_t handle = state_->handle_for_work(stream);
  const cudaEvent_t event = state_->event(id).event();
  if (!state_->driver.wait(handle, event)) {
    const c10::cuda::CUDAGuard guard(state_->device_index);
    C10_CUDA_CHECK(cudaStreamWaitEvent(handle, event, 0));
  }
}

bool CudaDevice::do_is_done(EventId event) { return state_->event(event).query(); }

void CudaDevice::do_synchronize(StreamId stream) { state_->stream(stream).synchronize(); }

void CudaDevice::do_copy(StreamId stream, const Copy& copy) {
  const cudaStream_t handle = state_->handle_for_work(stream);
  if (!state_->driver.copy_to_device(copy.destination, copy.source, copy.size_bytes, handle)) {
    const c10::cuda::CUDAGuard guard(state_->device_index);
    C10_CUDA_CHECK(cudaMemcpyAsync(copy.destination, copy.source, copy.size_bytes,
                                   cudaMemcpyHostToDevice, handle));
  }
}

#ifdef TORCH_OFFLOAD_WITH_KERNELS
bool CudaDevice::can_decode() const { return true; }

void CudaDevice::do_decode(StreamId stream, const Decode& decode) {
  DecodeLaunch launch;
  launch.blob = static_cast<const std::byte*>(decode.source);
  launch.blob_bytes = decode.packed_bytes;
  launch.place = static_cast<std::byte*>(decode.destination);
  launch.place_bytes = decode.size_bytes;
  launch.num_tiles = decode.num_tiles;
  const c10::cuda::CUDAGuard guard(state_->device_index);
  C10_CUDA_CHECK(launch_decode(state_->handle_for_work(stream), launch));
}
#else
bool CudaDevice::can_decode() const { return false; }

void CudaDevice::do_decode(StreamId stream, const Decode& decode) {
  Device::do_decode(stream, decode);
}
#endif

void CudaDevice::do_fill(StreamId stream, void* memory, std::size_t size_bytes,
                         std::uint8_t value) {
  const c10::cuda::CUDAGuard guard(state_->device_index);
  C10_CUDA_CHECK(cudaMemsetAsync(memory, value, size_bytes, state_->handle_for_work(stream)));
}

void* CudaDevice::do_allocate(std::size_t size_bytes) {
  const c10::cuda::CUDAGuard guard(state_->device_index);
  State::Block block;
  try {
    block.data = c10::cuda::CUDACachingAllocator::get()->allocate(size_bytes);
  } catch (const c10::OutOfMemoryError& error) {
    std::size_t free_bytes = 0;
    std::size_t total_bytes = 0;
    C10_CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    throw MemoryError(
        "expected " + format_bytes(size_bytes) + " of memory on " + name_of(state_->device_index) +
        ", got out of memory: " + format_bytes(free_bytes) + " of " + format_bytes(total_bytes) +
        " are free; lower gpu_budget or depth, or free device memory. PyTorch says: " +
        error.what_without_backtrace());
  }
  void* const memory = block.data.get();
  const at::cuda::CUDAStream allocating = at::cuda::getCurrentCUDAStream(state_->device_index);
  block.allocated.record(allocating);
  for (const State::Stream& other : state_->streams) {
    if (other.stream != allocating) {
      block.allocated.block(other.stream);  // the last tenant of the block may still use it
    }
  }
  state_->blocks.emplace(memory, std::move(block));
  return memory;
}

void CudaDevice::do_free(void* memory) {
  const auto found = state_->blocks.find(memory);
  check_internal(found != state_->blocks.end(), "free of memory that was not allocated here");
  for (const State::Stream& user : state_->streams) {
    // The next tenant of the block may only write behind all who read it.
    c10::cuda::CUDACachingAllocator::recordStream(found->second.data, user.stream);
  }
  state_->blocks.erase(found);
}

void CudaDevice::do_register_host(void* memory, std::size_t size_bytes) {
  const c10::cuda::CUDAGuard guard(state_->device_index);
  // Portable: page-locked for every GPU of the process, as PyTorch's own pinned memory is.
  register_pages(memory, size_bytes, cudaHostRegisterPortable);
}

void CudaDevice::do_register_read_only(void* memory, std::size_t size_bytes) {
  const c10::cuda::CUDAGuard guard(state_->device_index);
  register_pages(memory, size_bytes, cudaHostRegisterPortable | cudaHostRegisterReadOnly);
}

void CudaDevice::do_unregister_host(void* memory) {
  const c10::cuda::CUDAGuard guard(state_->device_index);
  const cudaError_t error = cudaHostUnregister(memory);
  // CUDA going down at the end of the process has unlocked everything already.
  if (error != cudaErrorCudartUnloading) {
    C10_CUDA_CHECK(error);
  }
}

void CudaDevice::do_start_marks() {
  for (State::Stream& stream : state_->streams) {
    stream.last_mark = kNoMark;
  }
  state_->marks.start(state_->draw_stream(0), &steady_time_ns);
}

MarkId CudaDevice::do_mark(StreamId id, MarkPoint point) {
  const at::cuda::CUDAStream& cuda_stream = state_->stream(id);
  State::Stream& stream = state_->streams[id];
  if (stream.last_mark != kNoMark) {
    return stream.last_mark;
  }
  if (point == MarkPoint::kRecorded) {
    return kNoMark;
  }
  const MarkId mark = state_->marks.mark(cuda_stream);
  if (stream.is_ours) {
    stream.last_mark = mark;
  }
  return mark;
}

std::vector<std::int64_t> CudaDevice::do_take_marks() { return state_->marks.take(); }

}  // namespace torch_offload
