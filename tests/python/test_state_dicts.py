"""State dicts of an offloaded model while a forward runs: right, or refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from tests.python import expect
from tests.python.dropin import assert_equal, plain_on, rows, streamed, tiny_stack
from torch_offload import StateError

# Where a forward stands: in a hook inside a unit's call, and in one between two units.
PLACES = {"inside": "blocks.1.mlp.down", "between": "blocks.2"}


class _Forward:
    """A forward in a thread of its own, which waits in a hook until it is let go."""

    def __init__(self, model: Any, x: torch.Tensor, where: str) -> None:
        self._model, self._x, self._where = model, x, where
        self._is_there, self._may_go = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.outputs: list[torch.Tensor] = []
        self.errors: list[BaseException] = []

    def __enter__(self) -> _Forward:
        module = self._model.get_submodule(PLACES[self._where])
        self._hook = module.register_forward_pre_hook(self._wait)
        self._thread.start()
        assert self._is_there.wait(60)
        return self

    def __exit__(self, *error: object) -> None:
        self._may_go.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._hook.remove()

    def _wait(self, *args: Any) -> None:
        self._is_there.set()
        assert self._may_go.wait(60)

    @torch.no_grad()
    def _run(self) -> None:
        try:
            self.outputs.append(self._model(self._x))
        except BaseException as error:
            self.errors.append(error)


def _halved(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value / 2 for name, value in model.state_dict().items()}


@pytest.mark.parametrize("options", [{}, {"transport": "packed", "masters": "packed"}], ids=str)
@pytest.mark.parametrize("where", PLACES)
def test_state_dicts_during_another_threads_forward_fail(
    device: torch.device, where: str, options: dict[str, Any]
) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    must = copy.deepcopy(model.state_dict())
    other = _halved(model)
    around = nn.Sequential(model)
    with streamed(model, device, **options) as handle, torch.no_grad():
        with _Forward(model, x, where) as forward:
            for module in (model, around, model.blocks, model.blocks[1].mlp, model.blocks[0].attn):
                with pytest.raises(StateError, match=r"expected state_dict\(\) between forwards"):
                    module.state_dict()
            for module in (model, around):
                prefix = "0." if module is around else ""
                with pytest.raises(StateError, match=r"load_state_dict\(\).*with a lock"):
                    module.load_state_dict({prefix + name: t for name, t in other.items()})
            assert torch.equal(model.embed.state_dict()["weight"], plain.embed.weight)
        assert not forward.errors
        assert_equal(forward.outputs, [plain(x)])
        expect.assert_at_rest(handle)
        assert_equal({name: t.cpu() for name, t in model.state_dict().items()}, dict(must))
        model.load_state_dict(other)
        plain.load_state_dict(other)
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("options", [{}, {"transport": "packed", "masters": "packed"}], ids=str)
@pytest.mark.filterwarnings("ignore:torch_offload. this forward runs in grad mode:UserWarning")
def test_state_dict_kept_by_a_hook_of_the_forward_is_right(
    device: torch.device, where: str, grad: bool, options: dict[str, Any]
) -> None:
    model = tiny_stack()
    x = rows(device)
    must = copy.deepcopy(model.state_dict())
    plain = plain_on(model, device)
    kept: list[dict[str, torch.Tensor]] = []
    with streamed(model, device, **options), torch.set_grad_enabled(grad):
        module = model.get_submodule(PLACES[where])
        hook = module.register_forward_pre_hook(lambda *_: kept.append(model.state_dict()))
        for _ in range(2):
            assert torch.equal(model(x), plain(x))
        hook.remove()
        assert torch.equal(model(x), plain(x))
        assert len(kept) == 2
        for state in kept:
            assert list(state) == list(must)
            assert [name for name, t in state.items() if not torch.equal(t.cpu(), must[name])] == []
            assert not any(t.requires_grad or t.is_inference() for t in state.values())


def test_state_dict_of_variables_in_a_hook_holds_the_parameters(device: torch.device) -> None:
    model = tiny_stack()
    kept: list[dict[str, Any]] = []
    with streamed(model, device), torch.no_grad():
        hook = model.blocks[1].mlp.down.register_forward_pre_hook(
            lambda *_: kept.append(model.state_dict(keep_vars=True))
        )
        model(rows(device))
        hook.remove()
        assert all(kept[0][name] is parameter for name, parameter in model.named_parameters())


@torch.no_grad()
def test_load_state_dict_by_a_hook_of_the_forward(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    other = _halved(plain_on(model, torch.device("cpu")))
    with streamed(model, device) as handle:
        hook = model.blocks[1].mlp.down.register_forward_pre_hook(
            lambda *_: model.load_state_dict(other) and None
        )
        with pytest.raises(StateError, match=r"outside the calls of units.*blocks\.1\.mlp\.up\.we"):
            model(x)
        hook.remove()
        expect.assert_at_rest(handle)
        assert torch.equal(model(x), plain(x)), "something was loaded all the same"
        hooks = [
            one.blocks[2].register_forward_pre_hook(
                lambda *_, one=one: one.load_state_dict(other) and None
            )
            for one in (model, plain)
        ]
        # Between two units: the later ones compute with it.
        assert torch.equal(model(x), plain(x))
        for hook in hooks:
            hook.remove()
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("call", ["state_dict", "load_state_dict"])
def test_forward_that_begins_in_the_middle_of_a_state_dict_is_noticed(
    device: torch.device, call: str
) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    state = copy.deepcopy(model.state_dict())
    forward = _Forward(model, x, "inside")

    @contextmanager
    def begins(module: nn.Module) -> Iterator[None]:
        """As late as it can be: behind our own look, before the module's weights are taken."""
        hooks = [
            module.register_state_dict_pre_hook(lambda *_: forward.__enter__() and None),
            module.register_load_state_dict_pre_hook(lambda *_: forward.__enter__() and None),
        ]
        try:
            yield
        finally:
            forward.__exit__()
            for hook in hooks:
                hook.remove()

    calls: dict[str, Callable[[], Any]] = {
        "state_dict": model.state_dict,
        "load_state_dict": lambda: model.load_state_dict(state),
    }
    with streamed(model, device), torch.no_grad():
        with (
            begins(model.blocks[1].mlp.up),
            pytest.raises(StateError, match=rf"{call}\(\) .* has begun while it ran"),
        ):
            calls[call]()
        assert torch.equal(model(x), plain(x))
        calls[call]()
        assert torch.equal(model(x), plain(x))


def test_remove_takes_the_hooks_away(device: torch.device) -> None:
    model = tiny_stack()
    own = model.register_state_dict_pre_hook(lambda *_: None)

    def hooks() -> dict[str, dict[str, list[Any]]]:
        return {
            name: {key: list(value) for key, value in vars(module).items() if "state_dict" in key}
            for name, module in model.named_modules()
        }

    before = hooks()
    assert len(before["blocks"]) == 4
    with streamed(model, device) as handle:
        first = hooks()
        assert first != before
        assert first["embed"] == before["embed"], "a copy of what stays would take them along"
        handle.replan(gpu_budget=None)
        assert hooks() == first
    assert hooks() == before
    own.remove()
