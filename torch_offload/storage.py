"""Moving what stays on the device, and aligned storage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from torch_offload import _C

# Kernels choose their path, and so the order of a sum, by the address modulo a cache line.
_CACHE_LINE_BYTES = 64
_ALIGNMENT_BYTES = _C.aligned_size(1)


def _aligned_copy(tensor: torch.Tensor) -> torch.Tensor:
    span = torch.empty(tensor.nbytes + _ALIGNMENT_BYTES, dtype=torch.uint8)
    skip = -span.data_ptr() % _ALIGNMENT_BYTES
    flat = span[skip : skip + tensor.nbytes].view(tensor.dtype)
    copy = flat.as_strided(tensor.size(), torch.empty_like(tensor, device="meta").stride())
    return copy.copy_(tensor)


def align(model: nn.Module) -> nn.Module:
    """Copies parameters and buffers to storage aligned to 256 bytes, in place; returns the model.

    The plain model to compare a streamed one with: ``from_pretrained`` maps its file, and a
    one-token forward from weights at 8 or 24 modulo 64 differs from its aligned copy in the last
    bit, whoever computes it. Tied parameters stay tied. Blocks while copying.
    """
    with torch.inference_mode(False), torch.no_grad():
        for tensor in _distinct((*model.parameters(), *model.buffers())):
            if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT_BYTES:
                tensor.data = _aligned_copy(tensor.data)
    return model


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether it may stay where it is on the host device: equal alignment, equal bits."""
    return tensor.device.type == "cpu" and tensor.data_ptr() % _CACHE_LINE_BYTES == 0


def _distinct(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    seen: set[int] = set()
    for tensor in tensors:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


class ResidentMove:
    """Moves tensors to the device for good, and can take that back.

    Tensors that share a storage still share it afterwards.
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
        distinct = list(_distinct(tensors))
        sharers = Counter(tensor.untyped_storage().data_ptr() for tensor in distinct)
        moved_storages: dict[int, torch.UntypedStorage] = {}
        for tensor in distinct:
            data = tensor.data
            storage = data.untyped_storage()
            key = storage.data_ptr()
            if sharers[key] > 1 and storage.nbytes():
                if key not in moved_storages:
                    whole = torch.empty(0, dtype=torch.uint8, device=data.device).set_(storage)
                    moved_storages[key] = self._moved(whole).untyped_storage()
                    self.size_bytes += storage.nbytes()
                moved = torch.empty(0, dtype=data.dtype, device=self._device).set_(
                    moved_storages[key], data.storage_offset(), data.size(), data.stride()
                )
            else:
                found = another_way(tensor) if another_way is not None else None
                moved = self._moved(data) if found is None else found
                self.size_bytes += moved.nbytes
            if moved is not data:
                self._former.append((tensor, data))
                tensor.data = moved
            advance(tensor.nbytes)

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
