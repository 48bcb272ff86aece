"""Explains a device mismatch: which streamed weight was read outside its unit's call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_iter

_PHRASES = ("same device", "different devices", "device type", "weight type")
_LISTED = 6

# Told the names of weights that were read outside their unit's call.
Listener = Callable[[list[str]], None]


class MismatchExplainer:
    """Adds to torch's error what it cannot know: that the weight was at rest, and the cure.

    Args:
        device: Where the model runs.
        streamed: Name, parameter and unit of every streamed weight; only ids of them are kept.
        listener: Told the names that are named.
    """

    def __init__(
        self,
        device: torch.device,
        streamed: Iterable[tuple[str, nn.Parameter, nn.Module]],
        listener: Listener,
    ) -> None:
        self._device = device
        self._names: dict[int, str] = {}
        self._units: dict[int, int] = {}
        for name, parameter, unit in streamed:
            self._names[id(parameter)] = name
            self._units[id(parameter)] = id(unit)
        self._listener = listener

    def explain(self, error: RuntimeError, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Extends the error's message if it is a device mismatch that nobody explained yet.

        Args:
            error: What came out of a call of the model or of a part of it.
            args: Of that call; an input on another device explains more than any weight.
            kwargs: Likewise.
        """
        text = str(error)
        if "torch_offload" in text or not any(phrase in text for phrase in _PHRASES):
            return
        elsewhere = self._devices_elsewhere(args, kwargs)
        if elsewhere:
            told = f"inputs lie on {', '.join(elsewhere)}, but the model runs on {self._device}"
            error.args = (f"{text}\ntorch_offload: {told}; move them there", *error.args[1:])
            return
        names = self._read_at_rest(error.__traceback__)
        if names is None:
            told = (
                "this came from inside the call of a unit, whose weights were on the device; move "
                "what else is used there (a module, buffer or tensor that was added after "
                "offload()), or keep the weight of another unit that is read there on the device "
                "with resident=[...]"
            )
        else:
            listed = [repr(name) for name in names[:_LISTED]]
            if not names or len(names) > _LISTED:
                listed.append("...")
            told = (
                "a streamed weight was read outside the call of its unit, where it is in host "
                f"memory; keep what is read there on the device with resident=[{', '.join(listed)}]"
            )
        error.args = (f"{text}\ntorch_offload: {told}", *error.args[1:])
        self._listener(names or [])

    def _devices_elsewhere(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
        devices = {
            str(leaf.device) for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        return sorted(devices - {str(self._device)})

    def _read_at_rest(self, traceback: TracebackType | None) -> list[str] | None:
        """Streamed weights at rest that the innermost frame that has any could read.

        Returns None if that frame has streamed weights and all of them were on the device, as it
        was inside the call of their unit.
        """
        frames = list(_frames(traceback))
        # A unit is acquired by its call; `unit.forward(...)` leaves no such frame.
        in_call = {
            id(frame.f_locals.get("self"))
            for frame in frames
            if frame.f_code.co_name == "_call_impl"
        }
        for frame in reversed(frames):
            has_any = False
            for weights in self._visible_weights(frame):
                has_any |= bool(weights)
                resting = [
                    self._names[weight] for weight in weights if self._units[weight] not in in_call
                ]
                if resting:
                    return resting
            if has_any:
                return None
        return []

    def _visible_weights(self, frame: FrameType) -> Iterator[list[int]]:
        """Streamed weights that a frame holds itself, by a module at hand, or by its ``self``."""
        at_hand = [value for name, value in frame.f_locals.items() if name != "self"]
        for one in ([v for v in at_hand if isinstance(v, torch.Tensor)], at_hand):
            yield [weight for value in one for weight in self._streamed_below(value)]
        yield self._streamed_below(frame.f_locals.get("self"))

    def _streamed_below(self, value: object) -> list[int]:
        if isinstance(value, torch.Tensor):
            return [id(value)] if id(value) in self._names else []
        if isinstance(value, nn.Module):
            return [id(p) for p in value.parameters() if id(p) in self._names]
        return []


def _frames(traceback: TracebackType | None) -> Iterator[FrameType]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next
