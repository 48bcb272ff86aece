"""How much host memory moving a model into the arena really adds."""

from __future__ import annotations

import bisect
from collections.abc import Iterable

import torch
from torch import nn

from torch_offload.storage import is_aligned
from torch_offload.structure import size_bytes
from torch_offload.units import UnitSpec

# Kept free on the host: for the process's own activations, and for everybody else.
HOST_RESERVE_BYTES = 256 * 2**20


class _FileMappings:
    """Address ranges of this process that are backed by files: there is nothing to free in them."""

    def __init__(self) -> None:
        ranges = []
        # Path.read_text() would leave it open where an interrupt strikes between its own frames.
        with open("/proc/self/maps") as maps:
            lines = maps.read().splitlines()
        for line in lines:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/"):
                begin, end = (int(address, 16) for address in fields[0].split("-"))
                ranges.append((begin, end))
        self._ranges = sorted(ranges)

    def __contains__(self, address: int) -> bool:
        position = bisect.bisect_right(self._ranges, (address, float("inf"))) - 1
        return position >= 0 and self._ranges[position][1] > address


def added_bytes(unit_parameters: Iterable[list[torch.Tensor]]) -> int:
    """Returns the peak of host memory that is needed beyond what is in use now.

    Units move one after the other and a pageable copy is freed at once, so parameters in ordinary
    memory need one unit more at the peak; those on a device or mapped from a checkpoint file come
    in full.
    """
    mappings = _FileMappings()
    added = largest = 0
    for parameters in unit_parameters:
        unit_bytes = sum(parameter.nbytes for parameter in parameters)
        largest = max(largest, unit_bytes)
        added += sum(
            parameter.nbytes
            for parameter in parameters
            if parameter.device.type != "cpu" or parameter.data_ptr() in mappings
        )
    return added + largest


def taken_on_host_device(model: nn.Module, streamed: Iterable[UnitSpec], window_bytes: int) -> int:
    """Returns what the host device takes: the window, and aligned copies of what stays askew."""
    elsewhere = {id(parameter) for spec in streamed for _, parameter in spec.parameters}
    return window_bytes + sum(
        size_bytes(tensor)
        for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
        if id(tensor) not in elsewhere and not is_aligned(tensor)
    )
