"""How much other work the Python thread gets done while the GPU works through streamed forwards."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from clocks import DEVICE, ON_GPU, Run, synchronize
from conftest import Reference
from observe import Counting
from records import Part
from yardstick import YARDSTICK, Pair, Stage, Workload, shape_id

# What a serving thread does in between, as a stand-in: hashing a small request. About 10 us.
_REQUEST = bytes(range(256)) * 32
_SHAPES = (0, 1, 3)  # one token, many prompts, and the one that is bound by compute


def _work() -> None:
    hashlib.sha256(_REQUEST).digest()


def _work_seconds(least_seconds: float) -> float:
    """What one piece of work takes when nothing else is asked of the thread."""
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < least_seconds:
        _work()
        count += 1
    return (time.perf_counter() - begin) / count


@dataclass(frozen=True)
class Shares:
    """Where the wall time of some forwards went, for the Python thread; parts of 1."""

    wall_ms: float
    pieces: float
    free: float
    in_forward: float
    busy_in_forward: float


def _measure(run: Run, forwards: int, piece_seconds: float) -> Shares:
    """Submits forwards, and works until each is done."""
    pieces, in_forward, busy = 0, 0.0, 0.0
    synchronize()
    begin = time.perf_counter()
    for _ in range(forwards):
        called, cpu = time.perf_counter(), time.thread_time()
        run()
        in_forward += time.perf_counter() - called
        busy += time.thread_time() - cpu
        if ON_GPU:
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(DEVICE))
            while not done.query():
                _work()
                pieces += 1
    synchronize()
    wall = time.perf_counter() - begin
    return Shares(
        wall_ms=wall / forwards * 1e3,
        pieces=pieces / forwards,
        free=min(1.0, pieces * piece_seconds / wall),
        in_forward=in_forward / wall,
        busy_in_forward=busy / wall,
    )


@pytest.mark.parametrize(
    ("mode", "shape_index"),
    [
        pytest.param(mode, index, id=f"{mode}-{shape_id(YARDSTICK.shapes[index])}")
        for mode in ("pipeline", "sync")
        for index in _SHAPES
    ],
)
def bench_cpu_free(
    part: Part,
    stage: Stage,
    reference: Reference,
    yardstick: Workload,
    mode: str,
    shape_index: int,
) -> None:
    """Shares of the wall time: free for other work, in `forward()`, and of that ours.

    Eager launching of the model's own kernels keeps the thread as well: the plain model's is told
    apart, and so is what is spent inside our calls.
    """
    pair = Pair.of(stage, yardstick, shape_index, mode=mode)
    floor_ms = reference.floor_ms(pair.streamed.streamed_bytes)
    plain_ms = reference.plain_ms(yardstick, pair.shape)
    forwards = part.rounds(4, 2 * (plain_ms + floor_ms) * 1e-3)
    piece_seconds = _work_seconds(0.01 if part.tiny else 0.2)
    plain_shares = _measure(pair.plain_run, forwards, piece_seconds)
    with Counting(pair.streamed) as counting:
        shares = _measure(pair.streamed_run, forwards, piece_seconds)
    ours_ms = counting.per_forward()["cpu_seconds"] * 1e3
    part.figures.update(
        **pair.header("cpu_free"),
        shape_index=shape_index,
        piece_us=piece_seconds * 1e6,
        plain=vars(plain_shares),
        streamed=vars(shares),
        ours_ms=ours_ms,
        plain_submit_ms=plain_shares.in_forward * plain_shares.wall_ms,
        submit_ms=shares.in_forward * shares.wall_ms,
        blocked_ms=(shares.in_forward - shares.busy_in_forward) * shares.wall_ms,
        forwards=forwards,
    )


def bench_cpu_free_piece(part: Part) -> None:
    """The piece of work itself, so that its share of the wall time means something."""
    seconds: Any = [_work_seconds(0.01 if part.tiny else 0.1) for _ in range(3)]
    part.figures.update(what="cpu_free_piece", piece_us=sorted(seconds)[1] * 1e6)
