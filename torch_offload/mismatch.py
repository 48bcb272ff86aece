"""Explains a device mismatch: which streamed weight was read outside its unit's call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType

from torch import nn

_PHRASES = ("same device", "different devices", "device type")
_LISTED = 6

# Told the names of weights that were read outside their unit's call.
Listener = Callable[[list[str]], None]


class MismatchExplainer:
    """Adds to torch's error what it cannot know: that the weight was at rest, and the cure."""

    def __init__(self, streamed: Iterable[tuple[str, nn.Parameter]], listener: Listener) -> None:
        self._names = {id(parameter): name for name, parameter in streamed}
        self._listener = listener

    def explain(self, error: RuntimeError) -> None:
        """Extends the error's message if it is a device mismatch that nobody explained yet."""
        text = str(error)
        if "torch_offload" in text or not any(phrase in text for phrase in _PHRASES):
            return
        names = self._at_rest_where(error.__traceback__)
        listed = ", ".join(repr(name) for name in names[:_LISTED]) or "..."
        error.args = (
            f"{text}\ntorch_offload: a streamed weight was read outside the call of its unit, "
            "where it is in host memory; keep what is read there on the device with "
            f"resident=[{listed}]",
            *error.args[1:],
        )
        self._listener(names)

    def _at_rest_where(self, traceback: TracebackType | None) -> list[str]:
        """Streamed weights at rest below the innermost frame's ``self`` that has any."""
        frames = []
        while traceback is not None:
            frames.append(traceback.tb_frame)
            traceback = traceback.tb_next
        for frame in reversed(frames):
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module):
                names = [
                    self._names[id(parameter)]
                    for parameter in owner.parameters()
                    if id(parameter) in self._names and parameter.device.type == "cpu"
                ]
                if names:
                    return names
        return []
