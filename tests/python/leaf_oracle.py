"""What `expect` cannot know of ``granularity="module"``: the passes around a cut of the units."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import torch_offload
from tests.python import expect
from tests.python.dropin import assert_equal, plain_on, rows, tiny_stack
from tests.python.models import CASES


def leaf_cut_of(handle: torch_offload.Handle) -> Any:
    """What decides about leaves; the handle shows it to nobody."""
    installation: Any = handle._installed
    leaf_cut = installation.wrapping._leaf_cut
    assert leaf_cut is not None, "not offloaded with granularity='module'"
    return leaf_cut


@contextmanager
def observed_uncut(handle: torch_offload.Handle) -> Iterator[list[int]]:
    """Asserts the exact copies of one pass that may end in a cut; yields the units called.

    `expect.watch` cannot: a cut replaces the units and the wrappers that it stands around.
    """
    model = handle.model
    assert model is not None
    units, before = handle.units, handle.stats
    window_begin, window_end = handle._engine.window
    frozen: Any = SimpleNamespace(
        units=units,
        config=handle.config,
        _engine=SimpleNamespace(plan=handle._engine.plan),  # a copy, from before it is cut
    )
    streamed = [index for index, unit in enumerate(units) if unit.place is not None]
    one = expect.Pass(
        units=[],
        whole_before=frozenset(i for i in streamed if handle._engine.is_whole(i)),
        copied_in_vain=frozenset(),
        in_vain_if_evicted=frozenset(),
        is_edited=False,
        before=before,
    )

    def noting(forward: Callable[..., Any], index: int) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            one.units.append(index)
            for name in units[index].parameters:
                address = model.get_parameter(name).data_ptr()
                assert window_begin <= address < window_end, f"{name} is outside the window"
            return forward(*args, **kwargs)

        return noted

    modules = {index: model.get_submodule(units[index].name) for index in streamed}
    for index, module in modules.items():
        vars(module)["forward"] = noting(module.forward, index)
    try:
        yield one.units
        one.completed = True
    finally:
        for module in modules.values():
            del vars(module)["forward"]
    one.after = handle.stats
    names = [units[index].name for index in streamed]
    learned = expect._learned.setdefault(handle, expect._Learned(names, streamed))
    expected = expect._expected(frozen, learned, one)
    got, must = (one.onloads, one.bytes_onloaded), (expected.onloads, expected.bytes_onloaded)
    assert got == must if expected.is_exact else got >= must, f"copied {got}, expected {must}"
    learned.learn(one.units, one.completed, expected.goes_as_known)


def settle(handle: torch_offload.Handle, forward: Callable[[], Any], *, passes: int = 4) -> None:
    """Runs forwards until the units are cut, then the first one with leaves; counts all copies."""
    leaf_cut = leaf_cut_of(handle)
    window_bytes = handle.stats.window_bytes
    for _ in range(passes):
        assert not leaf_cut._is_cut
        with observed_uncut(handle):
            forward()
        if leaf_cut._is_cut:
            break
    assert leaf_cut.is_settled, f"no cut after {passes} passes"
    if handle.config.gpu_budget in (None, "auto"):
        assert handle.stats.window_bytes == window_bytes
    assert_cut_streams(handle, forward)


def assert_cut_streams(handle: torch_offload.Handle, forward: Callable[[], Any]) -> expect.Pass:
    """Asserts the exact copies of the first pass after a cut, which begins with an empty window."""
    streamed = [index for index, unit in enumerate(handle.units) if unit.place is not None]
    assert not any(handle._engine.is_whole(index) for index in streamed)
    expect._learned.pop(handle, None)  # the new pipeline has learned nothing yet
    with expect.watch(handle) as calls:
        forward()
    (one,), (expected,) = calls.passes, calls.expected
    got, must = (one.onloads, one.bytes_onloaded), (expected.onloads, expected.bytes_onloaded)
    assert got == must if expected.is_exact else got >= must, f"copied {got}, expected {must}"
    if handle.config.mode == "pipeline" and expected.goes_as_known:
        assert one.misses == 1, "only the first unit could not be foreseen"
    return one


def leaf_names(handle: torch_offload.Handle) -> set[str]:
    return {unit.name for unit in handle.units}


@contextmanager
def offloaded(model: nn.Module, device: torch.device, **options: Any) -> Iterator[Any]:
    """As ``granularity="module"``; afterwards the plain model, attribute by attribute."""
    before = expect.snapshot(model)
    with torch.no_grad():
        handle = torch_offload.offload(
            model, device, **({"granularity": "module", "depth": 0} | options)
        )
        try:
            yield handle
            expect.assert_at_rest(handle)
        finally:
            handle.remove()
    expect.assert_unchanged(model, before, same_memory=False)


def inputs_of(name: str, device: torch.device) -> dict[str, Any]:
    inputs = CASES[name].inputs()
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def checked(model: Any, plain: Any, *args: Any, **kwargs: Any) -> Callable[[], None]:
    """A forward of the model that must give the plain one's bits."""
    with torch.no_grad():
        must = plain(*args, **kwargs)
    return lambda: assert_equal(model(*args, **kwargs), must)


def stack_pair(device: torch.device, **settings: Any) -> tuple[Any, Callable[[], None]]:
    model = tiny_stack(**settings)
    width = settings.get("width", 16)
    return model, checked(model, plain_on(model, device), rows(device, width=width))


@contextmanager
def expect_relearned(handle: torch_offload.Handle) -> Iterator[expect.Calls]:
    """As `expect.watch`, after one pass with units that were cut meanwhile."""
    streamed = [index for index, unit in enumerate(handle.units) if unit.place is not None]
    learned = expect._Learned([handle.units[index].name for index in streamed], streamed)
    learned.learn(list(streamed), completed=True, was_known=True)
    learned.learn(list(streamed), completed=True, was_known=True)
    expect._learned[handle] = learned
    with expect.watch(handle) as calls:
        yield calls
    expect.assert_streams_exactly(calls)
