"""The GPU: its link, the rate that it gives, its neighbours, and whether copies really overlap."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from torch_offload import _C
from torch_offload.doctor.finding import Finding
from torch_offload.doctor.system import System
from torch_offload.rates import format_byte_rate
from torch_offload.sizes import format_size

# GB/s of one lane after encoding, by generation.
_LANE_RATES = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
# Of that, what large copies from page-locked memory reach: 55.2 of 63.0 GB/s on PCIe 5 x16.
_REACHED = 0.876
_COPY_BYTES = 2**28
# A measured rate below this part of what it should be is off.
_TOLERATED = 0.85
# Copies and kernels of equal length that overlap less than this do not overlap well.
_OVERLAPPED = 0.8
_LINK_FIELDS = (
    "pci.bus_id",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "pcie.link.width.max",
)


@dataclass(frozen=True)
class Link:
    """A PCIe link as the driver tells it, looked at while copies run."""

    generation: int
    generation_max: int
    width: int
    width_max: int

    def rate(self) -> float | None:
        """Bytes per second that large copies should reach; None for an unknown generation."""
        lane = _LANE_RATES.get(self.generation)
        return None if lane is None else lane * 1e9 * self.width * _REACHED

    def __str__(self) -> str:
        return f"PCIe {self.generation} x{self.width}"


def look_at_gpus(system: System) -> Iterator[Finding]:
    """Everything about the current GPU; one line where torch sees none."""
    if not torch.cuda.is_available():
        yield Finding(
            "GPU",
            "not tried",
            "torch sees none: link, rate, overlap, NVLink and pinned memory were not looked at; "
            "offload() runs on the host device, which is for trying things out",
        )
        return
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    yield Finding(
        "GPU", "ok", f"{properties.name}, {format_size(free)} free of {format_size(total)}"
    )
    yield judge_decoder(_C.has_kernels)
    rate, link = measure_link(system, device)
    yield from judge_link(link, rate)
    yield judge_overlap(*measure_overlap(device))
    yield from _neighbours(system, device)


def judge_decoder(has_kernels: bool) -> Finding:
    """Whether packed weights can be decoded on a GPU."""
    if has_kernels:
        return Finding("decoder of packed weights", "ok", "built")
    return Finding(
        "decoder of packed weights",
        "off",
        "missing: this build had no CUDA compiler of torch's own major version",
        "transport='packed' is refused on GPUs, and 'auto' means 'raw'",
        "install nvcc, or name one in CUDACXX, and build torch_offload again",
    )


def measure_link(system: System, device: torch.device) -> tuple[float, Link | None]:
    """Bytes per second of copies from page-locked memory, and the link while they run."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    rates = []
    for _ in range(5):
        rates.append(_COPY_BYTES / _seconds(lambda: target.copy_(source, non_blocking=True)))
    for _ in range(200):  # a link at rest shows a lower generation: keep it busy while asking
        target.copy_(source, non_blocking=True)
    link = read_link(system, device.index or 0)
    torch.cuda.synchronize(device)
    return sorted(rates)[len(rates) // 2], link


def read_link(system: System, index: int) -> Link | None:
    """The link as nvidia-smi tells it; None if it does not."""
    answer = system.query_gpu(index, _LINK_FIELDS)
    if answer is None or not all(answer[name].isdigit() for name in _LINK_FIELDS[1:]):
        return None
    numbers = [int(answer[name]) for name in _LINK_FIELDS[1:]]
    return Link(*numbers)


def judge_link(link: Link | None, rate: float) -> Iterator[Finding]:
    """What the link is, against what it could be, and its rate against what it should give."""
    measured = format_byte_rate(rate)
    if link is None:
        yield Finding("link", "not tried", "nvidia-smi does not say")
        yield Finding("copies to the GPU", "note", f"{measured}; what they should give is unknown")
        return
    if (link.generation, link.width) != (link.generation_max, link.width_max):
        full = Link(link.generation_max, link.generation_max, link.width_max, link.width_max)
        now, could = link.rate(), full.rate()
        factor = f"{could / now:.1f} times as long" if now and could else "longer"
        yield Finding(
            "link",
            "off",
            f"{link}, of {full}",
            f"a forward that is bound by the link takes {factor}",
            "see the slot, riser cables, bifurcation in the firmware, and power saving (ASPM)",
        )
    else:
        yield Finding("link", "ok", str(link))
    should = link.rate()
    if should is not None and rate < _TOLERATED * should:
        yield Finding(
            "copies to the GPU",
            "off",
            f"{measured}; {link} should give {format_byte_rate(should)}",
            f"a forward that is bound by the link takes {should / rate:.1f} times as long",
            "look at NUMA placement, other users of the link, and virtualization (IOMMU)",
        )
    else:
        should_text = "" if should is None else f"; the link should give {format_byte_rate(should)}"
        yield Finding("copies to the GPU", "ok", f"{measured}{should_text}")


def measure_overlap(device: torch.device) -> tuple[float, float, float]:
    """Seconds of copies alone, of kernels alone, and of both side by side."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    matrix = torch.randn(4096, 4096, dtype=torch.bfloat16, device=device)
    copying: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy() -> None:
        with torch.cuda.stream(copying):
            for _ in range(8):
                target.copy_(source, non_blocking=True)

    def compute(times: int) -> None:
        for _ in range(times):
            torch.mm(matrix, matrix)

    compute(10)
    copy()
    torch.cuda.synchronize(device)
    copy_s = _seconds(copy)
    times = max(1, round(copy_s / (_seconds(lambda: compute(50)) / 50)))
    compute_s = _seconds(lambda: compute(times))

    def both() -> None:
        copy()
        compute(times)

    return copy_s, compute_s, _seconds(both)


def judge_overlap(copy_s: float, compute_s: float, both_s: float) -> Finding:
    """How much of the shorter one disappears behind the longer one."""
    share = (copy_s + compute_s - both_s) / min(copy_s, compute_s)
    value = (
        f"copies {copy_s * 1e3:.0f} ms, kernels {compute_s * 1e3:.0f} ms, both {both_s * 1e3:.0f} "
        f"ms: {100 * max(0.0, min(1.0, share)):.0f} % overlap"
    )
    if share >= _OVERLAPPED:
        return Finding("a copy beside a kernel", "ok", value)
    return Finding(
        "a copy beside a kernel",
        "off",
        value,
        "copies add to a forward instead of hiding in it",
        "see CUDA_LAUNCH_BLOCKING, profilers that serialize, virtual GPUs, MIG and MPS",
    )


def _neighbours(system: System, device: torch.device) -> Iterator[Finding]:
    count = torch.cuda.device_count()
    if count == 1:
        yield Finding("other GPUs", "ok", "none")
        return
    reachable = [
        str(other)
        for other in range(count)
        if other != device.index and torch.cuda.can_device_access_peer(device, other)
    ]
    value = f"{count - 1}; {device} reaches {', '.join(reachable) or 'none'} directly"
    yield Finding("other GPUs", "note", value)
    links = system.run("nvidia-smi", "nvlink", "--status", "-i", str(device.index or 0))
    active = [line for line in (links or "").splitlines() if "GB/s" in line]
    text = f"{len(active)} links: {active[0].strip()} each" if active else "none"
    yield Finding("NVLink", "note", text)


def _seconds(work: object) -> float:
    assert callable(work)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def gpu_node(system: System) -> int | None:
    """NUMA node of the current GPU; None where there is no GPU or it is not known."""
    if not torch.cuda.is_available():
        return None
    answer = system.query_gpu(torch.cuda.current_device(), ("pci.bus_id",))
    if answer is None:
        return None
    bus = answer["pci.bus_id"].lower()
    bus = bus[4:] if len(bus.partition(":")[0]) == 8 else bus  # 00000000:1B:00.0
    node = system.read(f"/sys/bus/pci/devices/{bus}/numa_node")
    return int(node) if node is not None and node.isdigit() else None


def pinned_nodes(system: System) -> set[int]:
    """Nodes on which page-locked memory of this process lies; none without a GPU."""
    from torch_offload.doctor.memory import nodes_of

    if not torch.cuda.is_available():
        return set()
    pinned = torch.empty(2**26, dtype=torch.uint8, pin_memory=True).fill_(1)
    return nodes_of(system, pinned.data_ptr())
