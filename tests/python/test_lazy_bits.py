"""Parameters whose values torch makes of their bytes on reading: ``t.conj()`` and its like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.python.dropin import streamed
from tests.python.test_packed_masters import packed, unpacked_names


class _Layer(nn.Module):
    """A complex weight and a real one."""

    def __init__(self, bits: Callable[[torch.Tensor], torch.Tensor], complex_: bool) -> None:
        super().__init__()
        dtype = torch.cfloat if complex_ else torch.float
        self.weight = nn.Parameter(bits(torch.randn(16, 16, dtype=dtype) / 6), requires_grad=False)
        self.up = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x.to(self.weight.dtype) @ self.weight).resolve_conj()
        return self.up(x) + (torch.view_as_real(y)[..., 1] if y.is_complex() else y)


def _conj(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.conj()


def _negative(tensor: torch.Tensor) -> torch.Tensor:
    return torch._neg_view(tensor)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


_UNITS = [str(index) for index in range(5)]


def _models(bits: Any, complex_: bool, device: torch.device) -> tuple[Any, Any]:
    made = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            made.append(nn.Sequential(*(_Layer(bits, complex_) for _ in range(5))).eval())
    return made[0], made[1].to(device)


def _assert_same(model: Any, plain: Any, x: torch.Tensor) -> None:
    assert torch.equal(model(x), plain(x))
    for name, value in plain.state_dict().items():
        got = model.state_dict()[name]
        assert torch.equal(got, value.cpu()), name
        assert (got.is_conj(), got.is_neg()) == (value.is_conj(), value.is_neg())


_KINDS = [(_conj, True), (_negative, True), (_negative, False)]


@torch.no_grad()
@pytest.mark.parametrize(("bits", "complex_"), _KINDS)
def test_parameter_that_has_them_equals_plain_at_rest_in_forwards_and_after_remove(
    device: torch.device, bits: Any, complex_: bool
) -> None:
    model, plain = _models(bits, complex_, device)
    x = torch.randn(4, 16, device=device)
    assert model[1].weight.is_conj() or model[1].weight.is_neg()
    with streamed(model, device, units=_UNITS) as handle:
        for _ in range(3):
            _assert_same(model, plain, x)
        assert handle.stats.onloads >= 15
    _assert_same(model.to(device), plain, x)


@torch.no_grad()
@pytest.mark.parametrize(("bits", "complex_"), _KINDS)
@pytest.mark.parametrize("replaces", [False, True], ids=["data", "parameter"])
def test_parameter_that_gets_them_between_forwards_is_seen(
    device: torch.device, bits: Any, complex_: bool, replaces: bool
) -> None:
    model, plain = _models(_plain, complex_, device)
    x = torch.randn(4, 16, device=device)
    with streamed(model, device, units=_UNITS, depth="1GiB"):
        _assert_same(model, plain, x)
        for _ in range(2):  # the second time they are taken away again
            for one in (model, plain):
                if replaces:
                    one[2].weight = nn.Parameter(bits(one[2].weight.detach()), requires_grad=False)
                else:
                    one[2].weight.data = bits(one[2].weight.data)
            for _ in range(2):
                _assert_same(model, plain, x)
        for one in (model, plain):
            one[2].weight.data = bits(one[2].weight.data)  # seen by remove() alone
    _assert_same(model.to(device), plain, x)


@torch.no_grad()
def test_packed_master_that_has_them_equals_plain() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        layers = [nn.Linear(256, 256, dtype=torch.bfloat16) for _ in range(6)]
    for layer in layers:
        layer.weight = nn.Parameter(_negative(layer.weight.detach()), requires_grad=False)
    model = nn.Sequential(*layers).requires_grad_(False)
    before = {name: value.resolve_neg().clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, 256, dtype=torch.bfloat16)
    must = model(x)
    with packed(model, units=[str(index) for index in range(6)]) as handle:
        for _ in range(2):
            assert torch.equal(model(x), must)
            assert unpacked_names(handle) == ["0.bias"]  # beside the first weight, which stays
            assert torch.equal(model[1].weight.clone(), before["1.weight"])
            assert model[1].weight.is_neg()
        assert torch.equal(model[1].weight.detach(), before["1.weight"])  # which unpacks it
        assert torch.equal(model(x), must)
        model[2].weight.data = _negative(model[2].weight.data)
        other = model(x)
        assert not torch.equal(other, must)
        assert torch.equal(model(x), other)
        model[2].weight.data = _negative(model[2].weight.data)
        assert torch.equal(model(x), must)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
