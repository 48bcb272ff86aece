"""Which parameters are streamed from the files they were loaded from, and how much is locked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import nn

from torch_offload import _C
from torch_offload.file_tensors import FileTensor
from torch_offload.sizes import format_size, parse_size
from torch_offload.units import UnitSpec

#: Where weights that come from a checkpoint wait; `Masters` are those of a model in memory.
CheckpointMasters = Literal["auto", "mmap", "arena", "packed"]
_WORDS_OF_OFFLOAD = {
    "plain": ": offload()'s word for a model that is in memory already; from a checkpoint 'auto' "
    "streams the same weights without a copy of them, and 'arena' copies them"
}

# A parameter of which more than half had to be copied is no parameter of a file any more.
_MOST_COPIED_SHARE = 0.5
# Beyond this share of what the host can give, files are locked in turns, within the second share.
_MOST_LOCKED_SHARE = 0.9
_SHARE_IN_TURNS = 0.75
# Less is no use to a unit, even where it is more than the second share.
_LEAST_SHARE_OF_LARGEST = 1.25


@dataclass
class FileMasters:
    """Parameters that show views of checkpoint files.

    Attributes:
        masters: What was asked for.
        host_budget: Bytes that may be page-locked at a time; None leaves it to the host's limits.
        views: The view that each parameter shows, by the parameter's ``id``.
        beside_bytes: Host memory that the offloaded model will take beside the files.
    """

    masters: CheckpointMasters = "auto"
    host_budget: int | None = None
    views: dict[int, _C.FileView] = field(default_factory=dict)
    beside_bytes: int = 0

    @classmethod
    def asked_for(cls, masters: CheckpointMasters, host_budget: int | str | None) -> FileMasters:
        """Checks the two options.

        Raises:
            ValueError: For an invalid one.
        """
        if masters not in get_args(CheckpointMasters):
            raise ValueError(
                "expected masters to be one of 'auto', 'mmap', 'arena', 'packed', got "
                f"{masters!r}{_WORDS_OF_OFFLOAD.get(str(masters), '')}"
            )
        budget = None if host_budget is None else parse_size(host_budget, "host_budget")
        return cls(masters=masters, host_budget=budget)

    def view_of(self, parameter: torch.Tensor) -> _C.FileView | None:
        """The view that a parameter shows, whole and as it lies there; else None."""
        view = self.views.get(id(parameter))
        if (
            view is None
            or parameter.device.type != "cpu"
            or parameter.data_ptr() != view.address
            or parameter.nbytes != view.size_bytes
            or not parameter.is_contiguous()
        ):
            return None
        return view

    def lock_limit_bytes(self, specs: Sequence[UnitSpec]) -> int | None:
        """How many bytes of files may be page-locked at a time; None for all of them.

        Args:
            specs: The units that stream: the largest must fit.

        Raises:
            MemoryError: If it cannot.
        """
        largest = max((self._bytes_in_files(spec) for spec in specs), default=0)
        if self.host_budget is not None:
            if largest > self.host_budget:
                raise MemoryError(
                    f"expected {format_size(largest)} of checkpoint files to be page-locked for "
                    f"the largest unit, got host_budget={format_size(self.host_budget)}; raise "
                    "host_budget, or use granularity='sublayer' or 'module' for smaller units"
                )
            return self.host_budget
        if os.environ.get("TORCH_OFFLOAD_HOST_MEMORY_CHECK") == "0":
            return None
        limits = _C.host_limits()
        known = [limits.available_bytes, limits.cgroup_available_bytes]
        available = min((size for size in known if size is not None), default=None)
        needed = sum(view.size_bytes for view in self.views.values())
        if available is not None:
            available = max(0, available - self.beside_bytes)
        if available is None or needed <= _MOST_LOCKED_SHARE * available:
            return None
        # Chunks at both ends of a unit are shared with its neighbours.
        least = int(_LEAST_SHARE_OF_LARGEST * largest)
        return max(int(_SHARE_IN_TURNS * available), min(least, int(available)))

    def _bytes_in_files(self, spec: UnitSpec) -> int:
        views = (self.view_of(parameter) for _, parameter in spec.parameters)
        return sum(view.size_bytes for view in views if view is not None)

    def in_file_order(self, specs: Sequence[UnitSpec]) -> list[UnitSpec]:
        """The units with their parameters as they follow each other in the files.

        Neighbours there become neighbours in the place, so that one copy carries both.
        """

        def position(named: tuple[str, nn.Parameter]) -> tuple[str, int]:
            view = self.view_of(named[1])
            return ("", 0) if view is None else view.first_byte

        return [
            replace(spec, parameters=tuple(sorted(spec.parameters, key=position))) for spec in specs
        ]


def read_file_tensors(model: nn.Module) -> dict[int, _C.FileView]:
    """Gives a model ordinary tensors for those that are still on disk, in place.

    Returns:
        The view that each of the new parameters shows, by ``id``; without those that are copies
        for the most part.
    """
    views: dict[int, _C.FileView] = {}
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for key, found in slots.items():
                if not isinstance(found, FileTensor):
                    continue
                if id(found) not in made:
                    made[id(found)] = _ordinary(found, views)
                slots[key] = made[id(found)]  # type: ignore[assignment]
    return views


def _ordinary(found: FileTensor, views: dict[int, _C.FileView]) -> torch.Tensor:
    tensor, view = found.view_of_files()
    if not isinstance(found, nn.Parameter):
        return tensor
    if view is not None and view.copied_bytes > _MOST_COPIED_SHARE * view.size_bytes:
        view = None
    parameter = nn.Parameter(tensor, requires_grad=found.requires_grad)
    if hasattr(found, "_is_hf_initialized"):
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    if view is not None:
        views[id(parameter)] = view
    return parameter
