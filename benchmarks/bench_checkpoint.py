"""From a checkpoint in the page cache to the end of the first forward; and what of it is private.

The floor is the bytes over the slower of two rates measured in the same run: the link, and locking
the files' pages by several threads.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from clocks import DEVICE, ON_GPU, synchronize
from conftest import Reference
from records import Part
from stored import save_checkpoint
from torch import nn
from yardstick import Stage, Workload, forward, skeleton

import torch_offload

_READ_ONLY, _PORTABLE = 8, 1  # flags of cudaHostRegister
_CHUNK_BYTES = 128 * 2**20
_THREADS = 4


@pytest.fixture(scope="module")
def folder(stage: Stage, yardstick: Workload, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The yardstick's checkpoint, written a moment ago: its pages are in the page cache."""
    path = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(stage.plain(yardstick), path)
    yield path
    shutil.rmtree(path)


def _touch(path: Path) -> int:
    """Reads a file to the end, so that it is in the page cache."""
    size = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_CHUNK_BYTES):
            size += len(block)
    return size


def _locked_bytes_per_s(files: list[Path]) -> float:
    """How fast several threads lock the files' pages with the runtime alone, nothing of ours."""
    cudart: Any = torch.cuda.cudart()
    mapped = []
    chunks: list[tuple[int, int]] = []
    for path in files:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
        mapped.append(memory)
        begin = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        pages = -(-len(memory) // mmap.PAGESIZE) * mmap.PAGESIZE
        chunks += [
            (begin + at, min(_CHUNK_BYTES, pages - at)) for at in range(0, pages, _CHUNK_BYTES)
        ]

    def lock(chunk: tuple[int, int]) -> None:
        assert int(cudart.cudaHostRegister(*chunk, _READ_ONLY | _PORTABLE)) == 0

    begin_s = time.perf_counter()
    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(lock, chunks))
    seconds = time.perf_counter() - begin_s
    for begin, _ in chunks:
        assert int(cudart.cudaHostUnregister(begin)) == 0
    return sum(size for _, size in chunks) / seconds


def _read_bytes_per_s(files: list[Path]) -> float:
    """The host device locks nothing: there it is how fast the page cache is read."""
    begin = time.perf_counter()
    size = sum(_touch(path) for path in files)
    return size / (time.perf_counter() - begin)


def _anonymous_bytes() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.fixture
def expected(stage: Stage, yardstick: Workload, folder: Path) -> torch.Tensor:
    """The plain model's logits; the plain model is gone, so that nothing stands beside."""
    logits = forward(stage.plain(yardstick), yardstick.tokens(yardstick.shapes[0])).clone()
    stage.clear()
    return logits


def bench_checkpoint_first_forward(
    part: Part, reference: Reference, yardstick: Workload, folder: Path, expected: torch.Tensor
) -> None:
    """Files mapped, pages locked and copied, everything resident moved, one forward computed."""
    files = sorted(folder.glob("*.safetensors"))
    size_bytes = sum(_touch(path) for path in files)
    rate = (_locked_bytes_per_s if ON_GPU else _read_bytes_per_s)(files)
    tokens = yardstick.tokens(yardstick.shapes[0])
    seconds, unit_copies, private_bytes = [], 0, 0
    for _ in range(part.rounds(3, 8.0, least=2)):
        model: nn.Module = skeleton(yardstick)
        synchronize()
        before = _anonymous_bytes()
        begin = time.perf_counter()
        # Every unit streams: a budget would have more copied than what the first forward takes.
        handle = torch_offload.offload_from_checkpoint(model, folder, DEVICE, gpu_budget=None)
        logits = forward(model, tokens)
        synchronize()
        seconds.append(time.perf_counter() - begin)
        window = 0 if ON_GPU else handle.stats.window_bytes + handle.stats.bytes_resident
        private_bytes = _anonymous_bytes() - before - window
        assert torch.equal(logits, expected), "the first forward differs from the plain model's"
        streamed = [unit for unit in handle.units if unit.place is not None]
        parameters = dict(model.named_parameters())
        weight_bytes = sum(parameters[name].nbytes for unit in streamed for name in unit.parameters)
        assert sum(unit.bytes_in_files for unit in streamed) == weight_bytes
        assert handle.stats.bytes_onloaded >= weight_bytes, "nothing was streamed"
        unit_copies = max(unit.copies for unit in streamed)
        handle.remove()
        del model, handle
        gc.collect()
    floor_s = size_bytes / min(rate, reference.link_bytes_per_s)
    part.figures.update(
        what="first forward",
        checkpoint_bytes=size_bytes,
        weight_bytes=weight_bytes,
        num_files=len(files),
        locked_bytes_per_s=rate,
        link_bytes_per_s=reference.link_bytes_per_s,
        floor_seconds=floor_s,
        seconds=seconds,
        ratio=min(seconds) / floor_s,
        most_copies_of_a_unit=unit_copies,
        private_bytes=private_bytes,
        private_ratio=private_bytes / size_bytes,
        bit_equal=True,
    )
