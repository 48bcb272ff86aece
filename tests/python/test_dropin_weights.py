"""Weights that a forward edits, returns, shows to hooks, or reads outside their module's call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python import expect
from tests.python.dropin import (
    IDLE_WARNING,
    Stack,
    assert_equal,
    assert_streams_like_plain,
    plain_on,
    rows,
    streamed,
    tiny_stack,
)
from tests.python.streamed_master_guard import StreamedMasterGuard
from torch_offload import StateError


class _EditsItself(nn.Module):
    """An EMA code book, or RWKV: a forward that writes into its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(64, 16)
        self.how: Callable[[nn.Module], None] = lambda module: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(self.up(x))
        self.how(self)
        return x


def _in_place(module: Any) -> None:
    module.up.weight.mul_(0.5)


def _by_data(module: Any) -> None:
    module.up.weight.data = module.up.weight.data * 0.5


@pytest.mark.parametrize("edit", [_in_place, _by_data])
def test_forward_that_edits_its_own_weight_raises(
    device: torch.device, edit: Callable[[Any], None]
) -> None:
    model: Any = nn.Sequential(nn.Linear(16, 16), *(_EditsItself() for _ in range(3)))
    torch_offload.align(model)
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device, units=["1", "2", "3"]) as handle, torch.no_grad():
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model[2].how = edit
        with pytest.raises(StateError, match=r"resident=\['2\.up\.weight'\]"):
            model(x)
        expect.assert_at_rest(handle)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), f"{name} was changed"
        model[2].how = lambda module: None
        assert torch.equal(model(x), plain(x))
    with streamed(model, device, units=["1", "2", "3"], resident=["2.up.weight"]):
        model[2].how = plain[2].how = edit
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(model(x), plain(x))


class _ReturnsWeight(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))
        self.kind = kind

    def forward(self, x: torch.Tensor) -> Any:
        x = x @ self.weight
        if self.kind is tuple:
            return x, self.weight[0]
        if self.kind is list:
            return [x, self.weight.view(4, 64)]
        return {"x": x, "row": self.weight.t()[1]}


class _HoldsReturners(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.layers = nn.ModuleList(_ReturnsWeight(kind) for _ in range(4))

    def forward(self, x: torch.Tensor) -> list[Any]:
        x = self.first(x)
        outputs = []
        for layer in self.layers:
            outputs.append(layer(x))
            last = outputs[-1]
            x = last["x"] if isinstance(last, dict) else last[0]
        return outputs


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_output_that_lies_in_the_window_is_cloned(device: torch.device, kind: type) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = torch_offload.align(_HoldsReturners(kind))
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device, units=["layers.*"]) as handle, torch.no_grad():
        begin, end = handle._engine.window
        must = plain(x)
        with expect.watch(handle) as calls:
            outputs = model(x)
            model(x)  # overwrites every place
        assert_equal(outputs, must)
        expect.assert_streams_exactly(calls, exact_passes=2)
        for output in outputs:
            for tensor in output.values() if isinstance(output, dict) else output:
                assert not begin <= tensor.data_ptr() < end


def test_user_hooks_see_weights_on_the_device(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    sums: list[torch.Tensor] = []
    with streamed(model, device) as handle, torch.no_grad():
        begin, end = handle._engine.window

        def hook(module: Any, args: Any, output: Any = None) -> None:
            assert begin <= module.weight.data_ptr() < end
            sums.append(module.weight.sum())

        model.blocks[2].attn.register_forward_pre_hook(hook)
        model.blocks[2].attn.register_forward_hook(hook)
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))
        assert len(sums) == 4
        assert all(torch.equal(one, plain.blocks[2].attn.weight.sum()) for one in sums)


class _ReadsOutside(Stack):
    """gemma3n, gpt_neox_japanese: a weight is read by another module than its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.blocks[1].mlp.down.weight.sum(1)


class _CallsForward(Stack):
    """SqueezeBERT: ``layer.forward(...)`` instead of a call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block.mlp.forward(x)  # type: ignore[operator]
        return x


@pytest.mark.filterwarnings(f"ignore:{IDLE_WARNING}:UserWarning")
@pytest.mark.parametrize("kind", [_ReadsOutside, _CallsForward])
def test_weight_read_outside_its_call_is_never_silent(
    device: torch.device, kind: type[Stack], master_guard: StreamedMasterGuard
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12)
        model = kind()
    torch_offload.align(model)
    plain = plain_on(model, device)
    x = rows(device)
    with torch.no_grad():
        with streamed(model, device) as handle:
            if device.type == "cpu":
                with master_guard.expect_reads() as reads, pytest.raises(AssertionError):
                    model(x)
                assert len(reads) == 1
            else:
                with pytest.raises(RuntimeError, match=r"resident=\["):
                    model(x)
            expect.assert_at_rest(handle)
        cure = ["blocks.1.mlp.down.weight"] if kind is _ReadsOutside else ["blocks.*.mlp"]
        with streamed(model, device, resident=cure) as handle:
            run = (lambda m: m(x)) if kind is _ReadsOutside else (lambda m: m.blocks[0].attn(m(x)))
            assert_streams_like_plain(model, plain, handle, run)
