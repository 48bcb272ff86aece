"""Where the time of a run went: computing, waiting for copies, or neither.

The unit of account is the compute lane: all streams that compute units, taken together. At every
moment it is in one of four states, so that the states add up to the whole:

- ``compute``: a unit's kernels run;
- ``stall``: none runs, and the lane waits for a copy of ours, be it by an event, behind the copy
  on the same stream (``sync``), or because the host itself waits for the copy (``streams``);
- ``between``: neither, between two units: the model's other kernels, or the launching of kernels;
- ``outside``: before the first unit and behind the last one, such as embedding and head.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from torch_offload.intervals import Intervals, intersect, most_at_once, subtract, total, union
from torch_offload.trace import Bar, Trace

_LANE = ("compute", "mixed")


@dataclass(frozen=True)
class UnitTimes:
    """What one unit took in all its uses, in ns.

    Attributes:
        uses: How often it computed.
        copies: How often it was copied.
        copy_ns: All its copies.
        compute_ns: All its computing.
        stall_ns: How long the compute lane waited for its copies.
        ahead_uses: Uses that the host had launched whole before the device began with them.
        ahead_ns: All their computing: of kernels alone.
        launch_ns: The least that the host took to launch one use.
    """

    uses: int = 0
    copies: int = 0
    copy_ns: int = 0
    compute_ns: int = 0
    stall_ns: int = 0
    ahead_uses: int = 0
    ahead_ns: int = 0
    launch_ns: int = 0


@dataclass(frozen=True)
class Attribution:
    """Where the time of a trace went, in ns.

    Attributes:
        span_ns: From the first to the last moment that was looked at.
        compute_ns: See the module's description, as for the next three.
        stall_ns: ...
        between_ns: ...
        outside_ns: ...
        copy_ns: The copy engine was busy.
        copy_idle_ns: It was not.
        hidden_share: Part of the copy time in which no compute waited for a copy.
        blocked_ns: The host was in a synchronize of ours.
        streams_at_once: Most streams that copied or computed at one moment.
        units: Times of each unit, by index.
        ahead_gaps: Gaps between uses of units whose kernels were all launched before they began.
        ahead_gap_ns: All of them, waiting for copies not counted.
        launch_gap_ns: What the host takes between launches of units, as a rule.
    """

    span_ns: int
    compute_ns: int
    stall_ns: int
    between_ns: int
    outside_ns: int
    copy_ns: int
    copy_idle_ns: int
    hidden_share: float
    blocked_ns: int
    streams_at_once: int
    units: tuple[UnitTimes, ...]
    ahead_gaps: int = 0
    ahead_gap_ns: int = 0
    launch_gap_ns: int = 0


def attribute(trace: Trace, begin_ns: int = 0, end_ns: int | None = None) -> Attribution:
    """Adds up a trace.

    Args:
        trace: What to look at.
        begin_ns: From when on; may lie before the trace's first bar.
        end_ns: Until when; the trace's end if None.
    """
    whole: Intervals = [(begin_ns, trace.end_ns if end_ns is None else end_ns)]
    lane = {index for index, row in enumerate(trace.rows) if row.kind in _LANE}
    compute = intersect(_times(trace.of_kind("compute")), whole)
    copies = intersect(_times(trace.of_kind("copy")), whole)
    stalls = _stalls(trace, lane)
    stall = intersect(subtract(_times(stalls), compute), whole)
    busy = union([*compute, *stall])
    rest = subtract(whole, busy)
    between = intersect(rest, [(busy[0][0], busy[-1][1])] if busy else [])
    copy_ns = total(copies)
    exposed_ns = total(intersect(copies, stall))
    working = [
        _times(bar for bar in trace.on_row(index) if bar.kind in ("copy", "compute"))
        for index in range(1, len(trace.rows))
    ]
    gaps = _gaps(trace, stall)
    ahead_gaps = [gap.device_ns for gap in gaps if gap.is_ahead]
    return Attribution(
        span_ns=total(whole),
        compute_ns=total(compute),
        stall_ns=total(stall),
        between_ns=total(between),
        outside_ns=total(rest) - total(between),
        copy_ns=copy_ns,
        copy_idle_ns=total(whole) - copy_ns,
        hidden_share=1.0 if copy_ns == 0 else 1.0 - exposed_ns / copy_ns,
        blocked_ns=total(intersect(_times(trace.of_kind("blocked")), whole)),
        streams_at_once=most_at_once(working),
        units=_per_unit(trace, stalls, compute),
        ahead_gaps=len(ahead_gaps),
        ahead_gap_ns=sum(ahead_gaps),
        launch_gap_ns=round(median(gap.host_ns for gap in gaps)) if gaps else 0,
    )


def _times(bars: Iterable[Bar]) -> Intervals:
    return union((bar.begin_ns, bar.end_ns) for bar in bars)


def _stalls(trace: Trace, lane: set[int]) -> list[Bar]:
    """Bars during which the lane may have waited for a copy, each with the unit it waited for."""
    copy_rows = {index for index, row in enumerate(trace.rows) if row.kind in ("copy", "mixed")}
    behind_a_copy = {arrow.wait_op for arrow in trace.arrows if arrow.from_row in copy_rows}
    stalls = []
    for bar in trace.bars:
        waits = bar.kind == "wait" and bar.op in behind_a_copy
        if bar.row in lane and (waits or bar.kind == "copy"):
            stalls.append(bar)
    return stalls + _waited_for_by_the_host(trace, lane)


def _waited_for_by_the_host(trace: Trace, lane: set[int]) -> list[Bar]:
    """The parts of copies during which the host waited, before it let the unit's kernels go."""
    copies = deque(bar for bar in trace.of_kind("copy") if bar.row not in lane)
    waited = []
    for blocked in trace.of_kind("blocked"):
        while copies and copies[0].end_ns <= blocked.begin_ns:
            copies.popleft()
        for copy in copies:
            if copy.begin_ns >= blocked.end_ns:
                break
            begin_ns = max(blocked.begin_ns, copy.begin_ns)
            end_ns = min(blocked.end_ns, copy.end_ns)
            waited.append(replace(copy, begin_ns=begin_ns, end_ns=end_ns))
    return waited


@dataclass(frozen=True)
class _Gap:
    """From the end of one use of a unit to the begin of the next."""

    device_ns: int
    host_ns: int
    is_ahead: bool  # the host had launched all that lies in it before the device came to it


def _uses(trace: Trace) -> list[tuple[Bar, Bar]]:
    """Each use as the host launched and the device computed it, in the order of launching."""
    launches = {bar.op: bar for bar in trace.of_kind("launch")}
    return [(launches[bar.op], bar) for bar in trace.of_kind("compute") if bar.op in launches]


def _gaps(trace: Trace, stall: Intervals) -> list[_Gap]:
    gaps = []
    blocked = _times(trace.of_kind("blocked"))
    uses = sorted(_uses(trace), key=lambda use: use[0].begin_ns)
    for (launch, compute), (next_launch, next_compute) in pairwise(uses):
        device = [(compute.end_ns, max(compute.end_ns, next_compute.begin_ns))]
        host = [(launch.end_ns, max(launch.end_ns, next_launch.begin_ns))]
        gaps.append(
            _Gap(
                device_ns=total(subtract(device, stall)),
                host_ns=total(subtract(host, blocked)),
                is_ahead=next_launch.begin_ns <= compute.end_ns,
            )
        )
    return gaps


def _per_unit(trace: Trace, stalls: list[Bar], compute: Intervals) -> tuple[UnitTimes, ...]:
    copies, uses, waits = (
        _by_unit(bars) for bars in (trace.of_kind("copy"), trace.of_kind("compute"), stalls)
    )
    ahead = _by_unit(bar for launch, bar in _uses(trace) if launch.end_ns <= bar.begin_ns)
    launches = _by_unit(trace.of_kind("launch"))
    return tuple(
        UnitTimes(
            uses=len(uses[unit]),
            copies=len(copies[unit]),
            copy_ns=sum(bar.duration_ns for bar in copies[unit]),
            compute_ns=sum(bar.duration_ns for bar in uses[unit]),
            stall_ns=total(subtract(_times(waits[unit]), compute)),
            ahead_uses=len(ahead[unit]),
            ahead_ns=sum(bar.duration_ns for bar in ahead[unit]),
            launch_ns=min((bar.duration_ns for bar in launches[unit]), default=0),
        )
        for unit in range(len(trace.unit_names))
    )


def _by_unit(bars: Iterable[Bar]) -> dict[int | None, list[Bar]]:
    found: dict[int | None, list[Bar]] = defaultdict(list)
    for bar in bars:
        found[bar.unit].append(bar)
    return found
