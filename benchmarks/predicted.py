"""What predictions are held against: durations from before, and turns of all that drifts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from clocks import Link, Run, device_ms
from torch import nn
from unit_times import ForwardTimes, forward_times, kernels_ms
from yardstick import Shape


@dataclass
class Durations:
    """What predictions are made from: measured once, before anything is predicted."""

    forwards: dict[tuple[Shape, tuple[str, ...]], ForwardTimes]
    link_rates: dict[int, float]

    def forward(
        self, plain: nn.Module, shape: Shape, names: list[str], tokens: torch.Tensor
    ) -> ForwardTimes:
        """Of these units at this shape."""
        key = (shape, tuple(names))
        if key not in self.forwards:
            self.forwards[key] = forward_times(plain, names, tokens)
        return self.forwards[key]

    def copy_ns(self, size_bytes: int) -> float:
        """A copy of so many bytes in one piece, nothing else running."""
        if size_bytes not in self.link_rates:
            self.link_rates[size_bytes] = Link(size_bytes).rate()["median"]
        return size_bytes / self.link_rates[size_bytes] * 1e9


@dataclass(frozen=True)
class Turns:
    """Device time in ms, round by round, of what took turns."""

    streamed_ms: list[float]
    kernels_ms: list[float]
    copies_ms: list[float]


def take_turns(streamed: Run, plain: Run, copies: Run, rounds: int) -> Turns:
    """The streamed model, the plain one's kernels without launching, and the bare copies."""
    turns = Turns([], [], [])
    for _ in range(rounds):
        turns.streamed_ms.extend(device_ms(streamed, forwards=2, rounds=1))
        turns.kernels_ms.append(kernels_ms(plain))
        turns.copies_ms.extend(device_ms(copies, forwards=1, rounds=1, lead_in=False))
    return turns
