"""Packed weights: bits a weight, packing, the decoder alone, and copies beside the decoder."""

from __future__ import annotations

import os
import time
from functools import partial

import pytest
import torch
from clocks import DEVICE, ON_GPU, Link, Stamp, device_ms, spread, synchronize
from packed_units import OnDevice, feed_forward
from records import Part

from torch_offload import _C

_CODECS = ("raw", "e4p", "e33")
# Blocks of threads that decode; 0: as many as the GPU holds at once.
_BLOCKS = (0, 132, 528, 2112, 4224)


@pytest.fixture(scope="module")
def tensors(tiny: bool) -> list[torch.Tensor]:
    return feed_forward(tiny)


@pytest.mark.parametrize("codec", _CODECS)
def bench_codec_packing(part: Part, tensors: list[torch.Tensor], codec: str) -> None:
    """The encoder of the CPU, on all cores and on one.

    It writes to page-locked memory, as in `offload`, or to memory that is taken anew each time.
    """
    weights_bytes = sum(tensor.nbytes for tensor in tensors)
    num_threads = len(os.sched_getaffinity(0))
    unit = _C.pack(tensors, codec)
    memory = torch.empty(unit.blob.numel(), dtype=torch.uint8, pin_memory=ON_GPU)

    def rates(threads: int, rounds: int, memory: torch.Tensor | None = memory) -> dict[str, float]:
        found = []
        for _ in range(rounds):
            begin = time.perf_counter()
            packed = _C.pack(tensors, codec, threads, memory=memory)
            found.append(weights_bytes / (time.perf_counter() - begin))
            assert torch.equal(packed.blob, unit.blob), "the same weights were packed differently"
        return spread(found)

    part.figures.update(
        what="packing",
        codec=codec,
        weights_bytes=weights_bytes,
        bits_a_weight=8.0 * unit.blob.numel() / (weights_bytes / 2),
        threads=num_threads,
        bytes_per_s=rates(num_threads, 5),
        one_thread_bytes_per_s=rates(1, 2),
        new_memory_bytes_per_s=rates(num_threads, 3, None),
    )


@pytest.mark.parametrize("codec", _CODECS)
def bench_codec_decoder(part: Part, tensors: list[torch.Tensor], codec: str) -> None:
    """The decoder alone, in bytes of weights that come out."""
    unit = OnDevice(_C.pack(tensors, codec))
    unit.require_right(tensors)
    weights_bytes = sum(tensor.nbytes for tensor in tensors)
    rates = {}
    for blocks in _BLOCKS if ON_GPU else (0,):
        run = partial(unit.decode, blocks)
        times = device_ms(run, forwards=10 if ON_GPU else 1, rounds=5)
        rates[str(blocks)] = spread([weights_bytes / (ms * 1e-3) for ms in times])
    part.figures.update(
        what="decoder", codec=codec, weights_bytes=weights_bytes, bytes_per_s=rates, bit_equal=True
    )


@pytest.mark.parametrize("codec", ["e4p", "e33"])
def bench_codec_beside_copies(
    part: Part, tensors: list[torch.Tensor], codec: str, tiny: bool
) -> None:
    """What copies lose to a decoder that runs without a pause, and the decoder to them."""
    unit = OnDevice(_C.pack(tensors, codec))
    link = Link(2**20 if tiny else 2**29)
    copied_bytes = 4 * (2**20 if tiny else 2**29)
    alone_ms = device_ms(lambda: link.copy(copied_bytes), forwards=1, rounds=5)
    beside_ms = []
    decodes = []
    for _ in range(5):
        synchronize()
        if ON_GPU:
            beside_ms.append(_copy_beside(unit, link, copied_bytes, alone_ms[0], decodes))
        else:  # one thread does both: there is no beside
            beside_ms.extend(device_ms(lambda: link.copy(copied_bytes), forwards=1, rounds=1))
    unit.require_right(tensors)
    alone, beside = spread(alone_ms), spread(beside_ms)
    part.figures.update(
        what="beside",
        codec=codec,
        copied_bytes=copied_bytes,
        alone_ms=alone,
        beside_ms=beside,
        rate_kept=alone["median"] / beside["median"],
        decodes=decodes,
        bit_equal=True,
    )


def _copy_beside(
    unit: OnDevice, link: Link, copied_bytes: int, alone_ms: float, decodes: list[int]
) -> float:
    """Copies while another stream decodes the whole time; returns the copies' time in ms."""
    decoding, copying = torch.cuda.Stream(DEVICE), torch.cuda.Stream(DEVICE)
    one_ms = device_ms(unit.decode, forwards=1, rounds=1)[0]
    count = int(1.3 * alone_ms / max(one_ms, 1e-3)) + 4
    with torch.cuda.stream(decoding):
        unit.decode()
        first = torch.cuda.Event()
        first.record()
        for _ in range(count):
            unit.decode()
        last = torch.cuda.Event()
        last.record()
    with torch.cuda.stream(copying):
        copying.wait_event(first)
        begin = Stamp()
        link.copy(copied_bytes)
        end = Stamp()
        copying.synchronize()
        was_decoding = not last.query()
    synchronize()
    if not was_decoding:
        pytest.skip("the decoder had ended before the copies had: no figure")
    decodes.append(count)
    return (end - begin) * 1e3
