"""What units return: views of their weights come out as clones, whatever they lie in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python import expect
from tests.python.dropin import assert_equal, plain_on, rows, streamed
from torch_offload import StateError


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


class _ReturnsWhatItIsTold(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16), requires_grad=False)
        self.made: Callable[[torch.Tensor, torch.Tensor], Any] = lambda x, row: x

    def forward(self, x: torch.Tensor) -> Any:
        return self.made(x @ self.weight, self.weight[0])


class _Pair(tuple[Any, ...]):
    """A tuple with an attribute."""


class _Exact(tuple[Any, ...]):
    """A tuple that is made of two arguments."""

    def __new__(cls, first: Any, second: Any) -> _Exact:
        return super().__new__(cls, (first, second))


class _Wraps(tuple[Any, ...]):
    """A tuple that takes anything, and makes another one of it."""

    def __new__(cls, *items: Any) -> _Wraps:
        return super().__new__(cls, items)


def _told(device: torch.device) -> tuple[Any, Any, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(16, 16), *(_ReturnsWhatItIsTold() for _ in range(3)))
    torch_offload.align(model)
    return model, plain_on(model, device), rows(device)


@pytest.mark.parametrize("grad", [True, False])
def test_output_that_contains_itself_is_cloned_once(device: torch.device, grad: bool) -> None:
    model, plain, x = _told(device)

    def ring(x: torch.Tensor, row: torch.Tensor) -> Any:
        both: list[Any] = [x, row]
        both.extend([both, (both, row), {"both": both}])
        return both

    def ladder(x: torch.Tensor, row: torch.Tensor) -> Any:
        step: Any = (x, row)
        for _ in range(100):  # each twice in the next: 2 ** 100 ways to the first
            step = (step, step)
        return step

    def chain(x: torch.Tensor, row: torch.Tensor) -> Any:
        link: Any = [x]
        for _ in range(100_000):  # no view down there
            link = [link]
        return [x, row, link]

    with streamed(model, device, units=["1", "2", "3"]), torch.set_grad_enabled(grad):
        must = plain(x)
        model[3].made = ring
        got = model(x)
        assert torch.equal(got[0], must)
        assert torch.equal(got[1], plain[3].weight[0])
        assert got[2] is got
        assert got[3][0] is got
        assert torch.equal(got[3][1], got[1])
        assert got[4] == {"both": got}
        model[3].made = ladder
        got = model(x)
        for _ in range(100):
            assert got[0] is got[1]
            got = got[0]
        assert torch.equal(got[1], plain[3].weight[0])
        model[3].made = chain
        got = model(x)
        assert torch.equal(got[1], plain[3].weight[0])
        assert len(got[2]) == 1


@torch.no_grad()
def test_view_deep_down_in_an_output_raises(device: torch.device) -> None:
    model, plain, x = _told(device)

    def deep(x: torch.Tensor, row: torch.Tensor) -> Any:
        link: Any = [row]
        for _ in range(1000):
            link = [link]
        return link

    with streamed(model, device, units=["1", "2", "3"]) as handle:
        model[3].made = deep
        with pytest.raises(StateError, match=r"view.*resident=\['3\.weight'\]"):
            model(x)
        model[3].made = lambda x, row: x
        expect.assert_at_rest(handle)
        assert torch.equal(model(x), plain(x))


@torch.no_grad()
def test_output_in_a_tuple_of_another_class_is_cloned(device: torch.device) -> None:
    model, plain, x = _told(device)

    def pair(x: torch.Tensor, row: torch.Tensor) -> Any:
        made = _Pair((x, row))
        made.note = "kept"  # type: ignore[attr-defined]
        return made

    with streamed(model, device, units=["1", "2", "3"]):
        must = plain(x)
        model[3].made = pair
        got = model(x)
        assert type(got) is _Pair
        assert got.note == "kept"  # type: ignore[attr-defined]
        assert torch.equal(got[0], must)
        assert torch.equal(got[1], plain[3].weight[0])
        model[3].made = lambda x, row: torch.return_types.topk((x, row))
        got = model(x)
        assert isinstance(got, torch.return_types.topk)
        assert torch.equal(got.indices, plain[3].weight[0])


@torch.no_grad()
@pytest.mark.parametrize("kind", [_Exact, _Wraps])
def test_view_in_a_tuple_that_cannot_be_made_anew_raises(
    device: torch.device, kind: type[tuple[Any, ...]]
) -> None:
    model, plain, x = _told(device)
    with streamed(model, device, units=["1", "2", "3"]) as handle:
        model[3].made = lambda x, row: kind(x, row)
        with pytest.raises(StateError, match=rf"unit '3'.*'{kind.__name__}'.*resident=\['3'\]"):
            model(x)
        expect.assert_at_rest(handle)
        model[3].made = lambda x, row: kind(x, row.clone())
        got = model(x)
        assert type(got) is kind
        assert torch.equal(got[0], plain(x))
