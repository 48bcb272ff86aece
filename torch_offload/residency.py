"""Which parameters of a unit may leave the device, and which must stay resident.

A streamed parameter is copied as flat bytes into a place that belongs to its unit alone. That is
wrong for memory that anybody else uses, and impossible for memory that is not one dense piece.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from torch_offload.packed_parameter import is_packed
from torch_offload.structure import is_table


def must_stay(model: nn.Module, units: Sequence[nn.Module]) -> set[int]:
    """``id``s of all parameters of `model` that cannot be streamed with the given units.

    These are the first parameter (it answers ``model.device``), parameters of two units or of a
    unit and something outside, parameters that overlap another tensor of the model in memory
    (compared by address range: a memory-mapped checkpoint is one storage for all), and those that
    are not one dense piece. Lookup tables stay as well, unless the table itself is a unit.

    Args:
        model: The whole model, for what lies outside the units.
        units: The modules that are units; none lies inside another.

    Raises:
        ValueError: A parameter is still uninitialized (a lazy module).
    """
    stay: set[int] = set()
    first = next(model.parameters(), None)
    if first is not None:
        stay.add(id(first))
    stay |= _used_by_others(model, units)
    stay |= overlapping(model)
    for unit in units:
        for parameter in unit.parameters():
            if not is_dense(parameter):
                stay.add(id(parameter))
        for module in unit.modules():
            if is_table(module) and module is not unit:
                stay.update(id(parameter) for parameter in module.parameters(recurse=False))
    return stay


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor fills one piece of memory without gaps or repeats, in any order."""
    if tensor.layout is not torch.strided:
        return False
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def _used_by_others(model: nn.Module, units: Sequence[nn.Module]) -> set[int]:
    """Parameters that modules of more than one unit, or a module of none, hold as well."""
    owner: dict[int, int] = {}
    shared: set[int] = set()
    holders: Counter[int] = Counter()
    for position, unit in enumerate(units):
        for module in unit.modules():
            holders[id(module)] += 1
            for parameter in module.parameters(recurse=False):
                if owner.setdefault(id(parameter), position) != position:
                    shared.add(id(parameter))
    for module in model.modules():
        if id(module) not in holders:
            shared.update(id(p) for p in module.parameters(recurse=False) if id(p) in owner)
    return shared


def overlapping(model: nn.Module) -> set[int]:
    """Tensors of the model, buffers included, whose memory another one of them uses too."""
    tensors = distinct([*model.parameters(), *model.buffers()])
    spans = sorted(span for tensor in tensors if (span := byte_span(tensor)) is not None)
    overlapping: set[int] = set()
    reach: tuple[str, int] = ("", 0)
    holder = 0
    for device, begin, end, key in spans:
        if device == reach[0] and begin < reach[1]:
            overlapping |= {holder, key}
        if device != reach[0] or end > reach[1]:
            reach, holder = (device, end), key
    return overlapping


def byte_span(tensor: torch.Tensor) -> tuple[str, int, int, int] | None:
    """(device, first byte, end, id) of a tensor; None where it has no address to compare."""
    if nn.parameter.is_lazy(tensor):
        raise ValueError(
            "a parameter is uninitialized (lazy module), so its size is unknown; run one forward of"
            " the model before offloading it"
        )
    if tensor.is_meta or tensor.numel() == 0 or tensor.layout is not torch.strided:
        return None
    if is_packed(tensor):
        return None
    try:
        begin = tensor.data_ptr()
    except RuntimeError:  # a wrapper subclass: it has no memory of its own
        return None
    if begin == 0:
        return None
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return str(tensor.device), begin, begin + (last + 1) * tensor.element_size(), id(tensor)


def distinct(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Each tensor once, in order."""
    seen: set[int] = set()
    for tensor in tensors:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor
