"""Records, profiles and descriptions of real forwards, and what they conclude."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import torch_offload
from tests.python.fake_log import MS, halves, pipeline_log, sync_log
from torch_offload import _C, Handle, StateError
from torch_offload.advice import Advice, advise
from torch_offload.attribution import attribute
from torch_offload.bounds import bound_of
from torch_offload.prediction import Scenario
from torch_offload.profile import Measured, Profile, profile_of, scenario_of, units_of
from torch_offload.profile_file import read_profile
from torch_offload.timeline import read_traces
from torch_offload.trace import trace_of


class Attention(nn.Module):
    """As far as weights go."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(torch.tanh(self.q_proj(x)))


class Mlp(nn.Module):
    """Up and down."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.relu(self.up_proj(x)))


class Block(nn.Module):
    """Attention and FFN."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(width), Mlp(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x + self.self_attn(x))


class Model(nn.Module):
    """Some blocks."""

    def __init__(self, layers: int = 6, width: int = 128) -> None:
        super().__init__()
        self.head = nn.Linear(width, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.head(x)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def model() -> nn.Module:
    return Model().eval()


@pytest.fixture
def inputs(device: torch.device) -> torch.Tensor:
    return torch.ones(4, 128, device=device)


@pytest.fixture
def handle(model: nn.Module, inputs: torch.Tensor, device: torch.device) -> Iterator[Handle]:
    with torch_offload.offload(model, device) as handle, torch.inference_mode():
        model(inputs)
        model(inputs)
        yield handle


# ---- record and timeline -----------------------------------------------------------------------


def test_record_keeps_every_call_of_the_block(
    handle: Handle, model: nn.Module, inputs: torch.Tensor
) -> None:
    before = handle.stats.onloads
    with handle.record() as log:
        model(inputs)
        model(inputs)
    kinds = [op.kind for op in log.ops]
    assert kinds.count("copy") == handle.stats.onloads - before == 24
    assert kinds.count("read") == kinds.count("read_end") == 24
    assert not log.has_times
    generations = {op.generation for op in log.ops if op.kind == "copy" and op.unit == 0}
    assert len(generations) == 2
    model(inputs)
    assert len(log) == len(kinds), "a call after the block was recorded"


def test_record_changes_no_bit(model: nn.Module, inputs: torch.Tensor) -> None:
    plain = torch_offload.align(copy.deepcopy(model).to(inputs.device))
    with torch.inference_mode(), torch_offload.offload(model, inputs.device) as handle:
        with handle.record(times=True):
            recorded = model(inputs)
        assert torch.equal(recorded, plain(inputs))


def test_timeline_of_a_real_run_has_every_copy_and_use(
    handle: Handle, model: nn.Module, inputs: torch.Tensor, tmp_path: Path
) -> None:
    with handle.record(times=True) as log:
        model(inputs)
    trace = handle.trace()
    kinds = [op.kind for op in log.ops]
    assert len(trace.of_kind("copy")) == kinds.count("copy") > 0
    assert [bar.label for bar in trace.of_kind("compute")] == [
        f"{half} {layer}" for layer in range(6) for half in ("MHA", "FFN")
    ]
    assert {arrow.wait_op for arrow in trace.arrows} <= {
        index for index, kind in enumerate(kinds) if kind == "wait"
    }
    handle.timeline(tmp_path / "t.json")
    assert read_traces(tmp_path / "t.json") == [trace]


def test_timeline_without_a_path_prints_to_the_width_of_the_console(
    handle: Handle, model: nn.Module, inputs: torch.Tensor
) -> None:
    with handle.record(times=True):
        model(inputs)
    console = Console(width=70, color_system=None)
    with console.capture() as capture:
        handle.timeline(console=console)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 70
    assert any(line.lstrip().startswith("weight_h2d") for line in lines)


def test_last_record_is_drawn_and_checked_after_remove(
    model: nn.Module, inputs: torch.Tensor, tmp_path: Path
) -> None:
    handle = torch_offload.offload(model, inputs.device)
    with torch.no_grad(), handle.record(times=True):
        model(inputs)
    before = handle.trace()
    handle.remove()
    assert handle.trace() == before
    assert "MHA 0" in before.unit_labels
    handle.timeline(tmp_path / "after.txt")
    assert "weight_h2d" in (tmp_path / "after.txt").read_text()
    assert handle.check() == []


@pytest.mark.parametrize(
    ("use", "line"),
    [
        (lambda handle: handle.timeline(), "with handle.record(times=True) as log:"),
        (lambda handle: handle.trace(), "with handle.record(times=True) as log:"),
        (lambda handle: handle._recorder.last("check()", times=False), "with handle.record() as"),
    ],
)
def test_what_reads_a_record_without_one_fails_and_shows_the_line(
    handle: Handle, use: Callable[[Handle], Any], line: str
) -> None:
    with pytest.raises(StateError) as caught:
        use(handle)
    assert line in str(caught.value)


def test_timeline_of_a_record_without_times_fails(
    handle: Handle, model: nn.Module, inputs: torch.Tensor
) -> None:
    with handle.record():
        model(inputs)
    with pytest.raises(StateError, match=r"got one without times.*times=True"):
        handle.timeline()


def test_timeline_inside_the_block_fails(handle: Handle) -> None:
    with (
        handle.record(times=True),
        pytest.raises(StateError, match="still being written"),
    ):
        handle.timeline()


def test_record_inside_a_record_fails_and_leaves_the_outer_one(
    handle: Handle, model: nn.Module, inputs: torch.Tensor
) -> None:
    with handle.record() as log:
        with pytest.raises(StateError, match=r"one record\(\) or profile\(\) at a time"):
            handle.profile().__enter__()
        model(inputs)
    assert len(log) > 0


def test_record_ends_with_an_exception_in_the_block(
    handle: Handle, model: nn.Module, inputs: torch.Tensor
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    hook = model.layers[5].mlp.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError), handle.record(times=True):
        model(inputs)
    hook.remove()
    assert len(handle.trace().of_kind("compute")) == 12
    with handle.record():
        model(inputs)


def test_record_around_a_remove_ends_well(model: nn.Module, inputs: torch.Tensor) -> None:
    handle = torch_offload.offload(model, inputs.device)
    with torch.no_grad(), handle.record(times=True) as log:
        model(inputs)
        handle.remove()
    assert len(log) > 0
    with pytest.raises(StateError), handle.record():
        pass


def test_record_in_a_forward_fails(handle: Handle, model: nn.Module, inputs: torch.Tensor) -> None:
    errors = []

    def record(*_: object) -> None:
        try:
            with handle.record():
                pass
        except StateError as error:
            errors.append(error)

    model.layers[1].mlp.register_forward_hook(record)
    model(inputs)
    assert len(errors) == 1
    with handle.record() as log:
        model(inputs)
    assert len(errors) == 2
    assert [op.kind for op in log.ops].count("read") == 12


# ---- profile -----------------------------------------------------------------------------------


def test_profile_attributes_the_wall_time_within_two_per_cent(
    handle: Handle, model: nn.Module, inputs: torch.Tensor
) -> None:
    begin = time.perf_counter()
    with handle.profile() as p:
        for _ in range(20):
            model(inputs)
    wall_ns = (time.perf_counter() - begin) * 1e9
    found = p.result
    units_ns = sum(unit.times.compute_ns + unit.times.stall_ns for unit in found.units)
    attributed_ns = units_ns + found.total.between_ns + found.total.outside_ns
    assert attributed_ns == pytest.approx(found.measured.wall_ns, rel=0.02)
    assert found.measured.wall_ns <= wall_ns
    assert found.attributed_share == pytest.approx(1, abs=0.02)
    assert found.measured.forwards == 20


def test_profile_has_every_unit_with_its_copies_and_uses(
    handle: Handle, model: nn.Module, inputs: torch.Tensor
) -> None:
    before = handle.stats
    with handle.profile() as p:
        model(inputs)
        model(inputs)
    found, after = p.result, handle.stats
    assert [unit.name for unit in found.units] == [unit.name for unit in handle.units]
    assert [unit.times.uses for unit in found.units] == [2] * 12
    assert sum(unit.times.copies for unit in found.units) == after.onloads - before.onloads
    assert found.streamed_bytes == after.bytes_onloaded - before.bytes_onloaded
    assert all(unit.times.compute_ns > 0 for unit in found.units)
    assert found.sequence == tuple(range(12))
    assert 0 < found.measured.cpu_ns < found.measured.wall_ns
    assert found.link_bytes_per_second > 0
    assert 0 < found.roofline_share <= 1


def test_profile_prints_and_saves_what_it_found(
    handle: Handle, model: nn.Module, inputs: torch.Tensor, tmp_path: Path
) -> None:
    with handle.profile() as p:
        model(inputs)
    console = Console(width=90, color_system=None)
    with console.capture() as capture:
        console.print(p)
    text = capture.get()
    assert " ".join(p.sentence.split()) in " ".join(text.split())
    for words in ("wall time", "copy engine idle", "of the roofline", "layers.2.mlp"):
        assert words in text
    p.save(tmp_path / "p.json")
    assert read_profile(tmp_path / "p.json") == p.result
    assert p.trace.of_kind("compute")


def test_profile_of_a_budget_knows_what_is_resident(inputs: torch.Tensor) -> None:
    model = Model().eval()
    with torch_offload.offload(model, inputs.device, gpu_budget=2_000_000) as handle:
        with torch.inference_mode():
            model(inputs)
            with handle.profile() as p:
                model(inputs)
        residents = [unit.place is None for unit in handle.units]
    assert any(residents)
    assert not all(residents)
    assert [unit.is_resident for unit in p.result.units] == residents
    assert [unit.times.uses for unit in p.result.units] == [0 if r else 1 for r in residents]


def test_profile_read_too_early_or_of_nothing_fails(handle: Handle) -> None:
    with handle.profile() as p, pytest.raises(StateError, match="read p after the block"):
        _ = p.sentence
    with pytest.raises(StateError, match="at least one forward"):
        _ = p.result


def test_profile_of_leaves_while_they_are_cut_fails_then_works(
    model: nn.Module, inputs: torch.Tensor
) -> None:
    with (
        torch_offload.offload(model, inputs.device, granularity="module") as handle,
        torch.no_grad(),
    ):
        with pytest.raises(StateError, match="cut anew"), handle.profile():
            model(inputs)
        with handle.profile() as p:
            model(inputs)
        assert len(p.result.units) == 24


def recorded(handle: Handle, work: Callable[[], object]) -> _C.OpLog:
    with handle.record(times=True) as log:
        work()
    return log


def test_record_of_leaves_while_they_are_cut_says_that_the_log_ends_there(
    model: nn.Module, inputs: torch.Tensor
) -> None:
    leaves = torch_offload.offload(model, inputs.device, granularity="module")
    with leaves as handle, torch.no_grad():
        with pytest.warns(UserWarning, match="cut anew"):
            log = recorded(handle, lambda: (model(inputs), model(inputs)))
        assert list(log.unit_names) != [unit.name for unit in handle.units]
        assert len(handle.trace().of_kind("compute")) == 12
        assert handle.describe(0).uses_ms == ()


def test_no_timing_outside_the_block(
    handle: Handle, model: nn.Module, inputs: torch.Tensor
) -> None:
    with handle.profile() as p:
        model(inputs)
    ops = len(p.trace.bars)
    model(inputs)
    assert len(p.trace.bars) == ops
    assert not handle._recorder._is_open


# ---- what it concludes -------------------------------------------------------------------------


def measured(mode: str = "pipeline", free_bytes: int = 0, **changes: Any) -> Measured:
    fields: dict[str, Any] = {
        "device": "a test",
        "mode": mode,
        "streams": "shared",
        "forwards": 1,
        "begin_ns": 0,
        "end_ns": 0,
        "cpu_ns": 1000,
        "depth_bytes": 2 * 2**20,
        "window_bytes": 4 * 2**20,
        "resident_bytes": 0,
        "outside_bytes": 0,
        "free_bytes": free_bytes,
    }
    return Measured(**{**fields, **changes})


def profile_from(log: Any, layers: int, **changes: Any) -> Profile:
    units = [_C.Unit(u.name, u.size_bytes, u.layer_index, u.kind) for u in halves(layers)]
    trace = trace_of(log, units=units)
    end_ns = trace.origin_ns + trace.end_ns
    facts = measured(begin_ns=trace.origin_ns, end_ns=end_ns, **changes)
    return profile_of(trace, _C.make_plan(units), facts)


def test_sync_is_told_to_copy_ahead() -> None:
    found = profile_from(sync_log(8), 8, mode="sync")
    assert found.bound.by == "order"
    assert found.advice.options == "mode='pipeline'"
    assert found.advice.saving_share == pytest.approx(1 - 178.36 / 198.64, abs=0.02)
    assert found.sentence.startswith("bound by the order of copies: compute waits 10 % of the time")
    assert found.sentence.endswith("copying ahead would save 10 %: mode='pipeline'")


def test_compute_bound_pipeline_is_told_that_nothing_would_help() -> None:
    found = profile_from(pipeline_log(8), 8)
    assert found.bound.by == "compute"
    assert found.advice.options == ""
    assert "nothing of ours would help" in found.sentence


def link_bound_scenario() -> Scenario:
    """16 units of 1 GiB, copied in 20 ms and computed in 5 ms each."""
    units = [_C.Unit(f"layers.{i}.mlp", 2**30, i, "ffn") for i in range(16)]
    rate = 2**30 / 0.020
    return Scenario(units, [5 * MS] * 16, rate, copy_ns=[20 * MS] * 16, outside_bytes=2**30)


def link_bound() -> Any:
    from torch_offload.prediction import predict

    return predict(link_bound_scenario()).bound


def test_link_bound_run_with_free_memory_is_told_a_budget_that_holds() -> None:
    from torch_offload.prediction import predicted_ms

    now = link_bound_scenario()
    found = advise(link_bound(), now, free_bytes=8 * 2**30, predict=predicted_ms)
    assert found.options.startswith("gpu_budget='")
    budget = int(found.options.removeprefix("gpu_budget='").removesuffix("GiB'"))
    then_ms, then_bytes = predicted_ms(now.with_(budget_bytes=budget * 2**30 - now.outside_bytes))
    now_ms, now_bytes = predicted_ms(now)
    assert then_bytes <= now_bytes + 0.9 * 8 * 2**30
    assert found.saving_share == pytest.approx(1 - then_ms / now_ms)
    assert "GiB of free device memory would save" in found.sentence


def test_link_bound_run_without_free_memory_is_told_of_larger_batches() -> None:
    from torch_offload.prediction import predicted_ms

    found = advise(link_bound(), link_bound_scenario(), free_bytes=0, predict=predicted_ms)
    assert found == Advice(
        "", 0.0, "about 4.0 times as many tokens in a forward would take no longer"
    )


def test_bounds_of_an_empty_run_say_so() -> None:
    log = pipeline_log(1)
    trace = trace_of(log).between(400 * MS, 500 * MS)
    assert bound_of(attribute(trace)).by == "nothing"


def test_scenario_of_a_profile_runs_as_long_as_the_profile_did() -> None:
    from torch_offload.prediction import predicted_ms

    for log, mode in ((sync_log(8), "sync"), (pipeline_log(8), "pipeline")):
        found = profile_from(log, 8, mode=mode)
        then_ms, _ = predicted_ms(scenario_of(found, units_of(found)))
        cold_ms = 6.74 if mode == "pipeline" else 0  # the simulated one is in its steady state
        assert then_ms == pytest.approx(found.measured.wall_ns / 1e6 - cold_ms, rel=0.005)


@pytest.mark.parametrize(
    "damage",
    [
        lambda document: document.clear(),
        lambda document: document.update(format="torch_offload profile 0"),
        lambda document: document.update(units=[]),
        lambda document: document.update(sequence=[99]),
        lambda document: document.update(link_bytes_per_second="fast"),
        lambda document: document["measured"].update(mode="quick"),
        lambda document: document["measured"].update(begin_ns=1.5),
        lambda document: document["units"][0].update(size_bytes=-1),
        lambda document: document["units"][0]["times"].pop("uses"),
        lambda document: document["total"].update(hidden_share=float("nan")),
        lambda document: document["bound"].update(by="magic"),
    ],
)
def test_file_that_is_no_profile_fails(tmp_path: Path, damage: Callable[[Any], Any]) -> None:
    path = tmp_path / "p.json"
    profile_from(pipeline_log(2), 2).save(path)
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"expected a profile .*p\.json"):
        read_profile(path)


# ---- describe ----------------------------------------------------------------------------------


def test_describe_says_where_a_unit_lives_and_who_shares_its_place(
    handle: Handle, model: nn.Module, inputs: torch.Tensor
) -> None:
    found = handle.describe("layers.1.mlp")
    unit = next(unit for unit in handle.units if unit.name == "layers.1.mlp")
    assert found.unit == unit
    begin, end = unit.place or (0, 0)
    assert f"bytes {begin:,} to {end:,} of the window" in str(found)
    expected = {
        other.name
        for other in handle.units
        if other.place
        and other.name != unit.name
        and other.place[0] < end
        and begin < other.place[1]
    }
    assert set(found.overlaps) == expected
    assert "recorded run" not in str(found)
    with handle.record(times=True):
        model(inputs)
    assert len(handle.describe(unit.name).uses_ms) == 1
    assert "used in the recorded run" in str(handle.describe(unit.name))


def test_describe_finds_units_by_position_and_by_the_end_of_their_name(handle: Handle) -> None:
    assert handle.describe(0).unit == handle.describe("0.self_attn").unit == handle.units[0]


@pytest.mark.parametrize(
    ("unit", "kind", "message"),
    [
        ("nothing", ValueError, "of which there are none"),
        ("mlp", ValueError, "several that end in it"),
        (99, IndexError, "from 0 to 11, got 99"),
    ],
)
def test_describe_of_no_unit_fails(
    handle: Handle, unit: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        handle.describe(unit)
