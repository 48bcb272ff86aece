"""The options of one `offload`, checked."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from torch import nn

from torch_offload.budget import AUTO, check_budget
from torch_offload.sizes import parse_size

Mode = Literal["sync", "streams", "events", "pipeline"]
Granularity = Literal["auto", "sublayer", "layer", "module"]
OnOom = Literal["shrink", "raise"]
Streams = Literal["shared", "split"]
Transport = Literal["raw", "packed", "packed_resident", "auto"]
Masters = Literal["plain", "packed"]


def _check_choice(what: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"expected {what} to be one of {listed}, got {value!r}")


def _check_flag(what: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(
            f"expected {what} to be True or False, got {value!r}; write {what}=True, or leave it "
            "out"
        )


def _check_list(what: str, value: object, items: str) -> None:
    if isinstance(value, str | nn.Module):
        raise TypeError(f"expected {what} as a list, got one item; write {what}=[...]")
    # An iterator would be empty when it is asked again.
    if not isinstance(value, Sequence | Set) or isinstance(value, bytes | bytearray):
        raise TypeError(
            f"expected {what} as a list of {items}, got {type(value).__name__}; write {what}=[...]"
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `offload` was asked for.

    Attributes:
        mode: Who waits for whom. ``"pipeline"`` lets copies run ahead across layers and forwards;
            ``"sync"`` copies, waits, computes, waits, and is the baseline to debug against.
        granularity: What moves as one: ``"sublayer"`` (attention and FFN apart), ``"layer"``, or
            ``"module"`` (leaves, for the smallest window). ``"auto"`` takes leaves where they are
            predicted to be faster, and sublayers otherwise; `Handle.explain` says which.
        streams: ``"shared"`` (one copy stream, kernels stay on the caller's stream) or ``"split"``
            (a copy and a compute stream for each half of a layer).
        transport: How units travel: ``"raw"``, as they are; ``"auto"``, each unit in the fastest of
            four ways by what is predicted: on the device as it is, packed on the device, streamed
            raw or streamed packed, which is bf16 without loss in about 0.7 of its bytes, decoded
            on the device; ``"packed"``, the same, but all that streams travels packed;
            ``"packed_resident"``, all units stay packed on the device and none travels. Bits are
            the same. Packed copies of what travels take that much more page-locked memory.
        packed_cache: A folder that keeps the packed weights for the next run, which takes them
            from there instead of packing them, if the weights are the same. None keeps nothing.
        masters: What waits in host memory: ``"plain"``, the weights as they are; ``"packed"``,
            nothing but their packed form, in about 0.7 of the memory, with any `transport` but
            ``"raw"``; ``transport="auto"`` then means ``"packed"``. A parameter at rest is
            unpacked when it is read or written, see docs/packing.md.
        depth: How many bytes copies may run ahead: ``2**30``, ``"2GiB"``, or None for the
            largest layer, or 2.5 times the largest unit where that is less.
            The next unit is always copied ahead, so ``0`` is allowed.
        gpu_budget: What the weights may take on the device, resident ones and window together:
            bytes, ``"10GiB"``, or a fraction of the device's memory such as ``0.5``. ``"auto"``
            takes what is free, less what forwards have been seen to need and less `headroom`.
            None streams every unit; so does ``"auto"`` on the host device, where a window saves
            nothing.
        headroom: Device memory that ``gpu_budget="auto"`` leaves free beyond what forwards have
            been seen to need, for a cache that grows: ``"1GiB"``.
        on_oom: What follows when a forward runs out of device memory. ``"shrink"`` gives back all
            resident units, so that the next forward has that room, and raises; ``"raise"`` says
            what to set. The failed forward is never repeated: its cache is half written.
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
    transport: Transport = "raw"
    packed_cache: str | Path | None = None
    masters: Masters = "plain"
    depth: int | str | None = None
    gpu_budget: int | float | str | None = AUTO
    headroom: int | str = "1GiB"
    on_oom: OnOom = "shrink"
    units: Sequence[str | nn.Module] | None = None
    resident: Sequence[str] = ()
    debug: bool = False
    nvtx: bool = False
    poison: bool = False

    def __post_init__(self) -> None:
        _check_choice("mode", self.mode, get_args(Mode))
        _check_choice("granularity", self.granularity, get_args(Granularity))
        _check_choice("streams", self.streams, get_args(Streams))
        _check_choice("transport", self.transport, get_args(Transport))
        _check_choice("masters", self.masters, get_args(Masters))
        _check_choice("on_oom", self.on_oom, get_args(OnOom))
        if self.mode == "sync" and self.streams == "split":
            raise ValueError(
                "expected mode='sync' with streams='shared', got streams='split': sync knows one "
                "stream; use mode='streams' to synchronize between streams of their own"
            )
        if self.masters == "packed" and self.transport == "raw":
            raise ValueError(
                "expected transport='packed', 'packed_resident' or 'auto' with masters='packed', "
                "got 'raw': there is nothing but packed weights to copy; write offload(..., "
                "transport='packed', masters='packed')"
            )
        self._check_packed_cache()
        if self.units is not None:
            _check_list("units", self.units, "names, patterns or modules")
            if not self.units:
                raise ValueError(
                    "expected units as a list of names, patterns or modules, got an empty one; "
                    "name what to stream, or leave units out: then it is found by structure"
                )
        _check_list("resident", self.resident, "names or patterns")
        for what in ("debug", "nvtx", "poison"):
            _check_flag(what, getattr(self, what))
        check_budget(self.gpu_budget)
        _ = self.depth_bytes, self.headroom_bytes

    def _check_packed_cache(self) -> None:
        if self.packed_cache is None:
            return
        if not isinstance(self.packed_cache, str | Path) or self.packed_cache == "":
            raise ValueError(
                f"expected packed_cache as a folder, got {self.packed_cache!r}; '.' is the current "
                "one, and only a model that is loaded from a checkpoint's folder has a place for "
                "it by itself: from_pretrained(..., packed_cache=True)"
            )
        if self.transport == "raw":
            raise ValueError(
                "expected transport='packed', 'packed_resident' or 'auto' with packed_cache, got "
                "'raw', which packs nothing"
            )

    @property
    def depth_bytes(self) -> int | None:
        """`depth` in bytes."""
        return None if self.depth is None else parse_size(self.depth, "depth")

    @property
    def headroom_bytes(self) -> int:
        """`headroom` in bytes."""
        return parse_size(self.headroom, "headroom")
