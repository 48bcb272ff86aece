"""A profile: where the time of some forwards went, what bounds them, and what would help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from torch_offload import _C
from torch_offload.advice import Advice, advise
from torch_offload.attribution import Attribution, UnitTimes, attribute
from torch_offload.bounds import Bound, bound_of
from torch_offload.choice import NOMINAL_LINK_BYTES_PER_SECOND, RAW, Packable
from torch_offload.kernel_times import kernel_times
from torch_offload.packing import copied_bytes
from torch_offload.prediction import Scenario, predicted_ms
from torch_offload.trace import Trace

# A sequence of uses longer than this is simulated in part.
_MOST_USES = 2000


@dataclass(frozen=True)
class UnitProfile:
    """One unit of the profiled model and its times in ns, all uses together.

    Attributes:
        name: As in `Handle.units`.
        layer_index: Likewise.
        kind: Likewise.
        size_bytes: Likewise.
        is_resident: Whether it stays on the device as it is.
        times: What it took.
        copied_bytes: What one copy of it carried: less than its size where it was packed.
    """

    name: str
    layer_index: int
    kind: str
    size_bytes: int
    is_resident: bool
    times: UnitTimes
    copied_bytes: int


@dataclass(frozen=True)
class Measured:
    """What is known besides the trace.

    Attributes:
        device: Where it ran.
        mode: As in `offload`.
        streams: As in `offload`.
        forwards: Completed in the block.
        begin_ns: When the block began, in the clock of the log.
        end_ns: When all that it submitted was done.
        cpu_ns: Spent in our own calls.
        depth_bytes: Of the plan.
        window_bytes: Of the plan.
        resident_bytes: Of units that the budget keeps on the device.
        outside_bytes: Of weights and buffers that no unit holds.
        free_bytes: Device memory that nobody uses.
    """

    device: str
    mode: str
    streams: str
    forwards: int
    begin_ns: int
    end_ns: int
    cpu_ns: int
    depth_bytes: int
    window_bytes: int
    resident_bytes: int
    outside_bytes: int
    free_bytes: int

    @property
    def wall_ns(self) -> int:
        """How long the block took, until the device was done."""
        return self.end_ns - self.begin_ns


@dataclass(frozen=True)
class Profile:
    """Where the time went; `print` it with rich, or read its fields.

    Attributes:
        measured: Wall time and options.
        total: The sums.
        units: By unit, in the planned order.
        sequence: Units in the order in which one forward used them.
        link_bytes_per_second: Median rate of the copies; 0 if there was none.
        bound: What bounds the run.
        advice: What would help most.
    """

    measured: Measured
    total: Attribution
    units: tuple[UnitProfile, ...]
    sequence: tuple[int, ...]
    link_bytes_per_second: float
    bound: Bound
    advice: Advice

    @property
    def sentence(self) -> str:
        """What bounds the run and what would help most."""
        return f"{self.bound.sentence}; {self.advice.sentence}"

    @property
    def streamed_bytes(self) -> int:
        """Bytes of all copies."""
        return sum(unit.copied_bytes * unit.times.copies for unit in self.units)

    @property
    def roofline_ns(self) -> float:
        """The longer of link and compute lane, had neither ever waited for the other."""
        lane_ns = self.measured.wall_ns - self.total.stall_ns
        rate = self.link_bytes_per_second
        return max(lane_ns, self.streamed_bytes / rate * 1e9 if rate else 0)

    @property
    def roofline_share(self) -> float:
        """How near the run came to its roofline: 1 is as fast as can be."""
        wall_ns = self.measured.wall_ns
        return min(1.0, self.roofline_ns / wall_ns) if wall_ns > 0 else 0.0

    @property
    def attributed_share(self) -> float:
        """Sum of what is attributed, over the wall time."""
        total = self.total
        parts = total.compute_ns + total.stall_ns + total.between_ns + total.outside_ns
        return parts / self.measured.wall_ns if self.measured.wall_ns > 0 else 0.0

    def save(self, path: str | Path) -> None:
        """Writes it as JSON, for `torch-offload simulate --profile`.

        Raises:
            OSError: If the file cannot be written.
        """
        from torch_offload.profile_file import write_profile

        write_profile(self, Path(path))

    def __rich__(self) -> Any:
        """For a terminal."""
        from torch_offload.profile_table import table_of

        return table_of(self)


def profile_of(
    trace: Trace, plan: _C.Plan, measured: Measured, packable: Packable = RAW
) -> Profile:
    """Adds up a trace of some forwards.

    Args:
        trace: With times.
        plan: What was run.
        measured: What the trace does not know.
        packable: What packed units take.
    """
    units = plan.units
    copied = copied_bytes(plan, packable.packed_bytes)
    total = attribute(trace, measured.begin_ns - trace.origin_ns, measured.end_ns - trace.origin_ns)
    profiles = tuple(
        UnitProfile(
            name=unit.name,
            layer_index=unit.layer_index,
            kind=unit.kind,
            size_bytes=unit.size_bytes,
            is_resident=place is None,
            times=times,
            copied_bytes=size,
        )
        for unit, place, times, size in zip(units, plan.places, total.units, copied, strict=True)
    )
    rates = [
        copied[bar.unit] / bar.duration_ns * 1e9
        for bar in trace.of_kind("copy")
        if bar.unit is not None and bar.duration_ns > 0
    ]
    profile = Profile(
        measured=measured,
        total=total,
        units=profiles,
        sequence=_one_forward(trace, measured.forwards),
        link_bytes_per_second=median(rates) if rates else 0.0,
        bound=bound_of(total),
        advice=Advice("", 0.0, ""),
    )
    return replace(profile, advice=_advice_for(profile, units, packable))


def scenario_of(profile: Profile, units: Sequence[_C.Unit]) -> Scenario:
    """What was profiled, as something to simulate.

    Each unit computes as long as it did, and an equal part of the time in which other kernels ran
    goes to each use; likewise what launching takes the host. Copies are reckoned raw.
    """
    kernels = kernel_times(profile)
    rate = profile.link_bytes_per_second or NOMINAL_LINK_BYTES_PER_SECOND

    def per_copy(unit: UnitProfile) -> int:
        times = unit.times
        if not times.copies:
            return round(unit.size_bytes / rate * 1e9)
        return round(times.copy_ns / times.copies * unit.size_bytes / max(1, unit.copied_bytes))

    has_residents = any(unit.is_resident for unit in profile.units)
    return Scenario(
        units=units,
        compute_ns=[round(ns + kernels.others_ns) for ns in kernels.compute_ns],
        launch_ns=[round(ns + kernels.launch_others_ns) for ns in kernels.launch_ns],
        link_bytes_per_second=rate,
        copy_ns=[per_copy(unit) for unit in profile.units],
        mode=profile.measured.mode,
        streams=profile.measured.streams,
        depth_bytes=profile.measured.depth_bytes,
        budget_bytes=(
            profile.measured.window_bytes + profile.measured.resident_bytes
            if has_residents
            else None
        ),
        outside_bytes=profile.measured.outside_bytes,
        sequence=profile.sequence or None,
    )


def units_of(profile: Profile) -> list[_C.Unit]:
    """The units of a profile as the core knows them."""
    return [
        _C.Unit(unit.name, unit.size_bytes, unit.layer_index, unit.kind) for unit in profile.units
    ]


def _advice_for(profile: Profile, units: Sequence[_C.Unit], packable: Packable) -> Advice:
    if profile.bound.by == "nothing" or not profile.sequence:
        return Advice("", 0.0, "call the model inside the block")
    now = scenario_of(profile, units).with_(packable=packable)
    return advise(profile.bound, now, profile.measured.free_bytes, predicted_ms)


def _one_forward(trace: Trace, forwards: int) -> tuple[int, ...]:
    """The uses of the last forward, if all were alike; else all of them."""
    uses = [bar.unit for bar in trace.of_kind("launch") if bar.unit is not None]
    if forwards > 0 and len(uses) % forwards == 0:
        length = len(uses) // forwards
        uses = uses[len(uses) - length :]
    return tuple(uses[-_MOST_USES:])
