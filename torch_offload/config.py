"""The options of one `offload`, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from torch_offload.sizes import parse_size

Mode = Literal["sync", "streams", "events", "pipeline"]
Granularity = Literal["sublayer", "layer", "module"]
Streams = Literal["shared", "split"]


def _check_choice(what: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"expected {what} to be one of {listed}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `offload` was asked for.

    Attributes:
        mode: Who waits for whom. ``"pipeline"`` lets copies run ahead across layers and forwards;
            ``"sync"`` copies, waits, computes, waits, and is the baseline to debug against.
        granularity: What moves as one: ``"sublayer"`` (attention and FFN apart), ``"layer"``, or
            ``"module"`` (leaves, for the smallest window).
        streams: ``"shared"`` (one copy stream, kernels stay on the caller's stream) or ``"split"``
            (a copy and a compute stream for each half of a layer).
        depth: How many bytes copies may run ahead: ``2**30``, ``"2GiB"``, or None for the
            largest layer, or 2.5 times the largest unit where that is less.
            The next unit is always copied ahead, so ``0`` is allowed.
        gpu_budget: What the weights may take on the device, resident ones and window together:
            ``"10GiB"`` keeps as many whole units resident as fit. None streams every unit.
        units: Names, patterns or modules to stream, for models that no rule fits:
            ``["encoder.blocks.*"]``. None finds them by structure.
        resident: Names or patterns of modules and parameters that stay on the device:
            ``["lm_head", "*.norm*"]``.
        debug: Waits for every copy and every use, poisons places on release, warns of reads that
            come too early, and keeps the op log: slow, and no matter of timing any more.
        nvtx: Puts NVTX ranges around acquire, compute and release of each unit, for Nsight.
        poison: Overwrites places with NaN bytes on release, so that a late reader shows. For tests.
    """

    mode: Mode = "pipeline"
    granularity: Granularity = "sublayer"
    streams: Streams = "shared"
    depth: int | str | None = None
    gpu_budget: int | str | None = None
    units: Sequence[str | nn.Module] | None = None
    resident: Sequence[str] = ()
    debug: bool = False
    nvtx: bool = False
    poison: bool = False

    def __post_init__(self) -> None:
        _check_choice("mode", self.mode, get_args(Mode))
        _check_choice("granularity", self.granularity, get_args(Granularity))
        _check_choice("streams", self.streams, get_args(Streams))
        if self.mode == "sync" and self.streams == "split":
            raise ValueError(
                "expected mode='sync' with streams='shared', got streams='split': sync knows one "
                "stream; use mode='streams' to synchronize between streams of their own"
            )
        for what in ("units", "resident"):
            if isinstance(getattr(self, what), str | nn.Module):
                raise TypeError(f"expected {what} as a list, got one item; write {what}=[...]")
        _ = self.depth_bytes, self.budget_bytes

    @property
    def depth_bytes(self) -> int | None:
        """`depth` in bytes."""
        return None if self.depth is None else parse_size(self.depth, "depth")

    @property
    def budget_bytes(self) -> int | None:
        """`gpu_budget` in bytes."""
        return None if self.gpu_budget is None else parse_size(self.gpu_budget, "gpu_budget")
