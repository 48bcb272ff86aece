"""Leaves after failures, under a budget, and distrusted: the units are cut once more, or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python import expect
from tests.python.dropin import plain_on, rows, tiny_llama, tokens
from tests.python.leaf_oracle import (
    assert_cut_streams,
    checked,
    expect_relearned,
    leaf_cut_of,
    leaf_names,
    offloaded,
    settle,
    stack_pair,
)
from torch_offload import _C, leaves


class TestFailures:
    """A first pass that does not end."""

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_failed_first_pass_is_traced_again(
        self, device: torch.device, error: type[BaseException]
    ) -> None:
        model, forward = stack_pair(device)
        with offloaded(model, device) as handle:
            before = [dict(vars(module)) for module in model.modules()]
            fail = FailOnce(model.blocks[2].mlp.down, error)
            with pytest.raises(error):
                forward()
            fail.undo()
            assert fail.raised
            assert [dict(vars(module)) for module in model.modules()] == before
            expect.assert_at_rest(handle)
            assert not leaf_cut_of(handle)._is_cut
            assert not leaf_cut_of(handle).is_settled
            forward()
            assert leaf_cut_of(handle).is_settled
            assert "blocks.2.mlp.down" in leaf_names(handle)
            assert_cut_streams(handle, forward)

    def test_removed_after_a_failed_first_pass_is_plain(self, device: torch.device) -> None:
        model, forward = stack_pair(device)
        with offloaded(model, device):
            fail = FailOnce(model.blocks[1].attn, KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                forward()
            fail.undo()
        model.to(device)
        forward()

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_failed_later_pass_leaves_the_cut(
        self, device: torch.device, error: type[BaseException]
    ) -> None:
        model, forward = stack_pair(device)
        with offloaded(model, device) as handle:
            settle(handle, forward)
            names = leaf_names(handle)
            fail = FailOnce(model.blocks[2].mlp.down, error)
            with pytest.raises(error):
                forward()
            fail.undo()
            expect.assert_at_rest(handle)
            forward()
            assert leaf_names(handle) == names
            assert leaf_cut_of(handle).is_settled


@torch.no_grad()
def test_budget_without_room_beside_leaves_keeps_the_sublayers_and_the_output(
    device: torch.device,
) -> None:
    """A budget that is enough for sublayers, but not for the small weights of so many blocks."""
    model = nn.Sequential(*(ReaderBlock(64) for _ in range(64))).eval()
    torch_offload.align(model)
    forward = checked(model, plain_on(model, device), rows(device, width=64))
    budget = least_budget(model, device)
    with offloaded(model, device, gpu_budget=budget) as handle:
        names = leaf_names(handle)
        text = "the units stay as they are, as there is no room"
        with pytest.warns(UserWarning, match=text) as caught:
            forward()
        assert Path(caught[0].filename).parent == Path(__file__).parent
        assert leaf_cut_of(handle).is_settled
        assert leaf_names(handle) == names
        forward()


class FailOnce:
    """Makes the next forward of a module raise."""

    def __init__(self, module: nn.Module, error: type[BaseException]) -> None:
        self._module, self._error, self.raised = module, error, False
        vars(module)["forward"] = self._fail

    def _fail(self, *args: Any, **kwargs: Any) -> None:
        self.raised = True
        raise self._error("planted")

    def undo(self) -> None:
        del vars(self._module)["forward"]


@torch.no_grad()
def test_interrupted_cut_is_made_after_the_next_pass(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, forward = stack_pair(device)

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    with offloaded(model, device) as handle:
        with monkeypatch.context() as patch:
            patch.setattr(leaves, "leaf_units", interrupted)
            with pytest.raises(KeyboardInterrupt):
                forward()
        assert not leaf_cut_of(handle).is_settled
        forward()
        assert leaf_cut_of(handle).is_settled
        assert "blocks.2.mlp.down" in leaf_names(handle)
        assert_cut_streams(handle, forward)


class TestBudget:
    """A budget holds before the cut and after it."""

    @pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
    def test_leaves_that_fit_become_resident(self, device: torch.device, share: float) -> None:
        model, forward = stack_pair(device, num_blocks=6)
        least = least_budget(model, device)
        whole = sum(parameter.nbytes for parameter in model.parameters())
        budget = int(least + share * (whole - least))
        with offloaded(model, device, gpu_budget=budget) as handle:
            settle(handle, forward)
            last = handle.stats
            assert last.bytes_resident + last.window_bytes <= budget
            resident = [unit for unit in handle.units if unit.place is None]
            assert resident or share == 0
            assert last.bytes_resident == sum(
                tensor.nbytes
                for tensor in model.parameters()
                if id(tensor) not in {id(p) for p in streamed_parameters(handle)}
            )
            with expect.watch(handle) as calls:
                forward()
                forward()
            expect.assert_streams_exactly(calls, exact_passes=2)
        model.to(device)
        forward()


def test_depth_of_leaves_counts_no_head_that_stays(device: torch.device) -> None:
    model = tiny_llama(vocab_size=4096)
    options = {"granularity": "module", "gpu_budget": None}
    with torch_offload.offload(model, device, **options) as handle, torch.no_grad():
        model(input_ids=tokens(device))
        plan = handle._engine.plan
        streamed = [unit for unit, place in zip(plan.units, plan.places, strict=True) if place]
        assert "lm_head" in {unit.name for unit in plan.units} - {unit.name for unit in streamed}
        assert plan.depth_bytes == _C.make_plan(streamed).depth_bytes


def streamed_parameters(handle: torch_offload.Handle) -> list[nn.Parameter]:
    assert handle.model is not None
    return [
        handle.model.get_parameter(name)
        for unit in handle.units
        if unit.place is not None
        for name in unit.parameters
    ]


def least_budget(model: nn.Module, device: torch.device) -> int:
    with pytest.raises(ValueError, match="gpu_budget of at least") as raised:
        torch_offload.offload(model, device, granularity="module", gpu_budget=0)
    return int(str(raised.value).split("at least ")[1].split()[0])


class Reader(nn.Module):
    """An MLP that may read a weight of its child without calling it, on demand."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(2 * width)
        self.down = nn.Linear(2 * width, width)
        self.reads_outside = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.up(x))
        if self.reads_outside:
            if self.down.weight.device != x.device or _SIMULATED.active(self.down.weight):
                # What torch says on a GPU, where a master is no tensor of the kernel's device.
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices"
                )
            return nn.functional.linear(x, self.down.weight, self.down.bias)
        return self.down(x)


class _Simulated:
    """Says on the host device, where every master is readable, whether a weight is at rest."""

    def __init__(self) -> None:
        self.window: Callable[[], tuple[int, int]] | None = None

    def active(self, weight: torch.Tensor) -> bool:
        if self.window is None or weight.device.type != "cpu":
            return False
        begin, end = self.window()
        return not begin <= weight.data_ptr() < end


_SIMULATED = _Simulated()


@pytest.fixture
def simulated_mismatch() -> Iterator[_Simulated]:
    yield _SIMULATED
    _SIMULATED.window = None


class ReaderBlock(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.attn = nn.Linear(width, width)
        self.mlp = Reader(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x + self.attn(x))


class TestDistrust:
    """A leaf that a later pass reads outside its call joins its sublayer again."""

    @pytest.mark.parametrize("budget", [None, 0.5])
    def test_leaf_read_outside_raises_once_and_joins_its_sublayer(
        self, device: torch.device, simulated_mismatch: _Simulated, budget: float | None
    ) -> None:
        model = nn.Sequential(*(ReaderBlock() for _ in range(4))).eval()
        torch_offload.align(model)
        forward = checked(model, plain_on(model, device), rows(device))
        options = {}
        if budget is not None:
            least = least_budget(model, device)
            whole = sum(parameter.nbytes for parameter in model.parameters())
            options["gpu_budget"] = int(least + budget * (whole - least))
        with offloaded(model, device, **options) as handle:
            simulated_mismatch.window = lambda: handle._engine.window
            settle(handle, forward)
            units = {unit.name: unit for unit in handle.units}
            cut = next(
                i for i in range(4) if units[f"{i}.mlp.down"].place and units[f"{i}.mlp.up"].place
            )
            model[cut].mlp.reads_outside = True
            before = handle.stats
            with pytest.raises(RuntimeError, match=rf"(?s)same device.*{cut}\.mlp\.down\.weight"):
                forward()
            expect.assert_at_rest(handle)
            assert not leaf_cut_of(handle).is_settled
            assert leaf_names(handle) == set(units)
            forward()
            names = leaf_names(handle)
            assert f"{cut}.mlp" in names
            assert not {f"{cut}.mlp.down", f"{cut}.mlp.up"} & names
            assert names - {f"{cut}.mlp"} <= set(units)
            assert leaf_cut_of(handle).is_settled
            after = handle.stats
            assert after.onloads > before.onloads
            if budget is None:
                assert after.window_bytes == before.window_bytes
            forward()
            with expect_relearned(handle) as calls:
                forward()
                forward()
            assert calls.exact
            model[cut].mlp.reads_outside = False
        model.to(device)
        forward()

    def test_names_of_no_leaf_change_nothing(self, device: torch.device) -> None:
        model, forward = stack_pair(device)
        with offloaded(model, device) as handle:
            leaf_cut_of(handle).distrust(
                ["blocks.0.attn.weight"]
            )  # before the cut: nothing to join
            settle(handle, forward)
            names = leaf_names(handle)
            leaf_cut_of(handle).distrust(["nothing.of.ours", "bias", ""])
            assert leaf_cut_of(handle).is_settled
            forward()
            assert leaf_names(handle) == names

    def test_every_leaf_distrusted_gives_the_sublayers_back(self, device: torch.device) -> None:
        model, forward = stack_pair(device)
        with offloaded(model, device) as handle:
            sublayers = leaf_names(handle)
            settle(handle, forward)
            streamed = [name for unit in handle.units for name in unit.parameters]
            leaf_cut_of(handle).distrust(streamed)
            forward()
            assert leaf_names(handle) == sublayers
            forward()
