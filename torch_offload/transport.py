"""Whether streamed units travel as they are or packed without loss; see docs/packing.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch_offload import _C
from torch_offload.config import Config
from torch_offload.units import UnitSpec

# A unit that packing does not shrink below this part of its bytes travels raw.
MAX_SHARE = 0.75
_NUM_SLOTS = 2
_SAMPLE_WEIGHTS = 2**24
# Packed, a unit must be through in this part of the time that it takes raw: else nothing is gained.
_WORTH = 0.95


def staging_bytes(specs: Sequence[UnitSpec], packs: bool) -> int:
    """What the ring takes at most that packed units are copied into."""
    if not packs or not specs:
        return 0
    largest = max(sum(_C.aligned_size(p.nbytes) for _, p in spec.parameters) for spec in specs)
    return _NUM_SLOTS * _C.aligned_size(int(MAX_SHARE * largest))


def packed_bytes_at_most(specs: Sequence[UnitSpec], packs: bool) -> int:
    """What the packed copies of these units take at most in host memory, beside the masters."""
    if not packs:
        return 0
    return int(MAX_SHARE * sum(p.nbytes for spec in specs for _, p in spec.parameters))


def decides_to_pack(config: Config, device: torch.device) -> bool:
    """What ``transport`` means on this device. ``"auto"`` measures link and decoder; blocks then.

    Raises:
        NotImplementedError: If packed weights are asked for and cannot be decoded there.
    """
    if config.transport == "raw":
        return False
    can_decode = device.type == "cpu" or _C.has_kernels
    if config.transport == "packed" or config.masters == "packed":
        if not can_decode:
            raise NotImplementedError(
                "expected transport='raw' and masters='plain', got 'packed': this build has no "
                "decoder for GPUs, as there was no CUDA compiler of torch's own major version; "
                "install one "
                "and build torch_offload again"
            )
        return True
    # The host device copies faster than it decodes.
    return device.type == "cuda" and can_decode and _pays(device)


def _pays(device: torch.device) -> bool:
    """Whether copying packed weights and decoding them takes less time than copying them raw."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(_SAMPLE_WEIGHTS, generator=generator).bfloat16()
    unit = _C.pack([weights])
    packed = unit.blob.pin_memory()
    staged = packed.to(device)
    place = torch.empty(unit.place_bytes, dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        copy_s = _seconds(lambda: staged.copy_(packed, non_blocking=True))
        decode_s = _seconds(lambda: _C.unpack_on_gpu(staged, place, unit.num_tiles))
    raw_s = copy_s * weights.nbytes / packed.nbytes
    return max(copy_s, decode_s) < _WORTH * raw_s


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
