"""`torch-offload plan` through its real entry point, and what it works out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from torch_offload.cli import BAD_ANSWER, BAD_INPUT, main
from torch_offload.needs import CONTEXT_BYTES, needs_of
from torch_offload.plan_report import knee_of
from torch_offload.sizes import parse_size
from torch_offload.workload import Workload

GIB = 2**30
LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}
SMALL = LLAMA_70B | {"num_hidden_layers": 6, "vocab_size": 32000}

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["plan", *map(str, arguments)])
        out, error = capsys.readouterr()
        return status, out, error

    return run


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return tmp_path


def report_of(call: Call, *arguments: object) -> dict[str, Any]:
    status, out, error = call(*arguments, "--json", "-")
    assert status == 0, error
    document: dict[str, Any] = json.loads(out)
    return document


def test_seventy_billion_parameters_within_4_gib(call: Call, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    report = report_of(call, tmp_path, "--gpu-budget", "4GiB")
    assert report["fits"]
    assert report["device_bytes"] <= 4 * GIB
    head = 128256 * 8192 * 2
    assert head <= report["least_budget_bytes"] <= head + 16 * 2**20, "and small change"
    assert report["gathered_bytes"] == head
    streamed = report["host_bytes"] - report["gathered_bytes"]
    assert report["token_ms"] == pytest.approx(streamed / 55.2e9 * 1e3, rel=0.01)
    # Of many layers the curve is fine: each step down is one for a token and for a prompt.
    for before, after in pairwise(report["curve"]):
        assert after["token_ms"] <= before["token_ms"] * 1.01
        assert after["prompt_ms"] <= before["prompt_ms"] * 1.01


def test_curve_goes_from_the_least_to_everything_resident(call: Call, small: Path) -> None:
    report = report_of(call, small, "--gpu-budget", "6GiB", "--batch", 8, "--tokens", 2048)
    curve = report["curve"]
    assert len(curve) == 13
    assert curve[0]["budget_bytes"] == report["least_budget_bytes"]
    assert all(point["device_bytes"] <= point["budget_bytes"] for point in curve)
    assert curve[-1]["host_bytes"] == 0
    assert curve[-1]["window_bytes"] == 0
    assert curve[-1]["device_bytes"] >= report["weights_bytes"]


def test_table_and_picture(call: Call, small: Path) -> None:
    picture = small / "plan.png"
    status, out, error = call(small, "--gpu-budget", "6GiB", "--out", picture)
    assert status == 0, error
    for words in ("fits", "least budget", "host memory", "tokens per second", "a prompt"):
        assert words in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_leaves_need_what_halves_need(small: Path) -> None:
    """A model runs by its halves until a pass has shown its leaves."""
    from torch_offload.plan_report import Planner, PlanOptions

    halves, leaves, auto = (
        Planner(PlanOptions(model=str(small), granularity=granularity))
        for granularity in ("sublayer", "module", "auto")
    )
    assert halves.least_bytes == leaves.least_bytes == auto.least_bytes
    for planner in (leaves, auto):
        with pytest.raises(ValueError, match=f"gpu_budget of at least {planner.least_bytes} bytes"):
            planner.fit(planner.least_bytes - 1)
        assert planner.fit(planner.least_bytes).planned.device_bytes <= planner.least_bytes
    assert leaves.fit(leaves.least_bytes).planned.granularity == "module"


def test_picture_shows_every_byte_of_the_plan(small: Path) -> None:
    from torch_offload.plan_report import Planner, PlanOptions
    from torch_offload.timeline.plan_chart import plan_chart_of

    planner = Planner(PlanOptions(model=str(small), gpu_budget="4GiB"))
    report = planner.report([planner.fit(budget) for budget in planner.budgets()])
    homes, units, curve = plan_chart_of(report).axes
    drawn = sum(bar.get_width() for bar in homes.patches) * GIB
    assert drawn == pytest.approx(report.fit.planned.device_bytes + report.fit.host_bytes)
    assert len(units.patches) == len(report.fit.planned.plan.units)
    assert len(curve.lines[0].get_xdata()) == len(report.curve)


def test_whole_device_leaves_room_for_cache_and_activations(call: Call, small: Path) -> None:
    common = (small, "--gpu-memory", "12GiB")
    little = report_of(call, *common, "--batch", 1, "--tokens", 128)
    much = report_of(call, *common, "--batch", 8, "--tokens", 2048)
    for report in (little, much):
        needs = report["needs"]
        assert needs["context_bytes"] == CONTEXT_BYTES
        assert report["budget_bytes"] == 12 * GIB - sum(needs.values())
    # Keys and values: 2 * layers * 8 heads * 128 * 2 bytes for each token.
    assert much["needs"]["cache_bytes"] == 2 * 6 * 8 * 128 * 2 * 8 * 2048
    assert much["budget_bytes"] < little["budget_bytes"]


def test_impossible_budget_is_refused_with_the_least_that_works(call: Call, small: Path) -> None:
    status, _, error = call(small, "--gpu-budget", "100MiB")
    assert status == BAD_INPUT
    least = re.search(r"at least (\d+) bytes", error)
    assert least is not None, error
    assert call(small, "--gpu-budget", least[1])[0] == 0
    assert call(small, "--gpu-budget", int(least[1]) - 1)[0] == BAD_INPUT


def test_impossible_device_is_refused_with_the_least_that_works(call: Call, small: Path) -> None:
    status, _, error = call(small, "--gpu-memory", "1GiB")
    assert status == BAD_INPUT
    least = re.search(r"at least ([\d.]+ GiB)", error)
    assert least is not None, error
    assert call(small, "--gpu-memory", parse_size(least[1], "least") + 2**25)[0] == 0


def test_host_with_too_little_memory_does_not_fit(call: Call, small: Path) -> None:
    assert call(small, "--gpu-budget", "6GiB", "--host-memory", "64GiB")[0] == 0
    status, out, _ = call(small, "--gpu-budget", "6GiB", "--host-memory", "1GiB")
    assert status == BAD_ANSWER
    assert "does not fit the host" in out


def test_slower_link_and_granularity_count(call: Call, small: Path) -> None:
    fast = report_of(call, small, "--gpu-budget", "3GiB")
    slow = report_of(call, small, "--gpu-budget", "3GiB", "--link", "25GB/s")
    assert slow["token_ms"] > 2 * fast["token_ms"]
    auto = report_of(call, small, "--gpu-budget", "3GiB", "--granularity", "auto")
    leaves = report_of(call, small, "--gpu-budget", "3GiB", "--granularity", "module")
    assert auto["granularity"] in ("sublayer", "module")
    assert auto["token_ms"] <= min(fast["token_ms"], leaves["token_ms"]) * 1.01


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "got neither"),
        (("--gpu-budget", "4GiB", "--gpu-memory", "8GiB"), "got both"),
        (("--gpu-budget", "4 apples"), "gpu_budget"),
        (("--gpu-budget", "4GiB", "--gpu", "abacus"), "--gpu to be one of"),
        (("--gpu-budget", "4GiB", "--gpu", "a100"), "--link 25GB/s"),
        (("--gpu-budget", "4GiB", "--batch", "0"), "--batch between 1 and"),
        (("--gpu-budget", "4GiB", "--granularity", "dust"), "granularity to be one of"),
        (("--gpu-budget", "4GiB", "--out", "plan.txt"), "--out as a picture"),
    ],
)
def test_bad_input_is_one_line(
    call: Call, small: Path, arguments: tuple[str, ...], words: str
) -> None:
    status, _, error = call(small, *arguments)
    assert status == BAD_INPUT
    assert words in error
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("torch-offload")]) == 1


def test_model_that_is_nowhere_is_refused(call: Call, tmp_path: Path) -> None:
    for name in (tmp_path / "nothing", "some/model-that-nobody-has", "a name\nof two lines"):
        status, _, error = call(name, "--gpu-budget", "4GiB")
        assert status == BAD_INPUT
        assert "nothing is downloaded" in error


def test_hub_name_in_the_local_cache_is_found(
    call: Call, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def cached(name: str, file: str) -> str | None:
        return str(small / file) if name == "meta-llama/small" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert report_of(call, "meta-llama/small", "--gpu-budget", "6GiB")["fits"]


def test_no_weights_are_built(call: Call, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_offload import plan_report

    build = plan_report.build_on_meta
    built: list[nn.Module] = []
    monkeypatch.setattr(
        plan_report, "build_on_meta", lambda config: built.append(build(config)) or built[-1]
    )
    report_of(call, small, "--gpu-budget", "6GiB")
    assert all(parameter.is_meta for model in built for parameter in model.parameters())


def test_knee_lies_where_the_curve_bends() -> None:
    assert knee_of([(0, 100.0), (1, 50.0), (2, 10.0), (3, 9.0), (4, 8.0)]) == 2
    assert knee_of([(0, 100.0), (1, 75.0), (2, 50.0), (3, 25.0), (4, 0.0)]) is None
    assert knee_of([(0, 1.0), (1, 1.0), (2, 1.0)]) is None
    assert knee_of([]) is None


def test_needs_of_models_with_other_names_are_reckoned() -> None:
    from transformers import GPT2Config

    needs = needs_of(GPT2Config(), Workload(batch=2, tokens=10, context=10), 4)
    assert needs.cache == 2 * 12 * 12 * 64 * 4 * 2 * 10
    assert needs.activations > 20 * (8 + 12) * 768 * 4


def test_packed_units_are_faster_within_the_same_budget(call: Call, small: Path) -> None:
    raw = report_of(call, small, "--gpu-budget", "6GiB")
    auto = report_of(call, small, "--gpu-budget", "6GiB", "--transport", "auto")
    assert auto["device_bytes"] <= 6 * GIB
    assert auto["token_ms"] < raw["token_ms"]
    assert raw["transports"].keys() <= {"resident", "raw"}
    assert auto["transports"].keys() - {"resident", "raw"}
    held = ("window_bytes", "resident_bytes", "packed_resident_bytes", "staging_bytes")
    assert auto["device_bytes"] == auto["outside_bytes"] + sum(auto[name] for name in held)
    # Each says what the other would come to.
    for one, other, name in ((raw, auto, "auto"), (auto, raw, "raw")):
        assert one["other_transport"]["transport"] == name
        assert one["other_transport"]["token_ms"] == other["token_ms"]


def test_slow_decoder_packs_nothing(call: Call, small: Path) -> None:
    auto = report_of(
        call, small, "--gpu-budget", "4GiB", "--transport", "auto", "--decode-rate", "20GB/s"
    )
    assert auto["transports"].keys() <= {"resident", "raw"}
    assert auto["other_transport"] is None


def test_packed_plan_says_where_its_rates_are_from(call: Call, small: Path) -> None:
    arguments = (small, "--gpu-budget", "6GiB", "--transport", "packed")
    status, out, _ = call(*arguments)
    assert status == 0
    assert "codec.json" in out
    assert "staging ring" in out or "resident units, packed" in out
    assert "with --transport raw" in out
    assert "as stated" in call(*arguments, "--decode-rate", "900GB/s")[1]


def test_packed_masters_take_what_is_packed_and_nothing_else(call: Call, small: Path) -> None:
    arguments = (small, "--gpu-budget", "6GiB", "--transport", "auto")
    plain = report_of(call, *arguments)
    packed = report_of(call, *arguments, "--masters", "packed")
    assert packed["device_bytes"] <= 6 * GIB
    assert "raw" not in packed["transports"]
    weights = packed["weights_bytes"] - packed["outside_bytes"] - packed["gathered_bytes"]
    share = (packed["host_bytes"] - packed["gathered_bytes"]) / weights
    assert 0.69 < share < 0.72
    assert plain["host_bytes"] > weights
    assert packed["other_transport"]["host_bytes"] == plain["other_transport"]["host_bytes"]
    status, out, _ = call(*arguments, "--masters", "packed")
    assert status == 0
    assert "masters are packed" in out


def test_packed_picture_shows_every_byte(small: Path) -> None:
    from torch_offload.plan_report import Planner, PlanOptions
    from torch_offload.timeline.plan_chart import plan_chart_of

    planner = Planner(PlanOptions(model=str(small), gpu_budget="7GiB", transport="packed"))
    report = planner.report(())
    homes, *_ = plan_chart_of(report).axes
    drawn = sum(bar.get_width() for bar in homes.patches) * GIB
    assert drawn == pytest.approx(report.fit.planned.device_bytes + report.fit.host_bytes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--transport", "zip"), "transport to be one of"),
        (("--decode-rate", "fast"), "--decode-rate as a rate"),
        (("--masters", "packed"), "with masters='packed', got 'raw'"),
        (("--masters", "zip"), "masters to be one of"),
    ],
)
def test_bad_packing_option_is_one_line(
    call: Call, small: Path, arguments: tuple[str, ...], words: str
) -> None:
    status, _, error = call(small, "--gpu-budget", "4GiB", *arguments)
    assert status == BAD_INPUT
    assert words in error
