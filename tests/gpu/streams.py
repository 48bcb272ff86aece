"""Streams held by spinning kernels: gates to prove an order with, and random delays."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torch_offload import Handle

# Above the clock rate of any GPU so far: a delay is never shorter than it says.
_CYCLES_PER_MS = 3_000_000

# Long against the submission of one forward of a small model, on a busy machine as well.
GATE_MS = 400.0


def our_streams(handle: Handle, prefix: str = "") -> dict[str, torch.cuda.Stream]:
    """The handle's streams whose names begin with `prefix`, as CUDA streams."""
    return {
        name: torch.cuda.Stream(
            stream_id=stream.stream_id,
            device_index=stream.device_index,
            device_type=stream.device_type,
        )
        for name, stream in handle.streams.items()
        if name.startswith(prefix)
    }


def copy_streams(handle: Handle) -> list[torch.cuda.Stream]:
    """The one copy stream of ``shared``, the two of ``split``, none of ``sync``."""
    return list(our_streams(handle, "weight_h2d").values())


def delay(stream: torch.cuda.Stream, delay_ms: float) -> None:
    """Keeps `stream` busy for at least so long. Does not block."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(int(delay_ms * _CYCLES_PER_MS))


def mark(stream: torch.cuda.Stream | None = None) -> torch.cuda.Event:
    """An event behind all that `stream`, or else the current one, has been given so far."""
    event = torch.cuda.Event()
    event.record(stream or torch.cuda.current_stream())
    return event


class Gate:
    """A stream that is held for a while, and knows whether it still is.

    A check made while the gate is closed needs no luck: had the gate opened before it, the test
    would fail for that reason, rather than pass.
    """

    def __init__(self, stream: torch.cuda.Stream, hold_ms: float = GATE_MS) -> None:
        delay(stream, hold_ms)
        self._opened = mark(stream)

    @property
    def is_closed(self) -> bool:
        """Whether the stream is still held. Does not block."""
        return not self._opened.query()

    def assert_holds_back(self, event: torch.cuda.Event, what: str) -> None:
        """Asserts that `event` has not happened, with the gate closed behind the question."""
        happened = event.query()
        assert self.is_closed, f"the gate opened before it was seen whether it holds back {what}"
        assert not happened, f"{what} did not wait for the held stream"

    def assert_lets_pass(self, event: torch.cuda.Event, what: str) -> None:
        """Asserts that `event` happens while the gate is closed. Blocks until it happens."""
        event.synchronize()
        assert self.is_closed, f"{what} waited for the held stream, or the gate was too short"


class RandomDelays:
    """Delays of random length on random streams, before forwards and between units.

    Args:
        handle: Of the offloaded model.
        seed: Of lengths and places.
        share: Part of the leaf calls that are delayed.
    """

    _LENGTHS_MS = (0.05, 0.2, 0.5, 2.0)

    def __init__(self, handle: Handle, seed: int, share: float = 0.4) -> None:
        self.count = 0
        self._handle = handle
        self._random = random.Random(seed)
        self._share = share
        self._streams: list[torch.cuda.Stream] = []

    def before_forward(self) -> None:
        """Delays each stream, or not. Call it at rest, before every forward."""
        self._streams = list(our_streams(self._handle).values())
        for stream in (*self._streams, torch.cuda.current_stream()):
            if self._random.random() < 0.7:
                self._delay(stream)

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[RandomDelays]:
        """Delays calls of leaves as well: after their unit was acquired, before their kernels."""
        hooks = [
            module.register_forward_pre_hook(self._before_leaf)
            for module in model.modules()
            if not any(True for _ in module.children())
        ]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _before_leaf(self, module: nn.Module, args: Any) -> None:
        if self._random.random() < self._share:
            self._delay(self._random.choice([*self._streams, torch.cuda.current_stream()]))

    def _delay(self, stream: torch.cuda.Stream) -> None:
        delay(stream, self._random.choice(self._LENGTHS_MS))
        self.count += 1
