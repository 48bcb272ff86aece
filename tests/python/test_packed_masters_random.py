"""Packed masters under any row of edits, reads, aliases and plans: a plain twin's bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.python.dropin import HOST, assert_equal, logits, tiny_llama
from torch_offload import Handle, offload
from torch_offload.packed_parameter import PackedParameter

NAMES = [
    f"model.layers.{layer}.{part}.weight"
    for layer in (0, 1)
    for part in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj")
]


def make() -> Any:
    return tiny_llama(hidden_size=128, intermediate_size=128, num_hidden_layers=2).bfloat16()


class _Twins:
    """An offloaded model and a plain one, to both of which the same is done."""

    def __init__(self, handle: Handle, model: Any, plain: Any) -> None:
        self.handle = handle
        self.models = (model, plain)
        self.aliases: list[tuple[torch.Tensor, torch.Tensor]] = []

    def weights(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        model, plain = self.models
        return model.get_parameter(name), plain.get_parameter(name)

    def keep_alias(self, name: str) -> None:
        with torch.no_grad():
            first, second = (weight.detach() for weight in self.weights(name))
        self.aliases.append((first, second))

    def write_by_alias(self, name: str) -> None:
        for pair in self.aliases:
            for alias in pair:
                alias[1, len(self.aliases)] = 0.25

    def write_by_storage(self, name: str) -> None:
        for weight in self.weights(name):
            weight.untyped_storage()[7] = 3
        self.tell_of_edit(name)

    def write_by_data(self, name: str) -> None:
        for weight in self.weights(name):
            weight.data[0, 5:6].add_(1)
        self.tell_of_edit(name)

    def tell_of_edit(self, name: str) -> None:
        """Where packing does not shrink a unit, masters are plain: no counter shows such edits."""
        unit = next(unit for unit in self.handle.units if name in unit.parameters)
        if unit.copied_bytes == unit.size_bytes:
            self.handle.refresh()

    def replace(self, name: str) -> None:
        owner, _, key = name.rpartition(".")
        for one in self.models:
            module = one.get_submodule(owner)
            setattr(module, key, nn.Parameter(getattr(module, key).detach() * 0.5))

    def swap(self, name: str) -> None:
        for one in self.models:
            first, second = (one.model.layers[i].mlp.up_proj for i in (0, 1))
            first.weight, second.weight = second.weight, first.weight

    def load(self, name: str) -> None:
        for one in self.models:
            state = {key: value * 0.5 for key, value in one.state_dict().items()}
            one.load_state_dict(state, assign=name == NAMES[0])

    def compare(self, name: str) -> None:
        assert_equal(*(logits(one) for one in self.models))

    def interrupt(self, name: str) -> None:
        def fail(*args: Any) -> None:
            raise KeyboardInterrupt

        module = self.models[0].get_submodule(name.rpartition(".")[0])
        hook = module.register_forward_pre_hook(fail)
        try:
            logits(self.models[0])
        except KeyboardInterrupt:
            hook.remove()
        else:
            raise AssertionError("the hook has not run")


def _each(edit: Callable[[nn.Parameter], Any]) -> Callable[[_Twins, str], None]:
    def act(twins: _Twins, name: str) -> None:
        with torch.no_grad():
            for weight in twins.weights(name):
                edit(weight)

    return act


def _noise(weight: nn.Parameter) -> None:
    """Bits that packing does not shrink."""
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(0, 118 << 7, weight.shape, dtype=torch.int16, generator=generator)
    weight.copy_(bits.view(torch.bfloat16))


def _make_plain(twins: _Twins, name: str) -> None:
    twins.aliases.clear()  # of a unit that becomes plain they would be copies
    _each(_noise)(twins, name)
    twins.compare(name)


def _set_data(weight: nn.Parameter) -> None:
    weight.data = weight.data.flip(0).contiguous()


def _set_strides(weight: nn.Parameter) -> None:
    weight.data = weight.data.t().contiguous().t()


def _plan(twins: _Twins, name: str) -> None:
    size = sum(parameter.nbytes for parameter in twins.models[1].parameters())
    twins.aliases.clear()  # of a unit that moves to the device they would be copies
    # Some units stay on the device, all do, or none.
    budgets = (None, int(1.8 * size), 3 * size)
    twins.handle.replan(gpu_budget=budgets[NAMES.index(name) % 3])


ACTIONS: dict[str, Callable[[_Twins, str], None]] = {
    "run": _Twins.compare,
    "run again": _Twins.compare,
    "interrupt": _Twins.interrupt,
    "scale": _each(lambda w: w.mul_(1.5)),
    "noise": _make_plain,
    "normal": _each(lambda w: w.copy_(torch.full_like(w, 0.125))),
    "data": _each(_set_data),
    "strides": _each(_set_strides),
    "one": _Twins.write_by_data,
    "read": _each(lambda w: w.sum()),
    "look": _each(lambda w: w.detach()),
    "keep": _Twins.keep_alias,
    "write": _Twins.write_by_alias,
    "storage": _Twins.write_by_storage,
    "drop": lambda twins, name: twins.aliases.clear(),
    "replace": _Twins.replace,
    "swap": _Twins.swap,
    "load": _Twins.load,
    "plan": _plan,
    "refresh": lambda twins, name: twins.handle.refresh(),
}


@pytest.mark.filterwarnings("ignore:.*travel raw from now on:UserWarning")
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(sorted(ACTIONS)), st.sampled_from(NAMES)), min_size=3, max_size=14
    ),
    depth=st.sampled_from([0, None, "1GiB"]),
    granularity=st.sampled_from(["sublayer", "layer"]),
)
def test_any_row_of_edits_gives_the_plain_bits(
    steps: list[tuple[str, str]], depth: Any, granularity: Any
) -> None:
    model, plain = make(), make()
    handle = offload(
        model,
        HOST,
        transport="packed",
        masters="packed",
        depth=depth,
        granularity=granularity,
    )
    twins = _Twins(handle, model, plain)
    for action, name in steps:
        ACTIONS[action](twins, name)
        for weight, must in (twins.weights(one) for one in NAMES):
            assert torch.equal(weight.clone(), must.clone())
    twins.compare("")
    twins.aliases.clear()
    twins.compare("")
    # What is still unpacked is of a unit that is plain, or on the device.
    units = [unit for unit in handle.units if unit.place and unit.copied_bytes < unit.size_bytes]
    for unit in units:
        for name in unit.parameters:
            assert isinstance(model.get_parameter(name), PackedParameter), name
    handle.remove()
    assert_equal(logits(model), logits(plain))
    for weight, must in (twins.weights(one) for one in NAMES):
        assert type(weight) is nn.Parameter
        assert torch.equal(weight, must)
