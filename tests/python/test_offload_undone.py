"""An `offload` that fails in the middle leaves the model exactly what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import torch_offload
from tests.python import expect
from tests.python.dropin import (
    assert_streams_like_plain,
    plain_on,
    rows,
    streamed,
    tiny_stack,
)
from torch_offload import _C
from torch_offload.devices import devices_made_by
from torch_offload.selfcheck.failing_operator import FailingOperator

HOST = torch.device("cpu")


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("k", [0, 1, 4, 7])
def test_failure_while_moving_weights_is_undone(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], k: int
) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    before = expect.snapshot(model)
    move_in = _C.Engine.move_in

    def failing(engine: _C.Engine, unit: int) -> None:
        if unit == k:
            raise error("planted")
        move_in(engine, unit)

    monkeypatch.setattr(_C.Engine, "move_in", failing)
    with pytest.raises(error, match="planted"):
        torch_offload.offload(model, device)
    expect.assert_unchanged(model, before, same_memory=False)
    monkeypatch.undo()
    with streamed(model, device) as handle:
        assert_streams_like_plain(model, plain, handle, lambda m: m(rows(device)))


@pytest.mark.parametrize(
    ("module", "step", "k"),
    [
        *(("wrapping", "wrap_unit", k) for k in (0, 1, 5)),
        *(("wrapping", "wrap_ancestor", k) for k in (0, 1)),
        *(("wrapping", "guard", k) for k in (0, 1, 5)),
        *(("installation", "streamed_units", k) for k in (0, 1)),
        ("wrapping", "streamed_units", 0),
        ("installation", "Handle", 0),
        ("wrapping", "Probes", 0),
    ],
)
@pytest.mark.parametrize("is_before", [True, False])
def test_failure_while_wrapping_is_undone(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    step: str,
    k: int,
    is_before: bool,
) -> None:
    model = tiny_stack()
    before = expect.snapshot(model)
    owner = getattr(torch_offload, module)
    real = getattr(owner, step)
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if is_before and calls == k + 1:
            raise KeyboardInterrupt("planted")
        result = real(*args, **kwargs)
        if calls == k + 1:
            raise KeyboardInterrupt("planted")
        return result

    monkeypatch.setattr(owner, step, failing)
    with pytest.raises(KeyboardInterrupt, match="planted"):
        torch_offload.offload(model, device)
    assert calls == k + 1
    expect.assert_unchanged(model, before, same_memory=False)


@pytest.mark.parametrize("is_there", [False, True], ids=["from-host", "from-device"])
def test_failure_at_any_operator_of_offload_is_undone(device: torch.device, is_there: bool) -> None:
    model = tiny_stack(2)
    if is_there:
        model.to(device)
    before = expect.snapshot(model)
    for k in range(1000):
        try:
            with FailingOperator(k + 1):
                handle = torch_offload.offload(model, device)
            break
        except KeyboardInterrupt:
            expect.assert_unchanged(model, before, same_memory=False)
    assert k > 0
    handle.remove()
    expect.assert_unchanged(model, before, same_memory=False)


def test_replan_that_fails_without_a_way_back_loses_no_weight() -> None:
    """The device takes no call any more from the moment on that the new plan's weights move."""
    failure = _C.DeviceFailure("memory")

    class Failing(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.empty_strided.default:
                failure.is_sticky = True
                failure.calls_until_failure = 1
                raise MemoryError("planted")
            return func(*args, **(kwargs or {}))

    model = tiny_stack()
    plain = plain_on(model, HOST)
    x = rows(HOST)
    with devices_made_by(lambda device: _C.failing_device(device, failure)):
        handle = torch_offload.offload(model, HOST, depth=0)
    with torch.no_grad():
        must = plain(x)
        assert torch.equal(model(x), must)
        with pytest.raises(MemoryError, match="planted"), Failing():
            handle.replan(gpu_budget="1GiB")
        assert failure.failed_call
        failure.is_sticky = False
        failure.calls_until_failure = 0
        with pytest.raises(torch_offload.StateError, match="expected a window on the device"):
            model(x)
        handle.replan()
        assert torch.equal(model(x), must)
        handle.replan(gpu_budget="1GiB")
        assert torch.equal(model(x), must)
    handle.remove()
    for name, parameter in plain.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
