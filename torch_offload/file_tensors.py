"""Tensors that are still on disk while a model is put together from them.

transformers builds a model's parameters from a checkpoint's tensors by torch's own operators: it
stacks experts, concatenates halves, splits what is fused, casts, transposes. A `FileTensor` goes
through them as the list of file blocks that it is made of. Whatever only rearranges whole blocks
gives another such list; whatever else reads the bytes, and gives an ordinary tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from torch_offload import _C

Block = tuple[_C.FileMapping, int, int]  # file, offset, bytes
# More blocks than this are not worth copying one by one, and each takes a mapping.
_MOST_BLOCKS = 4096

_HOST = torch.device("cpu")
_aten = torch.ops.aten


class FileTensor(torch.Tensor):
    """A contiguous tensor whose bytes are blocks of files, read when an operator needs them."""

    blocks: list[Block]

    @staticmethod
    def __new__(cls, blocks: list[Block], dtype: torch.dtype, shape: Sequence[int]) -> FileTensor:
        """Makes one. Reads nothing."""
        tensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=_HOST)
        assert isinstance(tensor, FileTensor)
        tensor.blocks = blocks
        return tensor

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"FileTensor({list(self.shape)}, {self.dtype}, {len(self.blocks)} blocks)"

    def read(self) -> torch.Tensor:
        """An ordinary tensor of the same values, in private memory where it is written to."""
        return self.view_of_files()[0]

    def view_of_files(self) -> tuple[torch.Tensor, _C.FileView | None]:
        """The same, and the view of files that it lies in; None if it is a copy."""
        if self.numel() == 0:
            return torch.empty(self.shape, dtype=self.dtype, device=_HOST), None
        view = _C.FileView(self.blocks)
        if view.address % self.dtype.itemsize:  # stored askew: no tensor can lie there
            flat = view.tensor(torch.uint8, [view.size_bytes]).clone()
            return flat.view(self.dtype).view(self.shape), None
        return view.tensor(self.dtype, self.shape), view

    # Every operator comes to __torch_dispatch__.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[Any, Any] | None = None,
    ) -> Any:
        """Rearranges blocks where that is all there is to do; else reads them."""
        kwargs = kwargs or {}
        rearrange = _REARRANGING.get(func)
        if rearrange is not None:
            result = rearrange(*args, **kwargs)
            if result is not None:
                return result
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func} would write to a tensor that is still on disk")

        def ordinary(value: Any) -> Any:
            return value.read() if isinstance(value, FileTensor) else value

        return func(*tree_map(ordinary, args), **tree_map(ordinary, kwargs))


def _like(tensor: FileTensor, blocks: list[Block], shape: Sequence[int]) -> FileTensor | None:
    return FileTensor(blocks, tensor.dtype, shape) if len(blocks) <= _MOST_BLOCKS else None


def _runs(blocks: list[Block], run_bytes: int) -> Iterator[list[Block]]:
    """Cuts the blocks into runs of so many bytes."""
    run: list[Block] = []
    missing = run_bytes
    for file, offset, size in blocks:
        while size:
            taken = min(size, missing)
            run.append((file, offset, taken))
            offset, size, missing = offset + taken, size - taken, missing - taken
            if not missing:
                yield run
                run, missing = [], run_bytes


def _joined(blocks: Sequence[Block]) -> list[Block]:
    """The same bytes in the fewest blocks."""
    joined: list[Block] = []
    for file, offset, size in blocks:
        if joined and joined[-1][0] is file and joined[-1][1] + joined[-1][2] == offset:
            joined[-1] = (file, joined[-1][1], joined[-1][2] + size)
        else:
            joined.append((file, offset, size))
    return joined


def _same(tensor: FileTensor, **options: Any) -> FileTensor | None:
    memory_format = options.get("memory_format")
    if memory_format not in (None, torch.contiguous_format, torch.preserve_format):
        return None
    return FileTensor(tensor.blocks, tensor.dtype, tensor.shape)


def _to_copy(tensor: FileTensor, **options: Any) -> FileTensor | None:
    changes = (
        options.get("dtype") not in (None, tensor.dtype)
        or torch.device(options.get("device") or "cpu").type != "cpu"
        or options.get("layout") not in (None, torch.strided)
    )
    return None if changes else _same(tensor, memory_format=options.get("memory_format"))


def _view(tensor: FileTensor, shape: Sequence[int]) -> FileTensor:
    sizes = list(shape)
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = tensor.numel() // known if known else 0
    return FileTensor(tensor.blocks, tensor.dtype, sizes)


def _unsqueeze(tensor: FileTensor, dim: int) -> FileTensor:
    shape = list(tensor.shape)
    shape.insert(dim if dim >= 0 else dim + tensor.dim() + 1, 1)
    return FileTensor(tensor.blocks, tensor.dtype, shape)


def _squeeze(tensor: FileTensor, dim: int | None = None) -> FileTensor:
    wanted = range(tensor.dim()) if dim is None else [dim % max(tensor.dim(), 1)]
    shape = [n for i, n in enumerate(tensor.shape) if i not in wanted or n != 1]
    return FileTensor(tensor.blocks, tensor.dtype, shape)


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> FileTensor | None:
    parts = [part for part in tensors if part.numel()]
    if not parts or not all(
        isinstance(part, FileTensor) and part.dtype == parts[0].dtype for part in parts
    ):
        return None
    first = parts[0]
    assert isinstance(first, FileTensor)
    dim %= first.dim()
    outer = math.prod(first.shape[:dim])
    if outer * len(parts) > _MOST_BLOCKS:
        return None
    runs = [_runs(part.blocks, part.nbytes // outer) for part in parts]  # type: ignore[attr-defined]
    blocks = [block for _ in range(outer) for run in runs for block in next(run)]
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return _like(first, _joined(blocks), shape)


def _stack(tensors: Sequence[torch.Tensor], dim: int = 0) -> FileTensor | None:
    if not all(isinstance(part, FileTensor) for part in tensors):
        return None
    dim = dim if dim >= 0 else dim + tensors[0].dim() + 1
    return _cat([_unsqueeze(part, dim) for part in tensors], dim)  # type: ignore[arg-type]


def _slice(
    tensor: FileTensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> FileTensor | None:
    dim %= tensor.dim()
    begin, stop, step = slice(start, end, step).indices(tensor.shape[dim])
    outer = math.prod(tensor.shape[:dim])
    if step != 1 or stop <= begin or not outer or outer > _MOST_BLOCKS:
        return None
    row_bytes = tensor.nbytes // outer
    inner = row_bytes // tensor.shape[dim]
    blocks: list[Block] = []
    for row in _runs(tensor.blocks, row_bytes):
        at = 0
        for file, offset, size in row:
            low, high = max(at, begin * inner), min(at + size, stop * inner)
            if low < high:
                blocks.append((file, offset + low - at, high - low))
            at += size
    shape = list(tensor.shape)
    shape[dim] = stop - begin
    return _like(tensor, _joined(blocks), shape)


def _select(tensor: FileTensor, dim: int, index: int) -> FileTensor | None:
    index = index if index >= 0 else index + tensor.shape[dim]
    chosen = _slice(tensor, dim, index, index + 1)
    return None if chosen is None else _squeeze(chosen, dim)


def _split_sizes(tensor: FileTensor, sizes: Sequence[int], dim: int = 0) -> list[FileTensor] | None:
    parts: list[FileTensor] = []
    begin = 0
    for size in sizes:
        part = _slice(tensor, dim, begin, begin + size)
        if part is None:
            return None
        parts.append(part)
        begin += size
    return parts


def _split(tensor: FileTensor, size: int, dim: int = 0) -> list[FileTensor] | None:
    length = tensor.shape[dim]
    return _split_sizes(
        tensor, [min(size, length - begin) for begin in range(0, length, max(size, 1))], dim
    )


def _unbind(tensor: FileTensor, dim: int = 0) -> list[FileTensor] | None:
    parts = _split(tensor, 1, dim)
    return None if parts is None else [_squeeze(part, dim) for part in parts]


_REARRANGING: dict[Any, Callable[..., Any]] = {
    _aten.alias.default: _same,
    _aten.detach.default: _same,
    _aten.clone.default: _same,
    _aten._to_copy.default: _to_copy,
    _aten.view.default: _view,
    _aten._unsafe_view.default: _view,
    _aten.unsqueeze.default: _unsqueeze,
    _aten.squeeze.default: _squeeze,
    _aten.squeeze.dim: _squeeze,
    _aten.cat.default: _cat,
    _aten.stack.default: _stack,
    _aten.slice.Tensor: _slice,
    _aten.select.int: _select,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split_sizes,
    _aten.unbind.int: _unbind,
}
