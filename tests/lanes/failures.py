"""What may fail: a call of the device, an operator of torch, a hook; each at the k-th time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from torch_offload import _C
from torch_offload.selfcheck.failing_operator import FailingOperator

_DEVICE_ERRORS: dict[str, type[BaseException]] = {
    "memory": MemoryError,
    "bad_alloc": MemoryError,
    "runtime": RuntimeError,
}
_LAYER_ERRORS: tuple[type[BaseException], ...] = (
    RuntimeError,
    KeyboardInterrupt,
    torch.OutOfMemoryError,
)


class Failure:
    """Lets one thing fail. `context` brackets what it may strike in."""

    def __init__(self, error: type[BaseException], at: int) -> None:
        self.error = error
        self.at = at

    @property
    def struck(self) -> str:
        """What has failed; empty if nothing has."""
        raise NotImplementedError

    def context(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Arms it within a block."""
        raise NotImplementedError


class DeviceCall(Failure):
    """The k-th call of the device: copies, records, waits, allocations, registrations, all."""

    def __init__(self, kind: str, at: int) -> None:
        super().__init__(_DEVICE_ERRORS[kind], at)
        self.failure = _C.DeviceFailure(kind)

    @property
    def struck(self) -> str:
        """The name of the call."""
        return self.failure.failed_call

    @contextmanager
    def context(self, model: nn.Module) -> Iterator[None]:
        """Counts calls from here on."""
        self.failure.calls_until_failure = self.at
        try:
            yield
        finally:
            self.failure.calls_until_failure = 0


class Operator(Failure):
    """The k-th operator of torch: in a layer, between layers, in a copy of a weight."""

    def __init__(self, error: type[BaseException], at: int) -> None:
        super().__init__(error, at)
        self.mode = FailingOperator(at, error)

    @property
    def struck(self) -> str:
        """Its name."""
        return self.mode.failed

    def context(self, model: nn.Module) -> AbstractContextManager[Any]:
        """A dispatch mode."""
        return self.mode


class Hook(Operator):
    """The k-th hook that a user has set: before and behind the forward of each module."""

    @contextmanager
    def context(self, model: nn.Module) -> Iterator[None]:
        """Sets them."""
        hooks = []
        for module in model.modules():
            name = type(module).__name__
            hooks.append(module.register_forward_pre_hook(self._hook(f"pre-hook of {name}")))
            hooks.append(module.register_forward_hook(self._hook(f"hook of {name}")))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        return lambda *_: self.mode.count(name)


def failures(phase: str) -> Iterator[tuple[str, Callable[[int], Failure]]]:
    """Everything that may fail in a phase, as a name and what makes it for the k-th time."""
    for kind in _DEVICE_ERRORS:
        yield f"device call, {kind}", lambda at, kind=kind: DeviceCall(kind, at)  # type: ignore[misc]
    for error in _LAYER_ERRORS:
        yield f"operator, {error.__name__}", lambda at, e=error: Operator(e, at)  # type: ignore[misc]
        if phase == "forward":
            yield f"hook, {error.__name__}", lambda at, e=error: Hook(e, at)  # type: ignore[misc]
