"""What the tests of this folder assert of every offloaded model."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import torch_offload
from tests.gpu import models
from tests.python import expect
from torch_offload import Config, Handle
from torch_offload.selfcheck.uses import Uses


@contextmanager
def offloaded(model: nn.Module, device: torch.device, **options: Any) -> Iterator[Handle]:
    """An offloaded model; at rest, with page-locked masters, at the end, and then removed."""
    with torch_offload.offload_with(model, device, Config(**options)) as handle:
        yield handle
        assert_rests_in_locked_memory(handle)


def assert_rests_in_locked_memory(handle: Handle) -> None:
    """Asserts that every streamed parameter is its master, page-locked on a GPU machine."""
    expect.assert_at_rest(handle)
    model = handle.model
    assert model is not None
    names = [name for unit in handle.units if unit.place for name in unit.parameters]
    assert names, "nothing is streamed"
    if handle.device.type == "cuda":
        pageable = [name for name in names if not model.get_parameter(name).is_pinned()]
        assert not pageable, f"masters in pageable memory: {pageable}"


def settle(handle: Handle, model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Leads a handle of leaves past the pass that cuts them, to where the oracle may begin."""
    if handle.config.granularity == "module":
        before = {unit.name for unit in handle.units}
        models.run(model, kwargs)
        assert {unit.name for unit in handle.units} != before, "no unit was cut into leaves"
        with expect.watch(handle):
            models.run(model, kwargs)


class PlaceProbe:
    """Sees from inside, by hooks on the leaves, that streamed weights lie in the window."""

    def __init__(self, handle: Handle) -> None:
        model = handle.model
        assert model is not None
        self._window = handle._engine.window
        self._device = handle.device
        self._unit_of = {
            id(model.get_parameter(name)): unit.name
            for unit in handle.units
            if unit.place
            for name in unit.parameters
        }
        self._seen: set[str] = set()

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """Looks at every call in the block; asserts at the end that each unit was seen."""
        hooks = [
            module.register_forward_pre_hook(self._look)
            for module in model.modules()
            if any(id(p) in self._unit_of for p in module.parameters(recurse=False))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        unseen = set(self._unit_of.values()) - self._seen
        assert not unseen, f"no leaf of these units was called: {sorted(unseen)}"

    def _look(self, module: nn.Module, args: Any) -> None:
        begin, end = self._window
        for parameter in module.parameters(recurse=False):
            unit = self._unit_of.get(id(parameter))
            if unit is not None:
                self._seen.add(unit)
                assert parameter.device == self._device
                assert begin <= parameter.data_ptr()
                assert parameter.data_ptr() + parameter.nbytes <= end


def assert_all_equal(outputs: Sequence[torch.Tensor], must: torch.Tensor) -> None:
    """Asserts equality to the last bit, only after all outputs were asked for."""
    wrong = [
        f"{number} (by up to {(output - must).abs().max().item()})"
        for number, output in enumerate(outputs)
        if not torch.equal(output, must)
    ]
    assert not wrong, f"of {len(outputs)} outputs these differ: {', '.join(wrong)}"


def assert_copied_each(uses: Uses, least: int) -> None:
    """Asserts one copy for each of at least `least` uses, and nothing copied in vain."""
    num_uses, num_copies = uses.counts()
    assert num_uses >= least, f"{num_uses} uses of units, expected at least {least}"
    assert num_copies == num_uses, f"{num_copies} copies were used up by {num_uses} uses of units"


def requested_bytes(device: torch.device, which: str = "current") -> int:
    """What was asked of torch's allocator, before it rounds: exact, after what is due was freed."""
    if which == "current":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    return int(torch.cuda.memory_stats(device)[f"requested_bytes.all.{which}"])
