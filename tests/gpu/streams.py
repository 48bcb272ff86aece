"""Streams held by spinning kernels: gates to prove an order with."""

from __future__ import annotations

import torch

from torch_offload.selfcheck.delays import delay

# Long against the submission of one forward of a small model, on a busy machine as well.
GATE_MS = 400.0


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
