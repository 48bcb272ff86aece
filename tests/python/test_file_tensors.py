"""Tensors on disk that are rearranged give what torch gives of ordinary ones."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torch_offload import _C
from torch_offload.file_tensors import FileTensor

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)


class _Disk:
    """A file of random bytes, and tensors of it in both ways."""

    def __init__(self, folder: Path, size_bytes: int = 1 << 20) -> None:
        self._bytes = torch.randint(0, 100, (size_bytes,), dtype=torch.uint8)
        path = folder / "weights"
        path.write_bytes(self._bytes.numpy().tobytes())
        self._mapping = _C.FileMapping(str(path))

    def pair(
        self, offset: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[FileTensor, torch.Tensor]:
        size = torch.Size(shape).numel() * dtype.itemsize
        plain = self._bytes[offset : offset + size].clone().view(dtype).view(shape)
        return FileTensor([(self._mapping, offset, size)] if size else [], dtype, shape), plain


@pytest.fixture
def disk(tmp_path: Path) -> _Disk:
    return _Disk(tmp_path)


def _same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    read = got.read() if isinstance(got, FileTensor) else got
    alike = read.dtype == expected.dtype and read.shape == expected.shape
    flat = [torch.cat([tensor.reshape(-1)]).view(torch.uint8) for tensor in (read, expected)]
    return alike and torch.equal(*flat)  # bytes, as some are no numbers


def _step(rng: random.Random, pool: list[tuple[Any, torch.Tensor]]) -> None:
    """Does one random operation to both, and adds what it gave."""
    lazy, plain = rng.choice(pool)
    dim = rng.randrange(max(plain.dim(), 1))
    kind = rng.randrange(10)
    if kind == 0:
        alike = [one for one in pool if one[1].shape == plain.shape and one[1].dtype == plain.dtype]
        chosen = [rng.choice(alike) for _ in range(rng.randrange(1, 4))]
        axis = rng.randrange(plain.dim() + 1)
        result = [torch.stack([one[side] for one in chosen], axis) for side in (0, 1)]
        pool.append((result[0], result[1]))
    elif plain.dim() == 0:
        pool.append((lazy.detach(), plain.detach()))
    elif kind == 1:
        pool.append((torch.cat([lazy, lazy], dim), torch.cat([plain, plain], dim)))
    elif kind == 2:
        parts = rng.randrange(1, 4)
        pool += zip(lazy.chunk(parts, dim), plain.chunk(parts, dim), strict=True)
    elif kind == 3 and plain.shape[dim]:
        at = rng.randrange(-plain.shape[dim], plain.shape[dim])
        pool.append((lazy.select(dim, at), plain.select(dim, at)))
    elif kind == 4:
        begin, end = sorted(rng.randrange(plain.shape[dim] + 1) for _ in range(2))
        pool.append((lazy.narrow(dim, begin, end - begin), plain.narrow(dim, begin, end - begin)))
    elif kind == 5:
        pool.append((lazy.flatten(), plain.flatten()))
    elif kind == 6:
        pool.append((lazy.unsqueeze(dim), plain.unsqueeze(dim)))
    elif kind == 7:
        pool.append((lazy.transpose(0, dim).contiguous(), plain.transpose(0, dim).contiguous()))
    elif kind == 8:
        pool.append((lazy.to(torch.float64), plain.to(torch.float64)))
    else:
        pool.append((lazy.contiguous().clone(), plain.contiguous().clone()))


@pytest.mark.parametrize("seed", range(40))
def test_any_sequence_of_operations_gives_what_torch_gives(disk: _Disk, seed: int) -> None:
    rng = random.Random(seed)
    pool = [
        disk.pair(
            rng.randrange(1000) * 8,
            tuple(rng.choice((1, 2, 3, 4, 6)) for _ in range(rng.randrange(1, 4))),
            rng.choice(DTYPES),
        )
        for _ in range(3)
    ]
    for _ in range(30):
        _step(rng, pool)
    for lazy, plain in pool:
        assert _same(lazy, plain)
    assert any(isinstance(lazy, FileTensor) and len(lazy.blocks) > 1 for lazy, _ in pool) or seed


def test_experts_merged_and_joined_stay_on_disk(disk: _Disk) -> None:
    gates = [disk.pair(8 + 4096 * i, (16, 64), torch.float32) for i in range(4)]
    ups = [disk.pair(8 + 65536 + 4096 * i, (16, 64), torch.float32) for i in range(4)]
    fused = [
        torch.cat([torch.stack([one[side] for one in half]) for half in (gates, ups)], dim=1)
        for side in (0, 1)
    ]
    assert isinstance(fused[0], FileTensor)
    assert len(fused[0].blocks) == 8
    assert _same(fused[0], fused[1])
    parameter = nn.Parameter(fused[0])
    assert isinstance(parameter, nn.Parameter)
    assert parameter.requires_grad


def test_writing_to_a_tensor_on_disk_fails(disk: _Disk) -> None:
    lazy, _ = disk.pair(8, (4, 4), torch.float32)
    with pytest.raises(NotImplementedError, match="still on disk"):
        lazy.zero_()


def test_tensor_that_is_stored_askew_is_copied(disk: _Disk) -> None:
    lazy, plain = disk.pair(9, (4, 4), torch.float32)
    tensor, view = lazy.view_of_files()
    assert view is None
    assert torch.equal(tensor.view(torch.uint8), plain.view(torch.uint8))


def test_empty_tensor_heeds_no_default_device(disk: _Disk) -> None:
    lazy, _ = disk.pair(0, (0, 4), torch.float32)
    with torch.device("meta"):
        tensor, _ = lazy.view_of_files()
    assert tensor.device.type == "cpu"


def test_empty_tensor_and_scalar(disk: _Disk) -> None:
    for shape in ((0, 3), ()):
        lazy, plain = disk.pair(8, shape, torch.float32)
        assert _same(lazy.detach(), plain)
        assert "FileTensor" in repr(lazy)
