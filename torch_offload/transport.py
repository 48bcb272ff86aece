"""How units may travel on a device: as they are, or packed without loss; see docs/packing.md."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from torch_offload import _C
from torch_offload.config import Config
from torch_offload.packing import Packing, Rates

_SAMPLE_WEIGHTS = 2**24
_NO_DECODER = (
    "this build has no decoder for GPUs, as there was no CUDA compiler of torch's own major version"
)


def packing_for(config: Config, device: torch.device) -> Packing:
    """What ``transport`` means on this device.

    Blocks while link and decoder of a GPU are measured, once for each. The host device stands for
    a GPU: its plans are those for one H100.

    Raises:
        NotImplementedError: If packed weights are asked for and cannot be decoded there.
    """
    if config.transport == "raw":
        return Packing()
    # Where masters are packed nothing can be copied raw: there is no choice.
    is_free = config.transport == "auto" and config.masters == "plain"
    transport = "packed" if config.transport == "auto" and not is_free else config.transport
    if device.type == "cpu":
        return Packing(transport)
    if _C.has_kernels:
        return Packing(transport, _measured_rates(device))
    if is_free:
        return Packing(remark=f"nothing: {_NO_DECODER}")
    raise NotImplementedError(
        "expected transport='raw' or 'auto' with masters='plain', got "
        f"transport={config.transport!r} with masters={config.masters!r}: {_NO_DECODER}; install "
        "one and build torch_offload again"
    )


@functools.cache
def _measured_rates(device: torch.device) -> Rates:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(_SAMPLE_WEIGHTS, generator=generator).bfloat16()
    unit = _C.pack([weights])
    packed = unit.blob.pin_memory()
    staged = packed.to(device)
    place = torch.empty(unit.place_bytes, dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        copy_s = _seconds(lambda: staged.copy_(packed, non_blocking=True))
        decode_s = _seconds(lambda: _C.unpack_on_gpu(staged, place, unit.num_tiles))
    return Rates(packed.nbytes / copy_s, unit.place_bytes / decode_s, "measured on this device")


def _seconds(run: Callable[[], object]) -> float:
    """Device time of one call, the second of two."""
    times = []
    for _ in range(2):
        begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return float(times[1])
