"""A checkpoint larger than the memory for it: each forward against what the disk alone gives.

On a machine with a GPU the memory is what may be page-locked, a quarter of the checkpoint, and the
page cache is emptied before each forward. ``--memory-limit 1GiB`` runs it in a control group with
so much memory instead, also without a GPU, and ``--checkpoint 4GiB`` chooses the size.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clocks import DEVICE, ON_GPU, synchronize
from conftest import Reference
from records import Part
from stored import drop_from_page_cache, save_checkpoint
from yardstick import DEEP, Stage, Workload, forward, skeleton

import torch_offload
from torch_offload.sizes import parse_size

_BLOCK_BYTES = 8 * 2**20
_THREADS = 4
_MOST_READ_BYTES = 2 * 2**30
_GROUPS = Path("/sys/fs/cgroup/memory")


def _disk_bytes_per_s(files: list[Path]) -> float | None:
    """How fast several threads read the files past the page cache; None where that cannot be."""
    blocks = [
        (path, at)
        for path in files
        for at in range(0, path.stat().st_size - _BLOCK_BYTES + 1, _BLOCK_BYTES)
    ][: _MOST_READ_BYTES // _BLOCK_BYTES]
    if not blocks:
        return None
    with contextlib.ExitStack() as opened:

        def open_direct(path: Path) -> int:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
            opened.callback(os.close, descriptor)
            return descriptor

        def read(mine: list[tuple[Path, int]]) -> None:
            memory = mmap.mmap(-1, _BLOCK_BYTES)  # page-aligned, as O_DIRECT wants it
            for path, at in mine:
                assert os.preadv(descriptors[path], [memory], at) == _BLOCK_BYTES

        try:
            descriptors = {path: open_direct(path) for path in dict(blocks)}
            begin = time.perf_counter()
            with ThreadPoolExecutor(_THREADS) as threads:
                list(threads.map(read, [blocks[i::_THREADS] for i in range(_THREADS)]))
            return len(blocks) * _BLOCK_BYTES / (time.perf_counter() - begin)
        except OSError:  # a file system that knows only its cache
            return None


def _bytes_from_disk() -> int:
    """What this process has had read from disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


@contextlib.contextmanager
def _memory_limit(limit: str | None) -> Iterator[int | None]:
    """This process in a control group with so much memory; skips where none can be made."""
    if limit is None:
        yield None
        return
    group = _GROUPS / f"torch_offload_bench_{os.getpid()}"
    former = next(
        line.split(":", 2)[2]
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if line.split(":")[1] == "memory"
    )
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(parse_size(limit, "--memory-limit")))
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield parse_size(limit, "--memory-limit")
    finally:
        home = _GROUPS / former.lstrip("/")
        (home if home.is_dir() else _GROUPS).joinpath("cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


@pytest.fixture
def workload(pytestconfig: pytest.Config, peer: Workload) -> Workload:
    size = pytestconfig.getoption("--checkpoint")
    if size is None:
        return peer
    layers = parse_size(size, "--checkpoint") // DEEP.layer_bytes
    return replace(DEEP, name=f"{layers} layers of Llama-8B", num_layers=layers, vocab_size=4096)


@pytest.fixture
def folder(request: pytest.FixtureRequest, stage: Stage, workload: Workload) -> Path:
    if request.config.getoption("--checkpoint") is None:
        return Path(request.getfixturevalue("peer_folder"))
    path = Path(request.getfixturevalue("tmp_path"))
    save_checkpoint(stage.plain(workload), path)
    return path


def bench_forward_from_disk(
    pytestconfig: pytest.Config,
    part: Part,
    stage: Stage,
    reference: Reference,
    workload: Workload,
    folder: Path,
) -> None:
    """Seconds and bytes of each forward, against the rate of reading past the page cache."""
    tokens = workload.tokens(workload.shapes[0])
    expected = forward(stage.plain(workload), tokens).clone()
    stage.clear()
    files = sorted(folder.glob("*.safetensors"))
    size_bytes = sum(path.stat().st_size for path in files)
    drop_from_page_cache(files)
    limit = pytestconfig.getoption("--memory-limit")
    host_budget = None if limit else size_bytes // 4
    disk_rates = [_disk_bytes_per_s(files)]
    seconds, locked, read = [], [], []
    with _memory_limit(limit) as limit_bytes:
        model = skeleton(workload)
        begin = time.perf_counter()
        handle = torch_offload.offload_from_checkpoint(
            model, folder, DEVICE, gpu_budget=None, host_budget=host_budget
        )
        offload_s = time.perf_counter() - begin
        for _ in range(part.rounds(4, 8.0, least=3)):
            synchronize()
            if limit is None:
                drop_from_page_cache(files)
            before = (handle.stats.file_bytes_locked, _bytes_from_disk())
            begin = time.perf_counter()
            logits = forward(model, tokens)
            synchronize()
            seconds.append(time.perf_counter() - begin)
            locked.append(handle.stats.file_bytes_locked - before[0])
            read.append(_bytes_from_disk() - before[1])
            assert torch.equal(logits, expected), "a forward from disk differs"
        streamed = [unit for unit in handle.units if unit.place is not None]
        weight_bytes = sum(unit.bytes_in_files for unit in streamed)
        assert weight_bytes > 0
        host_bytes = handle.stats.host_bytes
        handle.remove()
        del model, handle
    disk_rates.append(_disk_bytes_per_s(files))
    disk_rate = max((rate for rate in disk_rates if rate is not None), default=None)
    rates = [size / s for size, s in zip(locked[1:], seconds[1:], strict=True)]
    predicted_s = None
    if disk_rate is not None:
        predicted_s = max(
            locked[-1] / disk_rate,
            weight_bytes / reference.link_bytes_per_s if ON_GPU else 0.0,
        )
    part.figures.update(
        what="disk",
        checkpoint_bytes=size_bytes,
        weight_bytes=weight_bytes,
        memory_limit_bytes=limit_bytes,
        host_budget_bytes=host_budget,
        page_locked_bytes=host_bytes,
        disk_bytes_per_s=disk_rates,  # before and after; the better one is the yardstick
        offload_seconds=offload_s,
        seconds=seconds,
        bytes_locked=locked,
        bytes_from_disk=read,
        bytes_per_s=max(rates),
        predicted_seconds=predicted_s,
        ratio=None if predicted_s is None else min(seconds[1:]) / predicted_s,
        bit_equal=True,
    )
