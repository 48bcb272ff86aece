"""Debug mode, logging and NVTX ranges on the host device."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python.test_profile import Model
from torch_offload import debugging


@pytest.fixture
def model() -> nn.Module:
    return Model().eval()


@pytest.fixture
def inputs(device: torch.device) -> torch.Tensor:
    return torch.ones(4, 128, device=device)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def debugged(model: nn.Module, inputs: torch.Tensor, **options: Any) -> torch_offload.Handle:
    return torch_offload.offload(model, inputs.device, debug=True, **options)


@pytest.mark.parametrize("mode", ["sync", "streams", "events", "pipeline"])
@pytest.mark.parametrize("granularity", ["sublayer", "module"])
def test_debugged_forwards_give_the_same_bits_without_a_warning(
    model: nn.Module, inputs: torch.Tensor, mode: Any, granularity: Any
) -> None:
    plain = torch_offload.align(copy.deepcopy(model).to(inputs.device))
    with debugged(model, inputs, mode=mode, granularity=granularity) as handle:
        for _ in range(3):
            assert torch.equal(model(inputs), plain(inputs))
        assert handle.stats.forwards == 3
        # Poisoned places are never hit: every use is copied anew.
        assert handle.stats.hits == 0
        assert all(unit.onloads >= unit.acquired > 0 for unit in handle.units)


def test_debug_waits_for_every_copy_and_every_use(model: nn.Module, inputs: torch.Tensor) -> None:
    with debugged(model, inputs) as handle:
        model(inputs)
        log = handle._recorder.last("a test", times=False)
    ops = log.ops
    copies = [index for index, op in enumerate(ops) if op.kind == "copy"]
    uses = [index for index, op in enumerate(ops) if op.kind == "read_end"]
    assert len(copies) >= 12
    assert len(uses) == 12
    for index in (*copies, *uses):
        behind = [op.kind for op in ops[index + 1 :] if op.stream == ops[index].stream]
        between = behind[: behind.index("synchronize")]
        assert set(between) <= {"record", "fill"}, "more was submitted before the wait"
    queried = [op for op in ops if op.kind == "query"]
    assert len(queried) == 12, "each ready event is asked once, before its unit is read"


def test_without_debug_nothing_waits_and_nothing_is_asked(
    model: nn.Module, inputs: torch.Tensor
) -> None:
    with torch_offload.offload(model, inputs.device) as handle:
        with handle.record() as log:
            model(inputs)
        assert not {op.kind for op in log.ops} & {"synchronize", "query", "fill"}


def test_debug_keeps_the_log_across_records_and_cuts(
    model: nn.Module, inputs: torch.Tensor
) -> None:
    with debugged(model, inputs, granularity="module") as handle:
        model(inputs)
        model(inputs)
        kept = handle._recorder.last("a test", times=False)
        length = len(kept)
        assert {op.kind for op in kept.ops} >= {"copy", "read", "fill", "synchronize"}
        with handle.record(times=True) as log:
            model(inputs)
        assert len(kept) == length
        assert len(log) > 0
        model(inputs)
        assert len(kept) > length


def test_environment_switches_debugging_on(
    model: nn.Module, inputs: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_OFFLOAD_DEBUG", "1")
    with torch_offload.offload(model, inputs.device) as handle:
        assert handle.config.debug
    monkeypatch.setenv("TORCH_OFFLOAD_DEBUG", "0")
    with torch_offload.offload(model, inputs.device) as handle:
        assert not handle.config.debug


def test_logger_tells_of_offload_and_remove(
    model: nn.Module, inputs: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "torch_offload"), debugged(model, inputs):
        pass
    assert {record.name for record in caplog.records} == {"torch_offload"}
    said = [record.getMessage() for record in caplog.records]
    assert any(text.startswith("offloaded: <torch_offload.Handle of Model") for text in said)
    assert any("debugging: every copy" in text for text in said)
    assert "removed: the plain model is back" in said


def test_blocking_launches_are_reported_where_there_are_launches(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    debugging.report_environment(torch.device("cuda", 0), debug=False)
    debugging.report_environment(torch.device("cpu"), debug=False)
    (record,) = caplog.records
    assert "CUDA_LAUNCH_BLOCKING=1" in record.getMessage()


# ---- NVTX --------------------------------------------------------------------------------------


class Ranges:
    """Stands in for torch.cuda.nvtx: notes what was open when."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open: list[str] = []
        self.all: list[str] = []
        monkeypatch.setattr(torch.cuda.nvtx, "range_push", self._push)
        monkeypatch.setattr(torch.cuda.nvtx, "range_pop", self._pop)

    def _push(self, name: str) -> None:
        self.open.append(name)
        self.all.append(name)

    def _pop(self) -> None:
        self.open.pop()


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> Ranges:
    return Ranges(monkeypatch)


def test_nvtx_ranges_surround_the_steps_of_each_unit(
    model: nn.Module, inputs: torch.Tensor, ranges: Ranges
) -> None:
    plain = torch_offload.align(copy.deepcopy(model).to(inputs.device))
    inside: list[list[str]] = []
    with torch_offload.offload(model, inputs.device, nvtx=True) as handle:
        model.layers[0].mlp.up_proj.register_forward_hook(
            lambda *_: inside.append(list(ranges.open))
        )
        assert torch.equal(model(inputs), plain(inputs))
        names = [unit.name for unit in handle.units]
    steps = [f"{step} {name}" for name in names for step in ("acquire", "compute", "release")]
    assert ranges.all == steps
    assert inside == [["compute layers.0.mlp"]]
    assert ranges.open == []


def test_nvtx_ranges_close_behind_an_exception(
    model: nn.Module, inputs: torch.Tensor, ranges: Ranges
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with torch_offload.offload(model, inputs.device, nvtx=True):
        hook = model.layers[2].mlp.register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(inputs)
        assert ranges.open == []
        hook.remove()
        model(inputs)
    assert ranges.open == []


def test_nvtx_is_off_unless_asked_for(
    model: nn.Module, inputs: torch.Tensor, ranges: Ranges
) -> None:
    with torch_offload.offload(model, inputs.device):
        model(inputs)
    assert ranges.all == []


def test_real_ranges_are_harmless_without_a_profiler(
    model: nn.Module, inputs: torch.Tensor
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        must = torch_offload.align(copy.deepcopy(model)).to(inputs.device)(inputs)
        with torch_offload.offload(model, inputs.device, nvtx=True) as handle:
            assert torch.equal(model(inputs), must)
            assert handle.stats.onloads > 0
