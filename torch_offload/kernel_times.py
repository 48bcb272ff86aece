"""Two lines of time in a profile: what kernels take on the device, and launching on the host.

A duration between two events on a stream is that of the kernels between them only where the host
had launched all of them before the device began with the first. Elsewhere the device may have
waited for launches, as it does in a token's forward of a model whose weights are all resident. So
what was measured with the host ahead goes before what was not; where the host never was, as on the
host device, the two cannot be told apart and stay one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch_offload.profile import Profile, UnitProfile


@dataclass(frozen=True)
class KernelTimes:
    """Of one use each, in ns.

    Attributes:
        compute_ns: Kernels of each unit, by its index; 0 for one that was never used.
        launch_ns: The host's part in them; empty where it is in `compute_ns`.
        others_ns: What ran between units and outside of them, by use of a unit.
        launch_others_ns: The host's part in that, likewise.
    """

    compute_ns: tuple[float, ...]
    launch_ns: tuple[float, ...]
    others_ns: float
    launch_others_ns: float


def kernel_times(profile: Profile) -> KernelTimes:
    """Tells the two apart as far as the profile allows it."""
    ahead: dict[tuple[str, int], list[float]] = defaultdict(list)
    launches: dict[tuple[str, int], list[int]] = defaultdict(list)
    for unit in profile.units:
        if unit.times.ahead_uses:
            ahead[_sort(unit)].append(unit.times.ahead_ns / unit.times.ahead_uses)
        if unit.times.uses:
            launches[_sort(unit)].append(unit.times.launch_ns)

    def compute(unit: UnitProfile) -> float:
        times = unit.times
        if not times.uses:
            return 0.0
        if times.ahead_uses:
            return times.ahead_ns / times.ahead_uses
        measured = times.compute_ns / times.uses
        alike = ahead.get(_sort(unit))
        return min(measured, sum(alike) / len(alike)) if alike else measured

    total = profile.total
    uses = max(1, len(profile.sequence) * max(1, profile.measured.forwards))
    between_ns: float = total.between_ns
    if total.ahead_gaps:
        between_ns = min(between_ns, total.ahead_gap_ns / total.ahead_gaps * (uses - 1))
    return KernelTimes(
        compute_ns=tuple(compute(unit) for unit in profile.units),
        # The least: what a launch took beyond it was waiting, such as for a place in a full queue.
        launch_ns=tuple(min(launches.get(_sort(unit), [0])) for unit in profile.units)
        if ahead
        else (),
        others_ns=(between_ns + total.outside_ns) / uses,
        launch_others_ns=total.launch_gap_ns if ahead else 0,
    )


def _sort(unit: UnitProfile) -> tuple[str, int]:
    """Units of one kind and size are taken to be alike."""
    return unit.kind, unit.size_bytes
