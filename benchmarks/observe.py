"""What a forward did, counted: by our own device, and from outside, by torch and the kernel."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from clocks import DEVICE, ON_GPU, Run, synchronize
from yardstick import Streamed

# How the CUDA runtime and driver call it when ...
_HOST_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_ALLOCATIONS = ("cudaMalloc", "cudaMallocAsync", "cudaFree", "cudaHostAlloc", "cudaHostRegister")
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
# Of torch's caching allocator: blocks handed out, and segments asked of the driver.
_ALLOCATOR_COUNTS = ("allocation.all.allocated", "segment.all.allocated", "num_alloc_retries")


@dataclass(frozen=True)
class Counts:
    """Our own counters at one moment, or what they moved between two."""

    onloads: int
    misses: int
    bytes_onloaded: int
    host_synchronizes: int
    allocations: int
    registrations: int
    cpu_seconds: float

    @staticmethod
    def of(streamed: Streamed) -> Counts:
        """As they stand now."""
        stats, counters = streamed.handle.stats, streamed.device.counters
        return Counts(
            onloads=stats.onloads,
            misses=stats.misses,
            bytes_onloaded=stats.bytes_onloaded,
            host_synchronizes=counters.host_synchronizes,
            allocations=counters.allocations,
            registrations=counters.registrations,
            cpu_seconds=stats.cpu_seconds,
        )

    def __sub__(self, earlier: Counts) -> Counts:
        return Counts(**{name: value - vars(earlier)[name] for name, value in vars(self).items()})


class Counting:
    """Counts what happens inside a `with`, and requires it to be what streaming must do.

    Every forward copies every unit once, whatever the mode; the modes without host waits have
    none, and the pipeline has no misses.
    """

    def __init__(self, streamed: Streamed) -> None:
        self._streamed = streamed
        self.moved: Counts | None = None

    def __enter__(self) -> Counting:
        synchronize()
        self._forwards = self._streamed.handle.stats.forwards
        self._before = Counts.of(self._streamed)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            return
        synchronize()
        streamed = self._streamed
        moved = self.moved = Counts.of(streamed) - self._before
        forwards = self.forwards = streamed.handle.stats.forwards - self._forwards
        mode = streamed.handle.config.mode
        assert forwards > 0, "nothing was streamed: no forward of the offloaded model was counted"
        assert moved.onloads == forwards * streamed.num_units, (
            f"expected {forwards} forwards of {streamed.num_units} onloads, got {moved}"
        )
        assert moved.bytes_onloaded == forwards * streamed.streamed_bytes, (
            f"expected {forwards} x {streamed.streamed_bytes} bytes, got {moved}"
        )
        assert moved.allocations == moved.registrations == 0, f"a forward allocated: {moved}"
        if mode in ("events", "pipeline"):
            assert moved.host_synchronizes == 0, f"a forward made the host wait: {moved}"
        if mode == "pipeline":
            assert moved.misses == 0, f"a unit came too late in the steady state: {moved}"

    def per_forward(self) -> dict[str, float]:
        """The counts of one forward."""
        assert self.moved is not None
        return {name: value / self.forwards for name, value in vars(self.moved).items()}


def activation_bytes(run: Run) -> int | None:
    """Peak of device memory in one forward above what is allocated at rest; None without a GPU.

    The second forward of its shape or a later one: the first may allocate workspaces for good.
    """
    if not ON_GPU:
        run()
        return None
    synchronize()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    at_rest = torch.cuda.memory_allocated(DEVICE)
    run()
    synchronize()
    return torch.cuda.max_memory_allocated(DEVICE) - at_rest


def allocator_activity(run: Run) -> dict[str, int] | None:
    """What one forward asked of torch's allocator; None without a GPU."""
    if not ON_GPU:
        run()
        return None
    before = torch.cuda.memory_stats(DEVICE)
    run()
    synchronize()
    after = torch.cuda.memory_stats(DEVICE)
    return {name: after.get(name, 0) - before.get(name, 0) for name in _ALLOCATOR_COUNTS}


def runtime_calls(run: Run, forwards: int) -> dict[str, int] | None:
    """What `forwards` forwards called in the CUDA runtime, by torch's profiler.

    None without a GPU. The profiler waits and allocates as well: only differences between two
    models mean something.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if ON_GPU:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    synchronize()
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(forwards):
            run()
        synchronize()
    calls: Counter[str] = Counter()
    for event in profile.key_averages():
        calls[event.key] += event.count
    if not ON_GPU:
        return None
    memcpys = {name: count for name, count in calls.items() if name.startswith("Memcpy HtoD")}
    return {
        "host_waits": sum(calls[name] for name in _HOST_WAITS),
        "allocations": sum(calls[name] for name in _ALLOCATIONS),
        "pageable_copies": sum(n for name, n in memcpys.items() if "Pageable" in name),
        "copies_to_device": sum(memcpys.values()),
        "launches": sum(calls[name] for name in _LAUNCHES),
        "stream_waits": calls["cudaStreamWaitEvent"],
        "event_records": calls["cudaEventRecord"] + calls["cudaEventRecordWithFlags"],
    }


def resident_host_bytes() -> int:
    """Memory of this process that no file backs, shared anonymous memory included."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


class HostMemoryPeak:
    """Samples the process's memory from a thread while a `with` lasts."""

    PERIOD_S = 0.005

    def __enter__(self) -> HostMemoryPeak:
        self.peak_bytes = resident_host_bytes()
        self.num_samples = 1
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(self.PERIOD_S):
            self.peak_bytes = max(self.peak_bytes, resident_host_bytes())
            self.num_samples += 1

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, resident_host_bytes())
