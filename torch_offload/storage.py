"""Moving what stays on the device, and aligned storage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from torch_offload import _C
from torch_offload.residency import byte_span, distinct
from torch_offload.structure import size_bytes

# Kernels choose their path, and so the order of a sum, by the address modulo a cache line.
_CACHE_LINE_BYTES = 64
_ALIGNMENT_BYTES = _C.aligned_size(1)


def _aligned_copy(tensor: torch.Tensor) -> torch.Tensor:
    # Whatever device the caller has made the default.
    span = torch.empty(tensor.nbytes + _ALIGNMENT_BYTES, dtype=torch.uint8, device="cpu")
    skip = -span.data_ptr() % _ALIGNMENT_BYTES
    flat = span[skip : skip + tensor.nbytes].view(tensor.dtype)
    copy = flat.as_strided(tensor.size(), torch.empty_like(tensor, device="meta").stride())
    return copy.copy_(tensor)


def align(model: nn.Module) -> nn.Module:
    """Aligns parameters and buffers on the CPU to 256 bytes, in place; returns the model.

    Only what does not lie so already is copied. Blocks meanwhile, and takes host memory for both
    copies: of one tensor at a time, or of all that share a storage.

    The plain model to compare a streamed one with: ``from_pretrained`` maps its file, and a
    one-token forward from weights at 8 or 24 modulo 64 differs from its aligned copy in the last
    bit, whoever computes it. Tied parameters stay tied.
    """
    with torch.inference_mode(False), torch.no_grad():
        for tensor in distinct((*model.parameters(), *model.buffers())):
            is_here = tensor.device.type == "cpu" and tensor.layout is torch.strided
            if is_here and tensor.data_ptr() % _ALIGNMENT_BYTES:
                tensor.data = _aligned_copy(tensor.data)
    return model


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether it may stay where it is on the host device: equal alignment, equal bits.

    What is made of several tensors, as a sparse one, has no address to go by, and stays.
    """
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return tensor.device.type == "cpu"
    return tensor.data_ptr() % _CACHE_LINE_BYTES == 0


@dataclass(frozen=True)
class Piece:
    """Tensors that move as one: several where they use some bytes together, else just one.

    A storage alone makes no piece: it may hold a whole model, each weight a view of its own bytes.

    Attributes:
        tensors: In the order of their bytes.
        size_bytes: From the first byte to the last; of a tensor that is alone, its values.
    """

    tensors: tuple[torch.Tensor, ...]
    size_bytes: int


@dataclass
class _Run:
    """Tensors of one storage, each of which overlaps one before it."""

    begin: int
    end: int
    positions: list[int]


def pieces(tensors: Iterable[torch.Tensor]) -> list[Piece]:
    """Cuts tensors into what must move as one, each by the place of its first tensor."""
    members = list(distinct(tensors))
    groups: list[tuple[list[int], int]] = []  # positions, bytes
    spans: list[tuple[int, int, int, int]] = []
    for position, tensor in enumerate(members):
        span = byte_span(tensor)
        if span is None:
            groups.append(([position], size_bytes(tensor)))
        else:
            _, begin, end, _ = span
            spans.append((tensor.untyped_storage().data_ptr(), begin, end, position))
    runs: dict[int, list[_Run]] = defaultdict(list)  # by storage
    for storage, begin, end, position in sorted(spans):
        if runs[storage] and begin < runs[storage][-1].end:
            run = runs[storage][-1]
            run.end = max(run.end, end)
            run.positions.append(position)
        else:
            runs[storage].append(_Run(begin, end, [position]))
    for run in chain.from_iterable(runs.values()):
        is_alone = len(run.positions) == 1
        num_bytes = members[run.positions[0]].nbytes if is_alone else run.end - run.begin
        groups.append((run.positions, num_bytes))
    return [
        Piece(tuple(members[position] for position in positions), num_bytes)
        for positions, num_bytes in sorted(groups, key=lambda group: min(group[0]))
    ]


class ResidentMove:
    """Moves tensors to the device for good, and can take that back.

    Tensors that share bytes still share them afterwards.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._former: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.size_bytes = 0

    # Whatever mode the caller is in: a parameter with the data of an inference tensor becomes one.
    @torch.inference_mode(False)
    def move(
        self,
        tensors: Iterable[torch.Tensor],
        another_way: Callable[[torch.Tensor], torch.Tensor | None] | None = None,
        advance: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        """Moves them. Blocks while copying. On an exception, call `undo`.

        Args:
            tensors: What to move, in place.
            another_way: Asked first for a tensor on the device with the same values; None where it
                has no better way.
            advance: Told of so many bytes more that are there.
        """
        for piece in pieces(tensors):
            former = [tensor.data for tensor in piece.tensors]
            if len(former) > 1:
                moved = self._moved_together(former, piece.size_bytes)
            else:
                found = another_way(piece.tensors[0]) if another_way is not None else None
                moved = [self._moved(former[0]) if found is None else found]
            for tensor, before, after in zip(piece.tensors, former, moved, strict=True):
                if after is not before:
                    self._former.append((tensor, before))
                    tensor.data = after
                advance(size_bytes(tensor))
            self.size_bytes += piece.size_bytes

    def _moved_together(self, tensors: list[torch.Tensor], size_bytes: int) -> list[torch.Tensor]:
        """Moves the bytes that a piece's tensors use, and no more of their storage."""
        first = tensors[0]
        storage = first.untyped_storage()
        begin = first.data_ptr() - storage.data_ptr()
        end = begin + size_bytes
        # Each offset must stay a multiple of its tensor's elements.
        begin -= begin % max(tensor.itemsize for tensor in tensors)
        span = torch.empty(0, dtype=torch.uint8, device=first.device)
        span = span.set_(storage, begin, (end - begin,), (1,))
        moved = self._moved(span)
        if moved is span:
            return tensors
        return [
            torch.empty(0, dtype=tensor.dtype, device=moved.device).set_(
                moved.untyped_storage(),
                (tensor.data_ptr() - span.data_ptr()) // tensor.itemsize,
                tensor.size(),
                tensor.stride(),
            )
            for tensor in tensors
        ]

    def _moved(self, data: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cpu" and data.device.type == "cpu":
            # What streams is aligned, so what stays must be.
            return data if is_aligned(data) else data.clone()
        return data.to(self._device)

    def undo(self) -> None:
        """Gives every tensor its former data back."""
        while self._former:
            tensor, data = self._former.pop()
            tensor.data = data

    def former_devices(self) -> list[tuple[torch.Tensor, torch.device]]:
        """Which tensors were moved, and from where."""
        return [(tensor, data.device) for tensor, data in self._former]

    def forget(self) -> None:
        """Lets go of the former data, which frees it."""
        self._former.clear()
