"""The hazard checker from Python: real runs are clean, planted races are not."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python.dropin import raising, rows, streamed, tiny_stack
from torch_offload import _C, StateError

_MODES = [
    ("sync", "shared"),
    ("streams", "shared"),
    ("streams", "split"),
    ("events", "shared"),
    ("events", "split"),
    ("pipeline", "shared"),
    ("pipeline", "split"),
]


def _forward(model: Any, device: torch.device) -> None:
    with torch.no_grad():
        model(rows(device))


@pytest.mark.parametrize(("mode", "streams"), _MODES)
def test_recorded_forwards_are_clean(device: torch.device, mode: str, streams: str) -> None:
    model = tiny_stack()
    with streamed(model, device, mode=mode, streams=streams) as handle:
        with handle.record() as log:
            for sequence in ([0, 1, 2, 3], [3, 1], [0, 0, 2], [0, 1, 2, 3]):
                model.sequence = sequence
                _forward(model, device)
        assert len(log) > 0
        assert torch_offload.check(log) == []
        assert handle.check() == []


def test_edits_exceptions_and_replaced_weights_are_clean(device: torch.device) -> None:
    model = tiny_stack()
    with streamed(model, device, depth=10) as handle:
        with handle.record() as log:
            _forward(model, device)
            with torch.no_grad():
                model.blocks[0].attn.weight.mul_(2)
            _forward(model, device)
            model.blocks[1].attn.weight = nn.Parameter(torch.ones(16, 16), requires_grad=False)
            _forward(model, device)
            hook = model.blocks[2].mlp.register_forward_hook(raising(RuntimeError("in a layer")))
            with pytest.raises(RuntimeError, match="in a layer"):
                _forward(model, device)
            hook.remove()
            _forward(model, device)
        assert [op.kind for op in log.ops].count("host_write") == 1, "the replaced weight"
        assert handle.check() == []


def test_simulated_log_is_clean() -> None:
    units = [_C.Unit(f"unit{index}", 1024, index // 2, "mha") for index in range(4)]
    costs = _C.SimCosts(copy_bytes_per_second=1e9, compute_ns=[1000] * 4)
    plan = _C.make_plan(units)
    result = _C.simulate(plan, "pipeline", "split", costs, [[0, 1, 2, 3]] * 3)
    assert torch_offload.check(result.log) == []


def test_without_a_recorded_run_fails(device: torch.device) -> None:
    with (
        streamed(tiny_stack(), device) as handle,
        pytest.raises(StateError, match=r"with handle\.record\("),
    ):
        handle.check()


@pytest.mark.parametrize("race", _C.published_races(), ids=lambda race: race.id)
def test_published_race_is_caught_and_its_twin_passes(race: _C.PublishedRace) -> None:
    if race.python_test is not None:
        file, test = race.python_test.split("::")
        module = importlib.import_module(f"tests.python.{file.removesuffix('.py')}")
        assert callable(getattr(module, test))
        return
    device = _C.Device(torch.device("cpu"))
    is_caught, findings = _C.run_race(race, device, planted=True)
    assert is_caught
    for finding in findings:
        assert finding.message.endswith(".")
        assert finding.second_kind
        assert (finding.first is None) == (finding.first_kind is None)
    assert _C.run_race(race, device, planted=False) == (False, [])


def test_finding_names_both_ops_bytes_and_the_way_out() -> None:
    race = _C.published_races()[0]
    assert race.id == "H1"
    _, [finding] = _C.run_race(race, _C.Device(torch.device("cpu")), planted=True)
    assert finding.kind == "unordered"
    assert (finding.first_kind, finding.second_kind) == ("copy", "read")
    assert (finding.first_unit, finding.second_unit) == (0, 0)
    assert finding.memory[1] - finding.memory[0] == 256
    assert finding.first is not None
    assert f"op {finding.first} (copy of unit 0" in finding.message
    assert "let stream 'compute' wait for event" in finding.message


def test_what_is_no_log_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected an OpLog, got str; keep one"):
        torch_offload.check("log")  # type: ignore[arg-type]
