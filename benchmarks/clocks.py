"""Two clocks: what the device took, by events, and what the host took until a call returned."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torch_offload import _C

DEVICE = (
    torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.is_available() and _C.has_cuda
    else torch.device("cpu")
)
ON_GPU = DEVICE.type == "cuda"

Run = Callable[[], Any]


def synchronize() -> None:
    """Blocks the host until the device is idle. The host device works on the calling thread."""
    if ON_GPU:
        torch.cuda.synchronize(DEVICE)


class Stamp:
    """A point in the work of the current stream. Made without blocking the host.

    The difference of two blocks until the later one is reached; in seconds, as pytest-benchmark
    wants it, so `Stamp` itself is the timer of benches that ask for device time.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        if ON_GPU:
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        else:
            self._seconds = time.perf_counter()

    def __sub__(self, earlier: Stamp) -> float:
        if not ON_GPU:
            return self._seconds - earlier._seconds
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) * 1e-3


@dataclass(frozen=True)
class HostCost:
    """What one call took until it returned, in ms.

    `busy_ms` is processor time of the calling thread: what is missing to `wall_ms` was blocked.
    """

    wall_ms: float
    busy_ms: float

    @staticmethod
    def of(run: Run) -> HostCost:
        """Calls `run` once."""
        wall, busy = time.perf_counter(), time.thread_time()
        run()
        return HostCost((time.perf_counter() - wall) * 1e3, (time.thread_time() - busy) * 1e3)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest, and how many there were."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "rounds": len(values),
    }


def device_ms(run: Run, *, forwards: int, rounds: int, lead_in: bool = True) -> list[float]:
    """Device time of one call, in ms, round by round; see `alternate` for what a round is."""
    times = []
    for _ in range(rounds):
        synchronize()
        if lead_in:
            run()
        begin = Stamp()
        for _ in range(forwards):
            run()
        times.append((Stamp() - begin) / forwards * 1e3)
    return times


@dataclass(frozen=True)
class Alternation:
    """Device time of one forward in ms, round by round, of two models that took turns."""

    plain_ms: list[float]
    streamed_ms: list[float]
    masters_ms: list[float]
    link_ms: list[float]
    plain_beside_copies_ms: list[float]


def alternate(
    benchmark: Any,
    plain: Run | None,
    streamed: Run,
    *,
    forwards: int,
    rounds: int,
    lead_in: bool = True,
    masters: Run | None = None,
    link: Run | None = None,
    wire_apart: bool = False,
    beside_copies: Run | None = None,
) -> Alternation:
    """Times `forwards` calls of each model per round, the two taking turns round by round.

    The clocks of a GPU sink under load, so the two must share whatever it does to them, and which
    of them comes first after a pause changes from round to round. In front of the timed calls goes
    one that is not timed and not waited for: copies run ahead of the kernels, so the first forward
    after a pause starts with its first units in place, and only between the ends of two forwards do
    copies and kernels add up to whole forwards. What never runs ahead of a forward needs no such
    `lead_in`. What the wire alone takes for the bytes of a forward has its turns as well, because
    others use the host's memory at the same time: `masters` copies the very bytes from where they
    lie, `link` as many from a small buffer. Meanwhile the clocks recover, and sink again in whoever
    comes next: where kernels are the limit, `wire_apart` takes these turns in front of all rounds.
    With `beside_copies` the plain model has a second turn beside these on a stream of their own:
    what copies take from kernels that do not wait for them.
    """
    plain_ms: list[float] = []
    masters_ms: list[float] = []
    link_ms: list[float] = []
    beside_ms: list[float] = []
    pair = None if plain is None or beside_copies is None else beside(plain, beside_copies)
    begun = 0

    def plain_turn() -> None:
        if plain is not None:
            plain_ms.extend(device_ms(plain, forwards=forwards, rounds=1))

    def wire_turns() -> None:
        for run, times in ((masters, masters_ms), (link, link_ms)):
            if run is not None:
                times.extend(device_ms(run, forwards=1, rounds=1, lead_in=False))

    def turns_in_front() -> None:
        nonlocal begun
        if begun % 2:
            plain_turn()  # of the round before, in which it came second
        begun += 1
        if pair is not None:
            beside_ms.extend(device_ms(pair, forwards=forwards, rounds=1))
        if not wire_apart:
            wire_turns()
        if begun % 2 == 0:
            plain_turn()
        synchronize()
        if lead_in:
            streamed()

    def timed() -> None:
        for _ in range(forwards):
            streamed()

    if wire_apart:
        for _ in range(3):
            wire_turns()
    benchmark.pedantic(timed, setup=turns_in_front, rounds=rounds)
    if begun % 2:
        plain_turn()
    streamed_ms = [s / forwards * 1e3 for s in round_seconds(benchmark)]
    return Alternation(plain_ms, streamed_ms, masters_ms, link_ms, beside_ms)


def beside(run: Run, copies: Run) -> Run:
    """`run`, with `copies` under way on a stream of their own from its begin on."""
    if not ON_GPU:
        return lambda: (copies(), run())
    side = torch.cuda.Stream(DEVICE)

    def both() -> None:
        side.wait_stream(torch.cuda.current_stream(DEVICE))
        with torch.cuda.stream(side):
            copies()
        run()

    return both


@dataclass(frozen=True)
class Submission:
    """Host costs of one forward each, of models that took turns, the queues empty before."""

    plain: list[HostCost]
    plain_beside_copies: list[HostCost]
    streamed: list[HostCost]


def alternation_seconds(
    plain_ms: float,
    streamed_ms: float,
    *,
    forwards: int,
    wire_ms: float = 0.0,
    wire_turns: int = 0,
    plain_turns: int = 1,
) -> float:
    """About what one round of `alternate` takes, with the forwards that lead in."""
    models_ms = (forwards + 1) * (plain_turns * plain_ms + streamed_ms)
    return (models_ms + wire_turns * wire_ms) * 1e-3


def alternate_submission(
    benchmark: Any, plain: Run, streamed: Run, copies: Run, *, rounds: int
) -> Submission:
    """Times how long one call keeps the caller, taking turns, always on an idle device.

    The plain model has a second turn, while `copies` are under way on a stream of their own: what
    a busy wire does to launches that have nothing to do with it.
    """
    costs = Submission([], [], [])
    pair = beside(lambda: costs.plain_beside_copies.append(HostCost.of(plain)), copies)

    def plain_round() -> None:
        synchronize()
        costs.plain.append(HostCost.of(plain))
        synchronize()
        pair()
        synchronize()

    benchmark.pedantic(
        lambda: costs.streamed.append(HostCost.of(streamed)), setup=plain_round, rounds=rounds
    )
    synchronize()
    return costs


def round_seconds(benchmark: Any) -> list[float]:
    """What pytest-benchmark measured in each round."""
    if benchmark.stats is None:
        raise RuntimeError(
            "expected pytest-benchmark to measure, got it disabled; run without "
            "--benchmark-disable and without xdist's -n"
        )
    return list(benchmark.stats.stats.data)


class Link:
    """The wire alone: copies from PyTorch's own page-locked memory, nothing else running."""

    def __init__(self, size_bytes: int) -> None:
        self._source = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=ON_GPU)
        self._source.fill_(1)
        self._target = torch.empty(size_bytes, dtype=torch.uint8, device=DEVICE)

    def copy(self, size_bytes: int) -> None:
        """Submits copies of so many bytes in all, over and over the same memory."""
        while size_bytes > 0:
            part = min(size_bytes, self._source.numel())
            self._target[:part].copy_(self._source[:part], non_blocking=True)
            size_bytes -= part

    def copy_from(self, sources: Sequence[torch.Tensor]) -> None:
        """Submits a copy of each, from where it lies in page-locked memory, over one another."""
        for source in sources:
            data = source.detach().view(-1).view(torch.uint8)
            self._target[: data.numel()].copy_(data, non_blocking=True)

    def rate(self) -> dict[str, float]:
        """Bytes per second of copies as large as this memory."""
        size_bytes = self._source.numel()
        times = device_ms(lambda: self.copy(size_bytes), forwards=2, rounds=7)
        return spread([size_bytes / (ms * 1e-3) for ms in times])
