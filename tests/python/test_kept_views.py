"""Views of streamed weights that outlive their unit: an error to read, in every mode and for good.

Outside grad mode the forward that keeps one raises already (`test_dropin_weights.py`). In grad mode
a graph keeps views rightfully, so there what raises is whoever reads one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.python import expect
from tests.python.dropin import plain_on, rows, streamed, tiny_stack
from torch_offload.selfcheck.subjects import Block, Mlp

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch_offload. this forward runs in grad mode:UserWarning"
)

_READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "sum": lambda view: view.sum(),
    "view-of-a-view": lambda view: view[0].t().clone(),
    "write": lambda view: view.fill_(123.0),
    "address": lambda view: view.data_ptr(),
    "print": repr,
    "list": lambda view: view.tolist(),
    "matmul": lambda view: view @ view.t(),
}


@contextmanager
def raises_of(name: str) -> Iterator[None]:
    pattern = name.replace(".", r"\.").replace("*", r"[\w.]+")
    with pytest.raises(RuntimeError, match=rf"a view of '{pattern}'.*resident=\['{pattern}'\]"):
        yield


@contextmanager
def collected(model: nn.Module, keep: Callable[[Any], Any]) -> Iterator[dict[str, Any]]:
    """What a hook on each attention takes of its weight."""
    kept: dict[str, Any] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            kept[name] = keep(module.weight)

        return hook

    hooks = [
        module.register_forward_hook(hook_of(f"{name}.weight"))
        for name, module in model.named_modules()
        if name.endswith("attn")
    ]
    yield kept
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("read", _READS)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("options", [{}, {"depth": "1GiB"}], ids=["tight", "roomy"])
def test_weights_that_a_hook_collects_in_grad_mode_raise_when_read(
    device: torch.device, read: str, frozen: bool, options: dict[str, Any]
) -> None:
    model = tiny_stack().requires_grad_(not frozen)
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device, **options) as handle:
        with collected(model, lambda weight: weight.detach()) as kept:
            for _ in range(2):
                assert torch.equal(model(x), plain(x))
        assert list(kept) == [f"blocks.{index}.attn.weight" for index in range(4)]
        for name, view in kept.items():
            with raises_of(name):
                _READS[read](view)
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))
        expect.assert_at_rest(handle)
    for name, view in kept.items():  # its memory may be somebody else's by now
        with raises_of(name):
            _READS[read](view)
    assert torch.equal(model.to(device)(x), plain(x))
    del model
    with raises_of("blocks.1.attn.weight"):
        _READS[read](kept["blocks.1.attn.weight"])


def test_clones_that_a_hook_collects_in_grad_mode_stay(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device), collected(model, lambda weight: weight.clone()) as kept:
        for _ in range(2):
            model(x)
    for name, clone in kept.items():
        assert torch.equal(clone, plain.get_parameter(name)), name


class _Stashes(Mlp):
    """Keeps a view of its weight, which the model reads after the call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.stash = self.down.weight.t()
        return super().forward(x)


class _ReadsView(Block):
    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.mlp = _Stashes(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attn(self.mlp(x))
        return x + self.mlp.stash.sum(0)  # type: ignore[operator]


@pytest.mark.parametrize("frozen", [True, False])
def test_view_read_later_in_a_forward_in_grad_mode_raises(
    device: torch.device, frozen: bool
) -> None:
    model = nn.Sequential(nn.Linear(16, 16), *(_ReadsView() for _ in range(3))).eval()
    model.requires_grad_(not frozen)
    x = rows(device)
    with streamed(model, device) as handle:
        for _ in range(2):
            with raises_of("1.mlp.down.weight"):
                model(x)
            expect.assert_at_rest(handle)
    for block in model[1:]:
        vars(block.mlp).pop("stash", None)  # a graph hangs on it
    plain = plain_on(model, device)
    with streamed(model, device, resident=["*.mlp.down.weight"]):
        for _ in range(2):
            assert torch.equal(model(x), plain(x))


def test_view_kept_by_a_forward_that_fails_raises_when_read(device: torch.device) -> None:
    model = tiny_stack()
    x = rows(device)

    def keeps_and_fails(weight: torch.Tensor) -> Any:
        kept.append(weight.detach())
        raise ValueError("planted")

    kept: list[torch.Tensor] = []
    with streamed(model, device), torch.no_grad():
        with collected(model, keeps_and_fails), pytest.raises(ValueError, match="planted"):
            model(x)
        with raises_of("blocks.0.attn.weight"):
            kept[0].sum()


class _ReturnsItsChildsWeight(Block):
    """Its output is a view of a unit that is released already."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.attn(x)
        return self.attn.kept  # type: ignore[return-value]


def test_output_that_shows_a_unit_of_before_raises(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(16, 16), *(_ReturnsItsChildsWeight(16) for _ in range(3)))
    with streamed(model, device) as handle:
        model[2].attn.register_forward_hook(
            lambda module, args, output: setattr(module, "kept", module.weight.detach())
        )
        with raises_of("2.attn.weight"):
            model[2](rows(device)).sum()
        expect.assert_at_rest(handle)


# --- backward --------------------------------------------------------------------------------


class _ByData(nn.Linear):
    """`weight.data` has a version counter of its own, which no release moves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight.data, self.bias)


class _Function(torch.autograd.Function):
    """Keeps a view past autograd's saved tensors, which nobody checks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight.t()
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad @ ctx.weight, None


class _ByFunction(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = _Function.apply(x, self.weight)
        return output


@pytest.mark.parametrize("kind", [_ByData, _ByFunction])
def test_input_gradient_past_the_version_counter_raises(
    device: torch.device, kind: type[nn.Linear]
) -> None:
    model = nn.Sequential(*(kind(16, 16) for _ in range(6))).requires_grad_(False)
    plain = plain_on(model, device)
    x = rows(device).requires_grad_()
    with streamed(model, device, units=[str(index) for index in range(6)]) as handle:
        output = model(x)
        assert torch.equal(output, plain(x))
        with raises_of("*.weight"):
            output.sum().backward()
        assert x.grad is None
        expect.assert_at_rest(handle)
    plain(x).sum().backward()
    must = x.grad
    x.grad = None
    model.to(device)(x).sum().backward()
    assert must is not None
    assert torch.equal(x.grad, must)
