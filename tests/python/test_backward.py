"""Backward through streamed weights: an error, whoever computes it, never a wrong gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

from tests.python import expect
from tests.python.dropin import (
    assert_streams_like_plain,
    plain_on,
    rows,
    streamed,
    tiny_llama,
    tiny_stack,
    tokens,
)
from torch_offload import StateError

# Torch itself scripts a part of its forward-mode derivatives.
_JIT_WARNING = "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
_GRAD_WARNING = "ignore:torch_offload. this forward runs in grad mode:UserWarning"


def test_grad_mode_forward_warns_once_and_backward_raises(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device) as handle:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with expect.watch(handle) as calls:
                outputs = [model(x) for _ in range(3)]
        assert [str(one.message).split(":")[0] for one in caught] == ["torch_offload"]
        expect.assert_streams_exactly(calls, exact_passes=3)
        must = plain(x)
        for output in outputs:
            assert torch.equal(output, must)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                output.sum().backward()
        # Our own change of the version is no edit: nothing is copied that would not be anyway.
        with torch.no_grad(), expect.watch(handle) as calls:
            model(x)
        expect.assert_streams_exactly(calls, exact_passes=1)


@pytest.mark.filterwarnings(_GRAD_WARNING)
def test_backward_over_weights_that_lie_still_works(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device, resident=["blocks.3"]):
        hidden = model(x).detach()
        model.blocks[3](hidden).sum().backward()
        plain.blocks[3](hidden).sum().backward()
        grad = model.blocks[3].mlp.up.weight.grad
        assert grad is not None
        assert torch.equal(grad, plain.blocks[3].mlp.up.weight.grad)


@pytest.mark.filterwarnings(_GRAD_WARNING)
def test_input_gradient_through_streamed_weights_raises(device: torch.device) -> None:
    model = tiny_stack()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x = rows(device).requires_grad_()
    with streamed(model, device), pytest.raises(RuntimeError, match="inplace operation"):
        model(x).sum().backward()


def test_gradient_of_a_unit_that_switches_grad_mode_on_raises(device: torch.device) -> None:
    model = tiny_stack()
    down = model.blocks[1].mlp.down
    plain_forward = down.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():  # the gradient of its input is what reads the weight
            return plain_forward(x.detach().requires_grad_())

    down.forward = forward
    with streamed(model, device), torch.no_grad():
        kept: list[torch.Tensor] = []
        hook = down.register_forward_hook(lambda module, args, output: kept.append(output))
        model(rows(device))
        hook.remove()
        with torch.enable_grad(), pytest.raises(RuntimeError, match="inplace operation"):
            kept[0].sum().backward()
    del down.forward


def _checkpointed(model: Any, x: torch.Tensor, *, use_reentrant: bool) -> torch.Tensor:
    x = model.embed(x)
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=use_reentrant)
    return x


@pytest.mark.filterwarnings(_GRAD_WARNING)
def test_checkpointed_forward_whose_gradients_nobody_checks_raises(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device) as handle:
        for frozen in (False, True):
            model.requires_grad_(not frozen)
            with pytest.raises(StateError, match=r"gradient checkpointing.*torch\.no_grad\(\)"):
                _checkpointed(model, x.clone().requires_grad_(frozen), use_reentrant=False)
            expect.assert_at_rest(handle)
        # Nothing to differentiate, so nothing that could be wrong.
        with expect.watch(handle) as calls:
            assert torch.equal(_checkpointed(model, x, use_reentrant=False), plain(x))
        assert len(calls.passes) == len(model.blocks)
        with torch.no_grad():
            assert torch.equal(_checkpointed(model, x, use_reentrant=False), plain(x))


@pytest.mark.filterwarnings(_GRAD_WARNING)
def test_reentrant_checkpoint_raises_in_its_backward(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device) as handle:
        output = _checkpointed(model, x.clone().requires_grad_(), use_reentrant=True)
        assert torch.equal(output, plain(x))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
        expect.assert_at_rest(handle)
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))


@pytest.mark.filterwarnings(_GRAD_WARNING)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_of_transformers_raises(device: torch.device) -> None:
    model = tiny_llama()
    plain = plain_on(model, device)
    ids = tokens(device)
    with streamed(model, device) as handle:
        model.gradient_checkpointing_enable()
        model.train()
        with pytest.raises(StateError, match="gradient checkpointing"):
            model(ids, labels=ids, use_cache=False)
        expect.assert_at_rest(handle)
        model.eval()
        assert_streams_like_plain(model, plain, handle, lambda m: m(ids, use_cache=False).logits)


def test_hooks_on_saved_tensors_raise(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device) as handle, torch.autograd.graph.save_on_cpu():
        with pytest.raises(StateError, match="hooks on saved tensors"):
            model(x)
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))


_TRANSFORMS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "grad": lambda m, x: torch.func.grad(lambda y: m(y).sum())(x),
    "vjp": lambda m, x: torch.func.vjp(m, x),
    "jacrev": lambda m, x: torch.func.jacrev(lambda y: m(y).sum(0))(x),
    "hessian": lambda m, x: torch.func.hessian(lambda y: m(y).sum())(x),
    "grad-in-vmap": lambda m, x: torch.vmap(torch.func.grad(lambda y: m(y).sum()))(x),
    "vmap-in-grad": lambda m, x: torch.func.grad(lambda y: torch.vmap(m)(y).sum())(x),
}


@pytest.mark.filterwarnings(_JIT_WARNING)
@pytest.mark.parametrize("what", _TRANSFORMS)
@pytest.mark.parametrize("frozen", [True, False])
def test_transform_that_differentiates_raises(
    device: torch.device, what: str, frozen: bool
) -> None:
    model = tiny_stack().requires_grad_(not frozen)
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device) as handle:
        with (
            _disable_current_modes(),  # newer torch cannot make duals of batches below any mode
            pytest.raises(StateError, match=r"torch\.func\.grad.*handle\.remove\(\)"),
        ):
            _TRANSFORMS[what](model, x)
        expect.assert_at_rest(handle)
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))


@pytest.mark.filterwarnings(_JIT_WARNING)
def test_transforms_that_go_forward_equal_plain(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device) as handle:
        assert_streams_like_plain(model, plain, handle, lambda m: torch.vmap(m)(x))
        assert_streams_like_plain(model, plain, handle, lambda m: torch.func.jvp(m, (x,), (x,)))


def _over_weights(model: Any, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """An ensemble, and derivatives by the weights."""
    weights = {name: one.detach().clone() for name, one in model.named_parameters()}
    weights = {name: one.to(x.device) for name, one in weights.items()}
    stacked = {name: torch.stack([one, one * 2]) for name, one in weights.items()}

    def call(replaced: dict[str, torch.Tensor]) -> Any:
        return torch.func.functional_call(model, replaced, (x,))

    return {
        "vmap": lambda: torch.vmap(call)(stacked),
        "jvp": lambda: torch.func.jvp(call, (weights,), (weights,)),
        "grad": lambda: torch.func.grad(lambda w: call(w).sum())(weights),
    }


@pytest.mark.filterwarnings(_JIT_WARNING)
@pytest.mark.filterwarnings(_GRAD_WARNING)
@pytest.mark.parametrize("what", ["vmap", "jvp", "grad"])
def test_transform_over_streamed_weights_raises(device: torch.device, what: str) -> None:
    model = tiny_stack().requires_grad_(False)
    plain = plain_on(model, device)
    x = rows(device)
    over = _over_weights(model, x)[what]
    with streamed(model, device) as handle:
        with pytest.raises(StateError, match=r"handle\.remove\(\)"):
            over()
        expect.assert_at_rest(handle)
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))
    model.to(device)
    over()


class _KeepsItsOwn(torch.autograd.Function):
    """A function that saves as it should, and one of its inputs is a weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight.t())
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return grad @ weight, None


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(16), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _KeepsItsOwn.apply(x, self.weight)


def test_function_of_ones_own_raises_in_its_backward(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(16, 16), *(_Layer() for _ in range(4)))
    x = rows(device).requires_grad_()
    with streamed(model, device, units=["1", "2", "3", "4"]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = model(x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
