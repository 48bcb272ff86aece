"""The reference table, exact to 0.01 ms, and predictions for models that nobody loads."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.python.configs import LLAMA
from torch_offload import _C
from torch_offload.estimate import ModelRequest, estimate
from torch_offload.hardware import PEAKS
from torch_offload.prediction import Scenario, predict, predicted_ms
from torch_offload.rates import parse_byte_rate, parse_flop_rate
from torch_offload.reference import CallCosts, LayerTimes, published
from torch_offload.reference_table import ReferenceTable, reference_table
from torch_offload.simulate import MODES, run_layers
from torch_offload.sweep import AXES, scenarios_along, sweep_along
from torch_offload.timeline.chart import chart_of
from torch_offload.workload import Workload

# To 0.01 ms, and a hair for the last bit of a sum.
EXACT = 0.01 + 1e-9


@pytest.fixture(scope="module")
def table() -> ReferenceTable:
    return reference_table(LayerTimes(), layers=80, batch=100)


# ---- the reference table -----------------------------------------------------------------------


def test_published_figures_follow_from_the_formulas() -> None:
    found = published(LayerTimes(), layers=80, batch=100)
    assert found.events.layer_ms == pytest.approx(185.10, abs=EXACT)
    assert found.sync.layer_ms == pytest.approx(205.38, abs=EXACT)
    assert found.events.total_ms == pytest.approx(14_808.0, abs=EXACT)
    assert found.sync.total_ms == pytest.approx(16_430.4, abs=EXACT)
    assert round(found.events.tokens_per_second, 1) == 6.8
    assert round(found.sync.tokens_per_second, 1) == 6.1
    assert round(found.events.tokens_per_hour) == 24_311
    assert found.events.cpu_ms == pytest.approx(0.064, abs=1e-9)
    assert found.events.streams_at_once == 3
    assert round(100 * found.events.gpu_share) == 96
    assert round(100 * found.sync.gpu_share) == 87


@pytest.mark.parametrize(
    ("mode", "layer_ms", "total_ms"),
    [
        ("sync", 198.64, 15_891.2),
        ("streams", 198.64, 15_891.2),
        ("events", 185.10, 14_808.0),
        ("pipeline", 178.36, 14_275.54),
    ],
)
@pytest.mark.parametrize("streams", ["shared", "split"])
def test_our_figures_are_exact(mode: str, layer_ms: float, total_ms: float, streams: str) -> None:
    found = reference_table(LayerTimes(), 80, 100, streams).ours[mode]
    assert found.layer_ms == pytest.approx(layer_ms, abs=EXACT)
    assert found.total_ms == pytest.approx(total_ms, abs=EXACT)
    assert found.tokens_per_second == pytest.approx(100 / total_ms * 1e3)
    assert found.gpu_share == pytest.approx(178.36 / layer_ms, abs=1e-4)


def test_our_cpu_streams_and_hidden_copies(table: ReferenceTable) -> None:
    ours = table.ours
    assert [ours[mode].streams_at_once for mode in MODES] == [1, 1, 2, 2]
    assert [round(ours[mode].blocked_share, 3) for mode in MODES] == [1.0, 1.0, 0.0, 0.0]
    hidden = [ours[mode].hidden_share for mode in MODES]
    assert hidden == pytest.approx([0, 0, 13.54 / 20.28, 1], abs=1e-6)
    assert ours["sync"].cpu_ms == pytest.approx(198.64, abs=0.05)


@pytest.mark.parametrize("mode", ["events", "pipeline"])
def test_our_cpu_time_is_the_sum_of_our_calls(table: ReferenceTable, mode: str) -> None:
    run = run_layers(LayerTimes(), 80, mode=mode)
    kinds = [op.kind for op in run.result.log.ops]
    costs = CallCosts()
    calls_ms = (
        kinds.count("copy") * costs.copy_ms
        + kinds.count("record") * costs.record_ms
        + kinds.count("wait") * costs.wait_ms
        + kinds.count("read") * costs.launch_ms
    )
    assert table.ours[mode].cpu_ms == pytest.approx(calls_ms / 80, rel=1e-6)


def test_two_copy_engines_let_three_streams_work_at_once() -> None:
    times = LayerTimes(mha_h2d_ms=30, mha_compute_ms=100, ffn_h2d_ms=30, ffn_compute_ms=10)
    one, two = (
        run_layers(times, 8, mode="pipeline", streams="split", num_copy_engines=engines)
        for engines in (1, 2)
    )
    assert one.attribution(0).streams_at_once == 2
    assert two.attribution(0).streams_at_once == 3


def test_timeline_of_the_reference_is_a_pipeline_with_a_cold_first_copy() -> None:
    trace = run_layers(LayerTimes(), 3, mode="pipeline", ahead=0).trace()

    def times(kind: Any, label: str) -> tuple[float, float]:
        bar = next(bar for bar in trace.of_kind(kind) if bar.label == label)
        return bar.begin_ns / 1e6, bar.end_ns / 1e6

    assert times("copy", "MHA 0") == pytest.approx((0, 6.74), abs=EXACT)
    assert times("compute", "MHA 0") == pytest.approx((6.74, 159.16), abs=EXACT)
    assert times("copy", "FFN 0") == pytest.approx((6.74, 20.28), abs=EXACT)
    assert times("compute", "FFN 0") == pytest.approx((159.16, 185.10), abs=EXACT)
    assert times("copy", "MHA 1") == pytest.approx((159.16, 165.90), abs=EXACT)


def test_each_difference_to_the_published_has_its_note(table: ReferenceTable) -> None:
    notes = " ".join(table.notes())
    for figure in ("205.42", "16.43 s", "15.89 s", "24,480", "82 %", "0.011 ms", "178.36"):
        assert figure in notes, figure
    document = json.loads(json.dumps(table.to_json()))
    assert document["published"]["printed"]["sync layer_ms"] == "205.42 ms"


def test_table_fits_eighty_columns_and_points_to_every_note(table: ReferenceTable) -> None:
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(table)
    text = capture.get()
    assert max(map(len, text.splitlines())) <= 80
    head, _, _ = text.partition("[1] Published")
    assert "…" not in head
    marks = {mark for line in head.splitlines() for mark in line.partition("[")[2][:5]}
    assert {str(number) for number in range(1, len(table.notes()) + 1)} <= marks
    assert "185.10  205.38  198.64   198.64  185.10    178.36" in head


def test_notes_of_other_inputs_say_nothing_of_printed_figures() -> None:
    other = reference_table(LayerTimes(1, 2, 3, 4), layers=8, batch=1)
    assert "printed" not in " ".join(other.notes())
    assert other.to_json()["published"]["printed"] == {}
    assert other.ours["sync"].layer_ms == pytest.approx(10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mha_h2d_ms": -1.0}, "mha-h2d as a duration"),
        ({"ffn_compute_ms": float("nan")}, "ffn-compute as a duration"),
        ({"mha_compute_ms": 0.0, "ffn_compute_ms": 0.0}, "computes something"),
    ],
)
def test_durations_that_cannot_be_fail(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerTimes(**change)


@pytest.mark.parametrize(("layers", "batch"), [(0, 1), (1, 0), (10**9, 1)])
def test_numbers_that_cannot_be_fail(layers: int, batch: int) -> None:
    with pytest.raises(ValueError, match=r"between 1 and [12],000"):
        reference_table(LayerTimes(), layers, batch)


# ---- predictions -------------------------------------------------------------------------------

MIB = 2**20


def scenario(compute_ms: float, **changes: Any) -> Scenario:
    """Eight layers of two units of 10 MiB, copied at 10 MiB per ms."""
    units = [
        _C.Unit(f"layers.{layer}.{module}", 10 * MIB, layer, kind)
        for layer in range(8)
        for module, kind in (("self_attn", "mha"), ("mlp", "ffn"))
    ]
    compute_ns = [round(compute_ms * 1e6)] * 16
    return Scenario(units, compute_ns, link_bytes_per_second=10 * MIB * 1e3, **changes)


def test_prediction_is_the_roofline_and_names_the_longer_side() -> None:
    link, compute = predict(scenario(0.25)), predict(scenario(3))
    assert link.forward_ms == pytest.approx(16, abs=0.01)
    assert (link.bound.by, compute.bound.by) == ("link", "compute")
    assert link.bound.busy_share == pytest.approx(1, abs=0.01)
    assert compute.forward_ms == pytest.approx(48, abs=0.01)
    assert compute.cold_ms == pytest.approx(49, abs=0.01)
    assert link.streamed_bytes == 160 * MIB


def test_prediction_of_sync_is_the_sum_bound_by_order() -> None:
    found = predict(scenario(1, mode="sync"))
    assert found.forward_ms == pytest.approx(32, abs=0.01)
    assert found.bound.by == "order"


def test_budget_saves_the_copies_of_what_stays() -> None:
    plain, budgeted = scenario(0.25), scenario(0.25, budget_bytes=100 * MIB)
    found = predict(budgeted)
    assert found.plan.resident_bytes > 0
    assert found.device_bytes <= 100 * MIB
    assert found.forward_ms < 0.75 * predict(plain).forward_ms
    assert predicted_ms(budgeted) == (
        found.forward_ms,
        found.plan.window_bytes + found.plan.resident_bytes,
    )


def test_sweeps_cover_their_axes_and_agree_with_single_predictions() -> None:
    base = scenario(1)
    for axis in AXES:
        sweep = sweep_along(axis, scenarios_along(axis, base))
        assert len({point.label for point in sweep.points}) == len(sweep.points) >= 5
        for point in sweep.points:
            assert predict(point.prediction.scenario).forward_ms == point.prediction.forward_ms
        json.dumps(sweep.to_json())
    by_budget = sweep_along("budget", scenarios_along("budget", base))
    times = [point.prediction.forward_ms for point in by_budget.points]
    assert times[-1] == min(times)
    assert by_budget.points[-1].prediction.streamed_bytes == 0


def test_chart_has_a_panel_for_each_sweep_with_its_units() -> None:
    sweeps = [sweep_along(axis, scenarios_along(axis, scenario(1))) for axis in AXES]
    figure = chart_of(sweeps, "a model")
    depth, layout, budget = figure.axes
    assert depth.get_xlabel() == "layers ahead"
    assert budget.get_xlabel() == "GiB of device memory"
    assert layout.get_xlabel() == depth.get_ylabel() == "ms per forward"
    assert len(depth.lines) == 3
    assert len(layout.patches) == 7


# ---- from a config -----------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path


def test_model_of_llama_70b_shape_is_bound_by_the_link_at_one_token(config: Path) -> None:
    found = estimate(ModelRequest(model=config, gpu="h200", link="55.2GB/s"))
    assert found.prediction.streamed_bytes == pytest.approx(27.38e9, rel=0.01)
    assert found.prediction.forward_ms == pytest.approx(496, rel=0.01)
    assert found.prediction.bound.by == "link"
    assert found.tokens_per_second == pytest.approx(1 / 0.496, rel=0.01)


def test_model_of_llama_70b_shape_is_bound_by_compute_at_16384_tokens(config: Path) -> None:
    found = estimate(ModelRequest(model=config.parent, gpu="h200", batch=8, tokens=2048))
    assert found.prediction.bound.by == "compute"
    assert 700 < found.prediction.forward_ms < 900  # measured: 799 to 809
    assert found.tokens == 16384


def test_budget_of_a_model_counts_what_always_stays(config: Path) -> None:
    found = estimate(ModelRequest(model=config, gpu="h100", gpu_budget="12GiB"))
    assert found.prediction.device_bytes <= 12 * 2**30
    assert found.prediction.scenario.outside_bytes >= 2 * 2 * 8192 * 32000
    assert found.prediction.plan.resident_bytes > 0


def test_experts_count_as_far_as_tokens_choose_them(tmp_path: Path) -> None:
    mixtral = {
        "model_type": "mixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(mixtral))
    one, many = (estimate(ModelRequest(model=path, gpu="h100", batch=batch)) for batch in (1, 4096))
    ffn = next(i for i, u in enumerate(one.prediction.plan.units) if u.kind == "ffn")
    experts_bytes = one.prediction.plan.units[ffn].size_bytes
    read_ns = experts_bytes / (3.35e12 * 0.57) * 1e9
    assert one.prediction.scenario.compute_ns[ffn] == pytest.approx(read_ns / 4, rel=0.05)
    flop_ns = experts_bytes / 2 / 4 * 2 * 4096 / (989e12 * 0.57) * 1e9
    assert many.prediction.scenario.compute_ns[ffn] == pytest.approx(flop_ns, rel=0.05)


def test_packed_model_copies_seven_tenths_and_says_at_which_rates(config: Path) -> None:
    raw = estimate(ModelRequest(model=config, gpu="h200", link="55.2GB/s"))
    packed = estimate(
        ModelRequest(
            model=config,
            gpu="h200",
            link="55.2GB/s",
            transport="packed",
            decode_rate="1640GB/s",
        )
    )
    share = packed.prediction.streamed_bytes / raw.prediction.streamed_bytes
    assert 0.69 < share < 0.71
    assert packed.prediction.forward_ms == pytest.approx(
        share * raw.prediction.forward_ms, rel=0.01
    )
    assert packed.prediction.scenario.packable.decode_bytes_per_second == 1640e9
    assert any("decoder at 1,640 GB/s" in line or "1640" in line for line in packed.basis)
    shown = Console(width=200, record=True, file=io.StringIO())
    shown.print(packed)
    text = shown.export_text()
    assert "32 travel packed" in text
    assert "staging ring" in text


@pytest.mark.parametrize("transport", ["auto", "packed"])
def test_packed_model_within_a_budget_is_faster_and_within_it(config: Path, transport: str) -> None:
    asked = {"model": config, "gpu": "h200", "link": "55.2GB/s", "gpu_budget": "17GB"}
    raw = estimate(ModelRequest(**asked))
    packed = estimate(ModelRequest(**asked, transport=transport))
    assert packed.prediction.forward_ms < 0.6 * raw.prediction.forward_ms
    assert packed.prediction.device_bytes <= 17e9
    assert packed.prediction.packed_resident_bytes > 5e9
    document = packed.to_json()
    assert document["packed_resident_bytes"] == packed.prediction.packed_resident_bytes
    assert "packed_resident" in document["transports"]


def test_float32_model_is_simulated_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, "dtype": "float32", "num_hidden_layers": 2}))
    asked = {"model": path, "gpu": "h200", "link": "55.2GB/s"}
    raw, packed = (estimate(ModelRequest(**asked, transport=way)) for way in ("raw", "packed"))
    assert packed.prediction.forward_ms == raw.prediction.forward_ms
    assert set(packed.prediction.plan.transports) == {"raw"}


def test_sweep_over_budgets_of_a_packed_model_stays_within_each(config: Path) -> None:
    found = estimate(
        ModelRequest(
            model=config, gpu="h200", link="55.2GB/s", gpu_budget="12GB", transport="packed"
        )
    )
    points = scenarios_along("budget", found.prediction.scenario)
    swept = sweep_along("budget", points).points
    assert all(point.prediction.device_bytes <= point.position for point in swept)
    times = [point.prediction.forward_ms for point in swept]
    assert times[-1] < 0.2 * times[0]


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        ({"gpu": "h100", "transport": "zip"}, "transport to be one of"),
        ({"gpu": "h100", "transport": "packed_resident"}, "--transport raw, auto or packed"),
        ({"gpu": "h100", "decode_rate": "1TB/s"}, "--decode-rate beside --transport packed"),
        (
            {"gpu": "h100", "transport": "packed", "decode_rate": "fast"},
            "--decode-rate as a rate such as",
        ),
        (
            {"gpu": "h100", "transport": "packed", "gpu_budget": "3GB"},
            "the least window with a slot for packed copies",
        ),
        ({}, "compute times: --gpu h100"),
        ({"gpu": "abacus"}, "one of h100, h200"),
        ({"gpu": "a100"}, "as --link 25GB/s"),
        ({"gpu": "h100", "link": "fast"}, "--link as a rate such as '55GB/s'"),
        ({"peak": "9", "memory_rate": "1TB/s"}, "--peak as a rate such as '989TFLOP/s'"),
        ({"gpu": "h100", "efficiency": 2.0}, "efficiency above 0, at most 1"),
        ({"gpu": "h100", "gpu_budget": "1GiB"}, "--gpu-budget of at least"),
        ({"gpu": "h100", "batch": 0}, "--batch between 1 and"),
        ({"gpu": "h100", "tokens": 8, "context": 4}, "--context of at least the 8 tokens"),
        ({"gpu": "h100", "mode": "quick"}, "mode to be one of"),
        ({"gpu": "h100", "depth": "-1"}, "depth as a number"),
    ],
)
def test_request_that_cannot_be_fails(
    config: Path, request_of: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(ModelRequest(model=config, **request_of))


def test_rates_are_read_as_people_write_them() -> None:
    assert parse_byte_rate("55GB/s", "x") == 55e9
    assert parse_byte_rate(" 1.5 GiB/s ", "x") == 1.5 * 2**30
    assert parse_flop_rate("989 TFLOPS", "x") == parse_flop_rate("0.989PFLOP/s", "x") == 989e12
    for wrong in ("55GB", "0GB/s", "GB/s", "-1GB/s"):
        with pytest.raises(ValueError, match="as a rate"):
            parse_byte_rate(wrong, "x")


def test_workload_and_peaks_have_sane_limits() -> None:
    assert all(dataclasses.replace(peak, efficiency=1).flops > 1e14 for peak in PEAKS.values())
    with pytest.raises(ValueError, match="--tokens between"):
        Workload(batch=1, tokens=0, context=1)
