"""Modules that are put around units, or in their stead, after `offload`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python.dropin import IDLE_WARNING, raising, tiny_llama, tiny_stack, tokens
from tests.python.fake_memory import FakeMemory
from tests.python.test_leaves_recut import FailOnce
from torch_offload.config import Config
from torch_offload.offload import offload_with

HOST = torch.device("cpu")
# peft asks transformers for a property by the name that transformers has retired.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)

WAYS: dict[str, tuple[Config, bool]] = {
    "streamed": (Config(gpu_budget=None), False),
    "budget": (Config(gpu_budget="90KiB"), False),
    "leaves": (Config(granularity="module", gpu_budget=None), False),
    "leaves, budget": (Config(granularity="module", gpu_budget="90KiB"), False),
    "auto": (Config(gpu_budget="auto", headroom=0), True),
    "auto, leaves": (Config(granularity="module", gpu_budget="auto", headroom=0), True),
}


def wrapped(model: nn.Module, targets: list[str]) -> Any:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        return torch_offload.align(peft.get_peft_model(model, config).eval())


def logits(model: Any) -> torch.Tensor:
    out = model(tokens(HOST)).logits
    assert isinstance(out, torch.Tensor)
    return out


@torch.no_grad()
@pytest.mark.parametrize(
    "targets", [["q_proj", "down_proj"], ["lm_head", "embed_tokens"]], ids=["layers", "outside"]
)
@pytest.mark.parametrize("way", WAYS)
def test_plans_change_below_an_adapter_as_without_it(way: str, targets: list[str]) -> None:
    config, has_memory = WAYS[way]
    model, plain = tiny_llama(num_hidden_layers=6), tiny_llama(num_hidden_layers=6)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    memory = FakeMemory(int(1.5 * whole)) if has_memory else None
    handle = offload_with(model, HOST, config, memory)
    names = [unit.name for unit in handle.units]
    first = [unit.place is None for unit in handle.units]
    adapted, must = wrapped(model, targets), logits(wrapped(plain, targets))
    for _ in range(3):
        assert torch.equal(logits(adapted), must)
    if has_memory:
        assert [unit.place is None for unit in handle.units] != first, "nothing was planned anew"
    if config.granularity == "module":
        assert {"model.layers.3.mlp.up_proj"} <= {unit.name for unit in handle.units}
    else:
        assert [unit.name for unit in handle.units] == names
    for budget in (int(0.8 * whole), int(0.5 * whole), None):
        handle.replan(gpu_budget=budget)
        assert torch.equal(logits(adapted), must)
        streamed = [unit for unit in handle.units if unit.place is not None]
        assert all(unit.acquired for unit in streamed)
    handle.remove()
    assert torch.equal(logits(adapted), must)
    assert not any("_call_impl" in vars(module) for module in adapted.modules())


@torch.no_grad()
def test_memory_that_runs_out_below_an_adapter_is_said_and_heeded() -> None:
    model, plain = tiny_llama(num_hidden_layers=6), tiny_llama(num_hidden_layers=6)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    with torch_offload.offload(model, HOST, gpu_budget=int(0.7 * whole)) as handle:
        adapted, must = (
            wrapped(model, ["q_proj", "down_proj"]),
            wrapped(plain, ["q_proj", "down_proj"]),
        )
        num_resident = sum(unit.place is None for unit in handle.units)
        hook = model.model.layers[5].mlp.register_forward_hook(
            raising(torch.OutOfMemoryError("CUDA out of memory"))
        )
        with pytest.raises(torch.OutOfMemoryError, match=r"(?s)out of memory.*gave back"):
            logits(adapted)
        hook.remove()
        assert sum(unit.place is None for unit in handle.units) < num_resident
        assert torch.equal(logits(adapted), logits(must))


@torch.no_grad()
@pytest.mark.filterwarnings(f"ignore:{IDLE_WARNING}:UserWarning")
@pytest.mark.parametrize("granularity", ["sublayer", "module"])
def test_unit_that_was_replaced_keeps_the_plan_and_every_output(
    granularity: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_stack(6)
    x = torch.ones(3, 16)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    config = Config(granularity=granularity, gpu_budget="auto", headroom=0)
    with offload_with(model, HOST, config, FakeMemory(2 * whole)) as handle:
        plain = copy.deepcopy(tiny_stack(6))
        for one in (model, plain):
            torch.manual_seed(1)
            one.blocks[4].attn = torch_offload.align(nn.Linear(16, 16))
        before = [(unit.name, unit.place) for unit in handle.units]
        with caplog.at_level("INFO", logger="torch_offload"):
            for _ in range(6):
                assert torch.equal(model(x), plain(x))
        assert "kept the plan: expected 'blocks.4.attn'" in caplog.text
        assert [(unit.name, unit.place) for unit in handle.units] == before
        fail = FailOnce(model.blocks[2].mlp, torch.OutOfMemoryError)
        with pytest.raises(torch.OutOfMemoryError, match=r"(?s)planted.*could not be given back"):
            model(x)
        fail.undo()
        with pytest.raises(torch_offload.StateError, match=r"'blocks\.4\.attn' in the model"):
            handle.replan(gpu_budget=whole)
        assert torch.equal(model(x), plain(x))
