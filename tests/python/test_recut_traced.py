"""Plans that change while a pass is traced for leaves: at its end, or as it runs out of memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python import expect
from tests.python.dropin import (
    IDLE_WARNING,
    assert_equal,
    raising,
    rows,
    streamed,
    tiny_llama,
    tiny_stack,
    tokens,
)
from tests.python.fake_memory import FakeMemory
from tests.python.models import CASES
from torch_offload.config import Config
from torch_offload.offload import offload_with

HOST = torch.device("cpu")


def bytes_of(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def assert_can_be_removed_and_offloaded(
    model: nn.Module, handle: torch_offload.Handle, before: dict[str, Any]
) -> None:
    handle.remove()
    expect.assert_unchanged(model, before, same_memory=False)
    with torch_offload.offload(model, HOST):
        pass


@torch.no_grad()
@pytest.mark.filterwarnings(f"ignore:{IDLE_WARNING}:UserWarning")
@pytest.mark.parametrize("share", [0.4, 3.0], ids=["some", "all"])
@pytest.mark.parametrize("granularity", ["module", "auto"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_plan_that_grows_between_traced_passes_keeps_the_bits(
    name: str, granularity: Any, share: float
) -> None:
    """The encoder's pass shows what it needs, and nothing of the decoder's leaves."""
    case = CASES[name]
    model = torch_offload.align(case.build())
    ids = case.inputs()["input_ids"]
    must = copy.deepcopy(model).generate(ids, **case.generate)
    before = expect.snapshot(model)
    memory = FakeMemory(int((1 + share) * bytes_of(model)))
    config = Config(granularity=granularity, gpu_budget="auto", headroom=0)
    handle = offload_with(model, HOST, config, memory)
    for _ in range(2):
        assert torch.equal(model.generate(ids, **case.generate), must)
    resident = [unit for unit in handle.units if unit.place is None]
    assert resident, "the plan did not change"
    if granularity == "module":
        assert any(unit.name.endswith(("k_proj", ".k")) for unit in handle.units), "not cut"
    assert share < 1 or len(resident) == len(handle.units)
    handle.replan(gpu_budget=int(0.7 * bytes_of(model)))
    assert torch.equal(model.generate(ids, **case.generate), must)
    assert_can_be_removed_and_offloaded(model, handle, before)


@torch.no_grad()
def test_traced_pass_that_runs_out_of_memory_gives_back_and_the_next_is_right() -> None:
    model = tiny_llama(num_hidden_layers=6)
    plain, ids = copy.deepcopy(model), tokens(HOST)
    before = expect.snapshot(model)
    handle = torch_offload.offload(
        model, HOST, granularity="module", gpu_budget=int(0.6 * bytes_of(model))
    )
    hook = model.model.layers[5].mlp.register_forward_hook(
        raising(torch.OutOfMemoryError("CUDA out of memory"))
    )
    num_resident = sum(unit.place is None for unit in handle.units)
    with pytest.raises(torch.OutOfMemoryError, match=r"(?s)out of memory.*gave back"):
        model(ids)
    hook.remove()
    assert sum(unit.place is None for unit in handle.units) < num_resident
    for _ in range(3):
        assert_equal(model(ids).logits, plain(ids).logits)
    streamed = [unit for unit in handle.units if unit.place is not None]
    assert {"model.layers.0.mlp.up_proj"} <= {unit.name for unit in streamed}
    assert all(unit.acquired for unit in streamed)
    del hook
    assert_can_be_removed_and_offloaded(model, handle, before)


@torch.no_grad()
def test_warning_at_the_end_of_a_block_shows_the_users_line(device: torch.device) -> None:
    model, x = tiny_stack(), rows(device)
    with streamed(model, device, granularity="module") as handle:
        block = handle.record()
        block.__enter__()
        model(x)
        model(x)
        with pytest.warns(UserWarning, match="the log ends where the units were cut") as caught:
            block.__exit__(None, None, None)
        assert [warning.filename for warning in caught] == [__file__]
