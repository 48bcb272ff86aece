"""How much device memory there is, and who uses it."""

from __future__ import annotations

from typing import Protocol

import torch


class Memory(Protocol):
    """The memory of one device, as this process sees it. All sizes in bytes."""

    @property
    def total_bytes(self) -> int:
        """All of it."""

    def available_bytes(self) -> int:
        """What this process could take now, beyond what it uses: never what others hold."""

    def allocated_bytes(self) -> int:
        """What tensors of this process use now, weights included."""

    def peak_bytes(self) -> int:
        """The most that they have used at once since `reset_peak`."""

    def reset_peak(self) -> None:
        """Starts to look for the most anew."""


class CudaMemory:
    """A CUDA device, through torch's allocator.

    What the allocator holds without a tensor in it counts as available. `reset_peak` resets torch's
    own statistics: there is one peak per device and process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return int(torch.cuda.get_device_properties(self._device).total_memory)

    def available_bytes(self) -> int:
        """Free on the device, and cached by the allocator."""
        free, _ = torch.cuda.mem_get_info(self._device)
        cached = torch.cuda.memory_reserved(self._device) - self.allocated_bytes()
        return int(free + cached)

    def allocated_bytes(self) -> int:
        """Of tensors."""
        return torch.cuda.memory_allocated(self._device)

    def peak_bytes(self) -> int:
        """Of tensors."""
        return torch.cuda.max_memory_allocated(self._device)

    def reset_peak(self) -> None:
        """Of torch's statistics."""
        torch.cuda.reset_peak_memory_stats(self._device)


def memory_of(device: torch.device) -> Memory | None:
    """The memory of a device; None for the host device, whose window lies in host memory."""
    return CudaMemory(device) if device.type == "cuda" else None
