"""Which device a forward runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

import torch

from torch_offload import _C
from torch_offload.user_warning import warn_user

DeviceMaker: TypeAlias = Callable[[torch.device], _C.Device]

_maker: ContextVar[DeviceMaker] = ContextVar("torch_offload_device_maker", default=_C.Device)


def make_device(device: torch.device) -> _C.Device:
    """Makes what an engine drives. May initialize CUDA."""
    return _maker.get()(device)


@contextmanager
def devices_made_by(maker: DeviceMaker) -> Iterator[None]:
    """Lets this thread's `offload` drive other devices: those with a planted fault."""
    token = _maker.set(maker)
    try:
        yield
    finally:
        _maker.reset(token)


_CURE = (
    "write device='cuda', 'cuda:1' or its index for a GPU, device='cpu' to try the host device, or "
    "leave it out"
)


def _parse(device: torch.device | str | int) -> torch.device:
    if isinstance(device, bool) or not isinstance(device, torch.device | str | int):
        raise TypeError(
            f"expected device as a torch.device, a string or an index, got {device!r} "
            f"({type(device).__name__}); {_CURE}"
        )
    try:
        return torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    except RuntimeError as error:
        raise ValueError(f"expected a 'cuda' or 'cpu' device, got {device!r}; {_CURE}") from error


def resolve_device(device: torch.device | str | int | None) -> torch.device:
    """Returns the execution device, a CUDA device with its index.

    ``None`` is the current CUDA device, or the host device where there is none, which a warning
    says. Does not block; may initialize CUDA.

    Raises:
        ValueError: If the device is of another type, is not there, or this build cannot drive it.
        TypeError: If it is nothing that names a device.
    """
    if device is None:
        if torch.cuda.is_available() and _C.has_cuda:
            return torch.device("cuda", torch.cuda.current_device())
        warn_user(
            "no CUDA device found; weights are streamed through a window in host "
            "memory (device='cpu'), which is for trying things out, not for speed"
        )
        return torch.device("cpu")
    resolved = _parse(device)
    if resolved.type == "cpu":
        return torch.device("cpu")
    if resolved.type != "cuda":
        raise ValueError(f"expected a 'cuda' or 'cpu' device, got '{resolved}'; {_CURE}")
    if not torch.cuda.is_available():
        raise ValueError(
            f"expected a CUDA device that is there, got '{resolved}' on a machine where torch sees "
            "none; use device='cpu' or device=None to try the host device"
        )
    index = torch.cuda.current_device() if resolved.index is None else resolved.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"expected a CUDA device index below {torch.cuda.device_count()}, got '{resolved}'"
        )
    return torch.device("cuda", index)
