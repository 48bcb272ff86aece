"""What helps to hunt a bug: settings of the environment, the logger, and ranges for Nsight."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

#: Where everything of ours is logged. It says nothing unless the program configures logging.
LOGGER = logging.getLogger("torch_offload")
LOGGER.addHandler(logging.NullHandler())


def debug_is_asked_for(debug: bool) -> bool:
    """Whether to debug: by the option, or by ``TORCH_OFFLOAD_DEBUG=1`` in the environment."""
    return debug or os.environ.get("TORCH_OFFLOAD_DEBUG") == "1"


def report_environment(device: torch.device, *, debug: bool) -> None:
    """Logs what changes how a forward runs, so that a log file tells it."""
    if debug:
        LOGGER.warning(
            "debugging: every copy and every use is waited for, places are poisoned on release, "
            "and the op log is kept; forwards are slow and memory grows with each"
        )
    if device.type == "cuda" and os.environ.get("CUDA_LAUNCH_BLOCKING") == "1":
        LOGGER.warning(
            "CUDA_LAUNCH_BLOCKING=1: every launch waits for its end, so no copy overlaps a kernel"
        )


def in_ranges(name: str, call_unit: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `Engine.call_unit` with NVTX ranges around its three steps, for Nsight.

    ``acquire``: the wait for the unit's copy, and copies that are issued ahead. ``compute``: the
    launches of the model's own kernels. ``release``: the end of the use, and further copies.
    """
    nvtx: Any = torch.cuda.nvtx  # which torch left without types
    push, pop = nvtx.range_push, nvtx.range_pop

    def call(
        unit: int,
        call_plain: Callable[..., Any],
        module: nn.Module | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        def compute(*plain_args: Any, **plain_kwargs: Any) -> Any:
            pop()
            push(f"compute {name}")
            try:
                return call_plain(*plain_args, **plain_kwargs)
            finally:
                pop()
                push(f"release {name}")

        push(f"acquire {name}")
        try:
            return call_unit(unit, compute, module, args, kwargs)
        finally:
            pop()

    return call
