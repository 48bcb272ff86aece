"""The reference figures, and where they come from.

A decoder layer has four steps: copy the attention weights, compute attention, copy the FFN weights,
compute the FFN. The published design runs them in two ways, and prints figures for Llama-3.1-70B.
`published` computes those figures anew from the four durations, by the formulas that stand beside
them; what `torch_offload.simulate` runs through the real scheduler stands next to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class LayerTimes:
    """Durations of the four steps of one layer, in ms; the defaults are the reference's."""

    mha_h2d_ms: float = 6.74
    mha_compute_ms: float = 152.42
    ffn_h2d_ms: float = 13.54
    ffn_compute_ms: float = 25.94

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or value < 0 or value > 1e9:
                name = field.name.removesuffix("_ms").replace("_", "-")
                raise ValueError(f"expected {name} as a duration of 0 to 1e9 ms, got {value}")
        if self.compute_ms <= 0:
            raise ValueError("expected a layer that computes something, got 0 ms for both halves")

    @property
    def compute_ms(self) -> float:
        """Both halves."""
        return self.mha_compute_ms + self.ffn_compute_ms

    @property
    def copy_ms(self) -> float:
        """Both copies."""
        return self.mha_h2d_ms + self.ffn_h2d_ms


@dataclass(frozen=True)
class CallCosts:
    """What each call costs the host, in ms, as the reference's own timeline shows it."""

    copy_ms: float = 0.010
    launch_ms: float = 0.010
    record_ms: float = 0.001
    wait_ms: float = 0.001


@dataclass(frozen=True)
class Figures:
    """The rows of the table, for one way to run the layers.

    Attributes:
        layer_ms: One layer in the steady state.
        total_ms: All layers, the first one cold.
        cpu_ms: The host per layer, blocked or not.
        blocked_share: Part of that in which the host waited.
        hidden_share: Part of the copy time in which no compute waited for a copy.
        streams_at_once: Most streams that worked at one moment.
        tokens_per_second: Of the whole batch.
        gpu_share: Part of the time in which kernels ran.
    """

    layer_ms: float
    total_ms: float
    cpu_ms: float
    blocked_share: float
    hidden_share: float
    streams_at_once: int
    tokens_per_second: float
    gpu_share: float

    @property
    def tokens_per_hour(self) -> float:
        """Of the whole batch."""
        return 3600 * self.tokens_per_second


@dataclass(frozen=True)
class Published:
    """The published figures, recomputed: event-ordered and explicit synchronization."""

    events: Figures
    sync: Figures


# What is printed there for the default inputs and does not follow from the formulas below.
PRINTED = {
    "sync layer_ms": "205.42 ms",
    "events tokens_per_hour": "24,480",
    "sync tokens_per_hour": "21,960",
    "events gpu_share": "about 82 %",
    "sync gpu_share": "about 75 %",
}


def published(times: LayerTimes, layers: int, batch: int) -> Published:
    """Computes the published figures from the durations.

    - Event-ordered layer: MHA copy, then MHA while the FFN weights are copied, then FFN.
    - Explicit sync layer: all four steps, and the next layer's MHA copy once more.
    - All layers: so many times one layer.
    - Tokens per second: the batch over the time of all layers, rounded to one digit as there.
    - CPU: three copies and two launches at 0.010 ms, two events and one wait at 0.001 ms, and the
      second wait at 0.011 ms, which its timeline shows; under sync the host waits throughout.
    - Copy time hidden, streams at work: as stated there.
    - GPU use: what computes over what a layer takes.
    """
    calls = CallCosts()
    submitting_ms = 3 * calls.copy_ms + 2 * calls.launch_ms + 2 * calls.record_ms + calls.wait_ms
    cpu_ms = submitting_ms + 11 * calls.wait_ms
    events_ms = (
        times.mha_h2d_ms + max(times.mha_compute_ms, times.ffn_h2d_ms) + times.ffn_compute_ms
    )
    sync_ms = times.copy_ms + times.compute_ms + times.mha_h2d_ms

    def figures(
        layer_ms: float, cpu_ms: float, blocked: float, hidden: float, streams: int
    ) -> Figures:
        total_ms = layers * layer_ms
        return Figures(
            layer_ms=layer_ms,
            total_ms=total_ms,
            cpu_ms=cpu_ms,
            blocked_share=blocked,
            hidden_share=hidden,
            streams_at_once=streams,
            tokens_per_second=batch / total_ms * 1e3,
            gpu_share=times.compute_ms / layer_ms,
        )

    return Published(
        events=figures(events_ms, cpu_ms, 0.0, 1.0, 3),
        sync=figures(sync_ms, sync_ms, 0.997, 0.0, 1),
    )
