"""Where weights are looked up, and what is called around them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from torch_offload import _C
from torch_offload.file_masters import FileMasters
from torch_offload.units import UnitSpec

#: Name, parameter, where it is looked up, and where in a file its bytes are.
ParameterSlot = tuple[
    str,
    torch.Tensor,
    list[tuple[dict[str, nn.Parameter | None], str]],
    _C.FileView | None,
]


def parameter_slots(spec: UnitSpec, files: FileMasters) -> list[ParameterSlot]:
    """Where each parameter of a unit is looked up: every `_parameters` entry that holds it."""
    entries = [
        (module._parameters, key, parameter)
        for module in spec.module.modules()
        for key, parameter in module._parameters.items()
    ]
    return [
        (
            name,
            parameter,
            [(owner, key) for owner, key, found in entries if found is parameter],
            files.view_of(parameter),
        )
        for name, parameter in spec.parameters
    ]


def modules_above(model: nn.Module, units: set[int]) -> Iterator[nn.Module]:
    """Modules that are called and have a unit somewhere below them, the model itself included."""
    for module in model.modules():
        below = module.modules()
        next(below)
        is_called = type(module).forward is not nn.Module.forward
        if id(module) not in units and is_called and any(id(child) in units for child in below):
            yield module
