"""How units may travel on a device: as they are, or packed without loss; see docs/packing.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch

from torch_offload import _C
from torch_offload.config import Config
from torch_offload.packing import Packing, Rates

_SAMPLE_WEIGHTS = 2**24
_SAMPLES = 8
_ROUNDS = 5
_LEAST_CAPABILITY = (8, 0)  # of what the decoder is compiled for


def packing_for(config: Config, device: torch.device) -> Packing:
    """What ``transport`` means on this device.

    Blocks while link and decoder of a GPU are measured, once for each. The host device stands for
    a GPU: its plans are those for one H100.

    Raises:
        NotImplementedError: If packed weights are asked for and cannot be decoded there.
    """
    if config.transport == "raw":
        return Packing()
    transport = transport_of(config)
    is_free = transport == "auto"
    if device.type == "cpu":
        return Packing(transport)
    why_not = why_nothing_decodes(device)
    if why_not is None:
        return Packing(transport, _measured_rates(device))
    if is_free:
        return Packing(remark=f"nothing: {why_not}")
    raise NotImplementedError(
        "expected transport='raw' or 'auto' with masters='plain', got "
        f"transport={config.transport!r} with masters={config.masters!r}: {why_not}"
    )


def transport_of(config: Config) -> str:
    """What it comes to. Where masters are packed nothing can be copied raw: there is no choice."""
    has_choice = config.transport != "auto" or config.masters == "plain"
    return config.transport if has_choice else "packed"


def why_nothing_decodes(device: torch.device) -> str | None:
    """Why packed weights cannot be decoded on a device; None if they can."""
    if device.type == "cpu":
        return None
    if not _C.has_kernels:
        return (
            "this build has no decoder for GPUs, as there was no CUDA compiler of torch's own "
            "major version; install one and build torch_offload again"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        least, now = (".".join(map(str, one)) for one in (_LEAST_CAPABILITY, capability))
        return (
            f"the decoder needs a GPU of compute capability {least} or newer, and {device} is {now}"
        )
    return None


@cache
def _measured_rates(device: torch.device) -> Rates:
    """Rates of copies and decoder, in seconds at the most; without room for it, an H100's."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(_SAMPLE_WEIGHTS, generator=generator, device="cpu").bfloat16()
    unit = _C.pack([weights])
    with torch.cuda.device(device):
        try:
            packed = unit.blob.pin_memory()
            # In turn: more bytes than its cache holds, as a model has them.
            staged = [packed.to(device) for _ in range(_SAMPLES)]
            places = [
                torch.empty(unit.place_bytes, dtype=torch.uint8, device=device) for _ in staged
            ]
        except torch.OutOfMemoryError:
            return Rates()
        copy_s = _seconds([partial(one.copy_, packed, non_blocking=True) for one in staged])
        decode_s = _seconds(
            [
                partial(_C.unpack_on_gpu, one, place, unit.num_tiles)
                for one, place in zip(staged, places, strict=True)
            ]
        )
    return Rates(packed.nbytes / copy_s, unit.place_bytes / decode_s, "measured on this device")


def _seconds(runs: Sequence[Callable[[], object]]) -> float:
    """Device time of one call: the best of some rounds, each launched behind work that waits."""
    times = []
    for _ in range(_ROUNDS):
        begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for run in runs:  # while these are under way the others are launched
            run()
        begin.record()
        for run in runs:
            run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / len(runs))
    return float(min(times))
