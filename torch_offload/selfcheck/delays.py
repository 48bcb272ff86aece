"""Delays of random length on streams and between layers, so that a missing wait shows."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torch_offload.handle import Handle

# Above the clock rate of any GPU so far: a delay is never shorter than it says.
_CYCLES_PER_MS = 3_000_000


def our_streams(handle: Handle, prefix: str = "") -> dict[str, Any]:
    """The handle's streams whose names begin with `prefix`, as CUDA streams."""
    return {
        name: torch.cuda.Stream(  # type: ignore[no-untyped-call]
            stream_id=stream.stream_id,
            device_index=stream.device_index,
            device_type=stream.device_type,
        )
        for name, stream in handle.streams.items()
        if name.startswith(prefix)
    }


def copy_streams(handle: Handle) -> list[Any]:
    """The one copy stream of ``shared``, the two of ``split``, none of ``sync``."""
    return list(our_streams(handle, "weight_h2d").values())


def loading_streams(handle: Handle) -> list[Any]:
    """Those, and the streams on which packed units are decoded."""
    return list(our_streams(handle, "weight_").values())


def delay(stream: Any, delay_ms: float) -> None:
    """Keeps a CUDA stream busy for at least so long. Does not block."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(int(delay_ms * _CYCLES_PER_MS))  # type: ignore[no-untyped-call]


class RandomDelays:
    """Delays of random length on random streams, before forwards and between units.

    On the host device the calling thread is delayed; its copies come late by the device itself.

    Args:
        handle: Of the offloaded model.
        seed: Of lengths and places.
        share: Part of the leaf calls that are delayed.
    """

    _LENGTHS_MS = (0.05, 0.2, 0.5, 2.0)

    def __init__(self, handle: Handle, seed: int, share: float = 0.4) -> None:
        self.count = 0
        self._handle = handle
        self._is_cuda = handle.device.type == "cuda"
        self._random = random.Random(seed)
        self._share = share
        self._streams: list[Any] = []

    def before_forward(self) -> None:
        """Delays each stream, or not. Call it at rest, before every forward."""
        if self._is_cuda:
            self._streams = list(our_streams(self._handle).values())
            for stream in (*self._streams, torch.cuda.current_stream()):
                if self._random.random() < 0.7:
                    self._delay(stream)
        elif self._random.random() < 0.7:
            self._delay(None)

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
            current = torch.cuda.current_stream() if self._is_cuda else None
            self._delay(self._random.choice([*self._streams, current]))

    def _delay(self, stream: Any) -> None:
        length_ms = self._random.choice(self._LENGTHS_MS)
        if self._is_cuda:
            delay(stream, length_ms)
        else:
            time.sleep(length_ms / 1e3)
        self.count += 1
