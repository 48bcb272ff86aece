"""From units to a plan: sizes, budgets, and what always stays on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from torch_offload import _C
from torch_offload.config import Config
from torch_offload.sizes import format_size
from torch_offload.units import UnitSpec, leaf_units


def planned_units(specs: Sequence[UnitSpec]) -> list[_C.Unit]:
    """Returns the units as the core knows them, each parameter aligned."""
    return [
        _C.Unit(
            name=spec.name,
            size_bytes=sum(_C.aligned_size(parameter.nbytes) for _, parameter in spec.parameters),
            layer_index=spec.layer_index,
            kind=spec.kind,
        )
        for spec in specs
    ]


def plan_units(
    model: nn.Module, device: torch.device, specs: Sequence[UnitSpec], config: Config
) -> _C.Plan:
    """Returns the plan for the units of a model. Changes nothing, does not block.

    For ``granularity="module"`` the units are still the sublayers, because leaves are proven by the
    first pass only; the window is already as small as leaves need it, or as the largest sublayer.

    Raises:
        ValueError: If the budget is below the least, which the message names, or above the device.
    """
    units = planned_units(specs)
    budget = budget_for_units(model, device, specs, config)
    if config.granularity != "module":
        return _C.make_plan(units, config.depth_bytes, budget)
    window = max(
        _C.make_plan(_leaves(model, specs), config.depth_bytes, budget).window_bytes,
        max(unit.size_bytes for unit in units),
    )
    return _C.make_plan(units, config.depth_bytes, window_bytes=window)


def budget_for_units(
    model: nn.Module, device: torch.device, specs: Sequence[UnitSpec], config: Config
) -> int | None:
    """Returns what the budget leaves for window and resident units; None without a budget.

    Raises:
        ValueError: If the budget is below the least, which the message names, or above the device.
    """
    budget = config.budget_bytes
    if budget is None:
        return None
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if budget > total:
            raise ValueError(
                f"expected gpu_budget of at most {format_size(total)}, the memory of {device}, "
                f"got {format_size(budget)}"
            )
    outside = _bytes_outside(model, specs)
    units = planned_units(specs)
    if config.granularity == "module":
        # The first pass streams sublayers, one at a time if need be.
        largest = max(unit.size_bytes for unit in units)
        least = outside + max(largest, _C.least_budget_bytes(_leaves(model, specs)))
    else:
        least = outside + _C.least_budget_bytes(units)
    if budget < least:
        raise ValueError(
            f"expected gpu_budget of at least {least} bytes ({format_size(least)}: "
            f"{format_size(outside)} that always stay, and the least window), got {budget} bytes "
            f"({format_size(budget)}); raise it, or use granularity='module' or units=[...] with "
            "smaller units"
        )
    return budget - outside


def _leaves(model: nn.Module, specs: Sequence[UnitSpec]) -> list[_C.Unit]:
    """The units as they are once every leaf is proven."""
    return planned_units(leaf_units(model, specs, {name for name, _ in model.named_modules()}))


def _bytes_outside(model: nn.Module, specs: Sequence[UnitSpec]) -> int:
    """Bytes of weights and buffers that no unit holds: they stay on the device whatever happens."""
    in_units = {id(parameter) for spec in specs for _, parameter in spec.parameters}
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
        if id(tensor) not in in_units
    }
    return sum(storages.values())
