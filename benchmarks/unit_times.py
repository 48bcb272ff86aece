"""How long each unit of a plain model computes, and the host launches: what predictions are of.

Kernels are timed behind a pause of the device in which the host launches all of them: between two
events lies otherwise whatever the host took to come from one to the other. Launches are timed by
the host's clock in forwards of their own.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from clocks import ON_GPU, Run, Stamp, synchronize
from torch import nn
from yardstick import forward

from torch_offload import _C
from torch_offload.prediction import Scenario

_ROUNDS = 3
# Of the device's clock, about 30 ms; doubled until the host needs no more.
_FIRST_PAUSE = 60_000_000
_MOST_PAUSES = 4


@dataclass(frozen=True)
class ForwardTimes:
    """Of one forward of a plain model; nothing of what is predicted goes into them.

    Attributes:
        kernels_ns: Of each unit, by name.
        other_kernels_ns: Of all else.
        launches_ns: What the host takes for each unit; empty where the host computes itself.
        other_launches_ns: For all else.
        host_was_ahead: Whether the host had launched the whole forward when it began.
    """

    kernels_ns: dict[str, int]
    other_kernels_ns: int
    launches_ns: dict[str, int]
    other_launches_ns: int
    host_was_ahead: bool

    @property
    def all_kernels_ns(self) -> int:
        """Of the whole forward."""
        return sum(self.kernels_ns.values()) + self.other_kernels_ns

    def scenario(
        self,
        units: Sequence[_C.Unit],
        copy_ns: Sequence[float],
        link_bytes_per_second: float,
        *,
        mode: str = "pipeline",
        kernels_by: float = 1.0,
        copies_by: float = 1.0,
    ) -> Scenario:
        """What is to be predicted; an equal part of all else goes to each unit.

        Args:
            units: In the order in which a forward calls them.
            copy_ns: Of each.
            link_bytes_per_second: Of copies.
            mode: As in `offload`.
            kernels_by: What kernels take now, as a part of what they took.
            copies_by: Likewise of copies.
        """
        others_ns = self.other_kernels_ns / len(units)
        launches_ns = self.other_launches_ns / len(units)
        return Scenario(
            units=units,
            compute_ns=[
                round((self.kernels_ns[unit.name] + others_ns) * kernels_by) for unit in units
            ],
            launch_ns=[round(self.launches_ns[unit.name] + launches_ns) for unit in units]
            if self.launches_ns
            else [],
            link_bytes_per_second=link_bytes_per_second / copies_by,
            copy_ns=[round(ns * copies_by) for ns in copy_ns],
            mode=mode,
        )


def held_back(run: Run, most_pauses: int = _MOST_PAUSES) -> bool:
    """Runs behind a pause of the device; says whether the host had submitted all by its end."""
    if not ON_GPU:
        run()
        return False
    for attempt in range(most_pauses):
        synchronize()
        torch.cuda._sleep(_FIRST_PAUSE << attempt)  # type: ignore[no-untyped-call]  # as torch's own tests
        paused = torch.cuda.Event()
        paused.record()
        run()
        if not paused.query():
            return True
    return False


def kernels_ms(run: Run) -> float:
    """Device time of what `run` submits, without any of its launching. Blocks until it is done."""
    stamps: list[Stamp] = []

    def stamped() -> None:
        stamps[:] = [Stamp()]
        run()
        stamps.append(Stamp())

    held_back(stamped)
    return (stamps[1] - stamps[0]) * 1e3


def forward_times(plain: nn.Module, names: Sequence[str], tokens: torch.Tensor) -> ForwardTimes:
    """Measures some forwards of a plain model. Blocks until they are done."""
    forward(plain, tokens)
    kernels, other_kernels, was_ahead = _timed(plain, names, tokens, Stamp, held_back)
    launches: dict[str, int] = {}
    other_launches = 0
    if ON_GPU:
        launches, other_launches, _ = _timed(plain, names, tokens, _HostStamp, _from_idle)
    return ForwardTimes(kernels, other_kernels, launches, other_launches, was_ahead)


class _HostStamp:
    """A point in the host's time, as `Stamp` is one in the device's."""

    def __init__(self) -> None:
        self._seconds = time.perf_counter()

    def __sub__(self, earlier: _HostStamp) -> float:
        return self._seconds - earlier._seconds


def _from_idle(run: Run) -> bool:
    synchronize()
    run()
    return True


def _timed(
    plain: nn.Module,
    names: Sequence[str],
    tokens: torch.Tensor,
    stamp: Callable[[], Any],
    runs: Callable[[Run], bool],
) -> tuple[dict[str, int], int, bool]:
    """Each unit's time in ns, that of all else, and whether all of `runs` said yes."""
    wholes: list[float] = []
    times: dict[str, list[float]] = defaultdict(list)
    was_ahead = True
    marks: dict[str, list[Any]] = {}
    ends: list[Any] = []

    def whole() -> None:
        marks.clear()
        ends[:] = [stamp()]
        forward(plain, tokens)
        ends.append(stamp())

    with _stamped(plain, names, stamp, marks):
        for _ in range(_ROUNDS):
            was_ahead = runs(whole) and was_ahead
            synchronize()
            wholes.append(ends[1] - ends[0])
            for name, (begin, end) in marks.items():
                times[name].append(end - begin)
    units = {name: round(median(values) * 1e9) for name, values in times.items()}
    return units, max(0, round(median(wholes) * 1e9) - sum(units.values())), was_ahead


@contextmanager
def _stamped(
    plain: nn.Module, names: Sequence[str], stamp: Callable[[], Any], marks: dict[str, list[Any]]
) -> Iterator[None]:
    """Keeps a stamp in front of each unit and one behind it, by name, of the last forward."""
    hooks = []
    for name in names:
        module = plain.get_submodule(name)

        def before(*_: object, name: str = name) -> None:
            marks[name] = [stamp()]

        def after(*_: object, name: str = name) -> None:
            marks[name].append(stamp())

        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
