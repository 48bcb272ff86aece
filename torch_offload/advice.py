"""What would help most: other options, tried in simulation with the measured durations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch_offload import _C
from torch_offload.bounds import Bound
from torch_offload.prediction import Scenario
from torch_offload.sizes import format_size

# Less than this part of a forward is not worth a change.
_WORTHWHILE = 0.01
# Of the free device memory, what weights may take: activations grow, allocators fragment.
_USABLE_SHARE = 0.9
_GIB, _MIB = 2**30, 2**20

#: Plans and runs a scenario: milliseconds of a forward, and device bytes of window and residents.
Predict = Callable[[Scenario], tuple[float, int]]


@dataclass(frozen=True)
class Advice:
    """One change and what it would save.

    Attributes:
        options: What to pass to `offload`: ``"gpu_budget='22GiB'"``; "" if nothing there helps.
        saving_share: Part of a forward that it saves, by simulation.
        sentence: For people, without a full stop.
    """

    options: str
    saving_share: float
    sentence: str


def advise(bound: Bound, now: Scenario, free_bytes: int, predict: Predict) -> Advice:
    """Tries what could help and returns the best.

    Args:
        bound: What bounds the run.
        now: What was run, with measured durations.
        free_bytes: Device memory that nobody uses.
        predict: See `Predict`.
    """
    now_ms, now_bytes = predict(now)
    room = now_bytes + int(_USABLE_SHARE * free_bytes)
    best = Advice("", 0.0, _otherwise(bound, now))
    for options, reason, candidate in _candidates(now, now_bytes, room):
        try:
            then_ms, then_bytes = predict(candidate)
        except ValueError:  # below the least budget
            continue
        saving = 1 - then_ms / now_ms if now_ms > 0 else 0.0
        if then_bytes <= room and saving > max(best.saving_share, _WORTHWHILE):
            best = Advice(options, saving, f"{reason} would save {100 * saving:.0f} %: {options}")
    return best


def _candidates(now: Scenario, now_bytes: int, room: int) -> Iterator[tuple[str, str, Scenario]]:
    """Cheapest first: of two that save the same, the first is chosen."""
    if now.mode != "pipeline":
        yield "mode='pipeline'", "copying ahead", now.with_(mode="pipeline")
    depth = now.depth_bytes or _C.make_plan(now.units).depth_bytes
    is_further_of_use = depth < sum(unit.size_bytes for unit in now.units)
    for factor in (2, 4) if is_further_of_use else ():
        further = _round_size(factor * depth)
        yield (
            f"depth='{further[0]}'",
            f"copying {factor} times as far ahead",
            now.with_(mode="pipeline", depth_bytes=further[1]),
        )
    budget = _round_size(room + now.outside_bytes)
    if budget[1] > now.outside_bytes:
        yield (
            f"gpu_budget='{budget[0]}'",
            f"{format_size(room - now_bytes)} of free device memory",
            now.with_(mode="pipeline", budget_bytes=budget[1] - now.outside_bytes),
        )


def _round_size(size_bytes: int) -> tuple[str, int]:
    """A size as one writes it in options, not above the given one by more than rounding."""
    unit, name = (_GIB, "GiB") if size_bytes >= 8 * _GIB else (_MIB, "MiB")
    count = max(1, size_bytes // unit)
    return f"{count}{name}", count * unit


def _otherwise(bound: Bound, now: Scenario) -> str:
    """What to say where no option of ours helps."""
    if bound.by == "link":
        streamed = sum(unit.size_bytes for unit in now.units)
        link_ns = streamed / now.link_bytes_per_second * 1e9
        ratio = link_ns / max(1, sum(now.compute_ns))
        return f"about {ratio:.1f} times as many tokens in a forward would take no longer"
    if bound.by == "launch":
        return "more tokens in a forward would help, no option of ours"
    if bound.by == "compute":
        return f"streaming costs {100 * bound.stall_share:.1f} %: nothing of ours would help"
    return "no option of ours would help"
