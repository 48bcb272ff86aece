"""Choosing a plan before anybody knows what the forwards will be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

from torch_offload import _C
from torch_offload.simulate import streams_for

# Between the end of one copy and the begin of the next: what copies of 1 MiB take beyond their
# bytes, measured on PCIe 5.
COPY_LATENCY_NS = 5_000
# Where nobody has measured: only the proportions of kernels and decoder to copies matter, and the
# latency beside them. The decoder's is that of one H100, benchmarks/results/h100/codec.json.
NOMINAL_LINK_BYTES_PER_SECOND = 55.2e9
NOMINAL_DECODE_BYTES_PER_SECOND = 1637e9
# Kernels as parts of the copies of everything: a token, and a prompt that takes just as long. In
# between and beyond, whoever does well at both does well.
KERNEL_SHARES = (0.02, 1.0)


@dataclass(frozen=True)
class Packable:
    """Which units may be packed, and what that takes.

    Attributes:
        transport: As in `offload`.
        packed_bytes: Of each unit, at the most; 0 for one that packing would not shrink.
        decode_bytes_per_second: Of what comes out of the decoder.
        link_bytes_per_second: Of copies, measured beside it.
    """

    transport: str = "raw"
    packed_bytes: Sequence[int] = ()
    decode_bytes_per_second: float = NOMINAL_DECODE_BYTES_PER_SECOND
    link_bytes_per_second: float = NOMINAL_LINK_BYTES_PER_SECOND

    def of(self, chosen: Sequence[bool]) -> Packable:
        """For some of the units."""
        if not self.packed_bytes:
            return self
        packed = [size for size, is_one in zip(self.packed_bytes, chosen, strict=True) if is_one]
        return Packable(
            self.transport, packed, self.decode_bytes_per_second, self.link_bytes_per_second
        )


@dataclass(frozen=True)
class Times:
    """Measured durations of one forward, in place of what is expected before one has run.

    Attributes:
        compute_ns: Of one use of each unit.
        copy_ns: Of a raw copy of each.
        sequence: Units as the forward uses them; empty for each once, in order.
        launch_ns: What the host takes to launch the kernels of each; empty for nothing.
    """

    compute_ns: Sequence[int]
    copy_ns: Sequence[int]
    sequence: Sequence[int] = ()
    launch_ns: Sequence[int] = ()


RAW = Packable()


class Manner(TypedDict, total=False):
    """How forwards run, and what is known of them; what is left out is as by default.

    Attributes:
        depth_bytes: As in `offload`.
        mode: As in `offload`.
        streams: As in `offload`.
        times: Of a profile.
    """

    depth_bytes: int | None
    mode: str
    streams: str
    times: Times | None


def _request_for(
    units: Sequence[_C.Unit],
    packable: Packable,
    *,
    depth_bytes: int | None = None,
    mode: str = "pipeline",
    streams: str = "shared",
    times: Times | None = None,
) -> _C.PlannerRequest:
    """What the planner is asked: by measured times, or good for a token and for a prompt alike."""
    rate = packable.link_bytes_per_second
    copies = [unit.size_bytes / rate * 1e9 for unit in units]
    forwards = (
        [(times.compute_ns, 1.0)]
        if times
        else [([round(share * ns) for ns in copies], 1.0) for share in KERNEL_SHARES]
    )
    return _C.PlannerRequest(
        units,
        forwards=forwards,
        link_bytes_per_second=rate,
        copy_latency_ns=COPY_LATENCY_NS,
        copy_ns=times.copy_ns if times else None,
        launch_ns=times.launch_ns if times else (),
        sequence=times.sequence if times else (),
        depth_bytes=depth_bytes,
        transport=packable.transport,
        packed_bytes=packable.packed_bytes,
        decode_bytes_per_second=packable.decode_bytes_per_second,
        mode=mode,
        streams=streams_for(mode, streams),
    )


def choose(
    units: Sequence[_C.Unit],
    *,
    budget_bytes: int,
    packable: Packable = RAW,
    **manner: Unpack[Manner],
) -> _C.Choice:
    """Chooses what stays, what is packed, and where the rest lies.

    Does not block for longer than a fraction of a second. The same arguments give the same plan:
    a plan that was predicted is the one that is made.

    Raises:
        ValueError: If the budget is below the least, which the message names.
    """
    return _C.choose_plan(_request_for(units, packable, **manner), budget_bytes)


def choose_transports(plan: _C.Plan, packable: Packable, **manner: Unpack[Manner]) -> _C.Choice:
    """Chooses only how units travel that have their places."""
    return _C.choose_transports(_request_for(plan.units, packable, **manner), plan)
