"""The command line through its real entry point: good input, bad input, exit status."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_offload
from tests.python.fake_log import pipeline_log
from tests.python.test_profile import profile_from
from tests.python.trace_event_format import faults_of
from torch_offload.cli import BAD_ANSWER, BAD_INPUT, INTERRUPTED, NOT_HERE, main

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    "demo",
    "bench",
    "plan",
    "simulate",
    "timeline",
    "compare",
    "doctor",
    "selfcheck",
)

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "dtype": "float32",
}


class Result:
    """What one call of the command did."""

    def __init__(self, status: int, out: str, error: str) -> None:
        self.status, self.out, self.error = status, out, error

    @property
    def said(self) -> str:
        """The one line of an error."""
        assert "Traceback" not in self.error
        lines = self.error.strip().splitlines()
        assert len(lines) == 1, self.error
        assert lines[0].startswith("torch-offload: ")
        return lines[0]


Call = Callable[..., Result]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Calls the entry point as the installed command does, in this process."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("TORCH_OFFLOAD_DEBUG", raising=False)

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        out, error = capsys.readouterr()
        return Result(status, out, error)

    return run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path


def in_a_process(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


# ---- the entry point ---------------------------------------------------------------------------


def test_installed_command_is_the_entry_point() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["torch-offload"].partition(":")
    assert getattr(importlib.import_module(module), function) is torch_offload.cli.run


def test_every_package_is_named_in_the_project_file() -> None:
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        str(path.parent.relative_to(ROOT)).replace("/", ".")
        for path in (ROOT / "torch_offload").rglob("__init__.py")
    }
    assert set(named) == found


def test_module_runs_as_the_command_does(tmp_path: Path) -> None:
    result = in_a_process("-m", "torch_offload", "simulate", "--json", "-", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["ours"]["pipeline"]["layer_ms"] == pytest.approx(178.36, abs=0.01)


def test_module_with_bad_input_says_one_line(tmp_path: Path) -> None:
    result = in_a_process("-m", "torch_offload", "simulate", "--model", "nowhere", cwd=tmp_path)
    assert result.returncode == BAD_INPUT
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1


def test_import_brings_neither_matplotlib_nor_typer() -> None:
    code = (
        "import sys, torch_offload; "
        "print(sorted({'matplotlib', 'typer', 'transformers'} & set(sys.modules)))"
    )
    result = in_a_process("-c", code)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_an_example(call: Call, command: str) -> None:
    result = call(command, "--help")
    assert result.status == 0
    assert f"Example: torch-offload {command}" in " ".join(result.out.split())


def test_help_lists_every_command(call: Call) -> None:
    for arguments in (("--help",), ()):
        result = call(*arguments)
        assert result.status == 0
        for command in COMMANDS:
            assert re.search(rf"^  {command} ", result.out, re.MULTILINE), command


def test_version_is_the_package_version(call: Call) -> None:
    assert call("--version").out.strip() == torch_offload.__version__


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sing",), "No such command 'sing'"),
        (("simulate", "--sing"), "No such option: --sing"),
        (("simulate", "--layers", "many"), "--layers"),
        (("compare",), "MODEL"),
    ],
)
def test_bad_usage_is_one_line(call: Call, arguments: tuple[str, ...], words: str) -> None:
    result = call(*arguments)
    assert result.status == BAD_INPUT
    assert words in result.said


def test_unforeseen_error_is_one_line_and_says_how_to_see_more(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the moon\nis full")

    monkeypatch.setattr("torch_offload.reference_table.reference_table", fail)
    result = call("simulate")
    assert result.status == BAD_ANSWER
    assert "RuntimeError: the moon is full; TORCH_OFFLOAD_DEBUG=1" in result.said
    monkeypatch.setenv("TORCH_OFFLOAD_DEBUG", "1")
    with pytest.raises(RuntimeError, match="moon"):
        call("simulate")


def test_interrupt_has_the_status_of_one(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torch_offload.reference_table.reference_table", interrupt)
    assert call("simulate").status == INTERRUPTED


def test_reader_that_has_enough_gets_no_traceback() -> None:
    command = f"{sys.executable} -m torch_offload timeline --layers 40 | head -1"
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stdout.startswith("pipeline")
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr


# ---- simulate ----------------------------------------------------------------------------------


def test_simulate_prints_both_tables_with_notes(call: Call) -> None:
    result = call(
        *("simulate", "--mha-h2d", 6.74, "--mha-compute", 152.42, "--ffn-h2d", 13.54),
        *("--ffn-compute", 25.94, "--layers", 80, "--batch", 100),
    )
    assert result.status == 0
    for figure in ("185.10", "205.38", "198.64", "178.36", "15.89", "14.28", "24,311", "24,480"):
        assert figure in result.out


def test_simulate_writes_json_beside_the_table(call: Call, tmp_path: Path) -> None:
    result = call("simulate", "--layers", 8, "--json", tmp_path / "r.json")
    assert "events" in result.out
    assert json.loads((tmp_path / "r.json").read_text())["inputs"]["layers"] == 8


def test_simulate_a_model_sweeps_and_draws(call: Call, config: Path, tmp_path: Path) -> None:
    chart, report = tmp_path / "sweep.png", tmp_path / "r.json"
    result = call(
        *("simulate", "--model", config, "--gpu", "h100", "--tokens", 4, "--sweep", "budget,depth"),
        *("--out", chart, "--json", report),
    )
    assert result.status == 0, result.error
    assert "bound by" in result.out
    assert chart.read_bytes().startswith(b"\x89PNG")
    document = json.loads(report.read_text())
    assert set(document["sweeps"]) == {"depth", "budget"}
    assert document["forward_ms"] > 0
    assert document["tokens_per_second"] == pytest.approx(4 / document["forward_ms"] * 1e3)


def test_simulate_a_profile_with_another_mode(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    profile_from(pipeline_log(8), 8).save(path)
    forward_ms = {}
    for mode in ("sync", "pipeline"):
        result = call("simulate", "--profile", path, "--mode", mode, "--json", "-")
        forward_ms[mode] = json.loads(result.out)["forward_ms"]
    assert forward_ms["sync"] == pytest.approx(8 * 198.64, rel=0.01)
    assert forward_ms["pipeline"] == pytest.approx(8 * 178.36, rel=0.01)


def test_simulate_a_profile_with_packed_transport(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    profile_from(pipeline_log(8), 8).save(path)
    found = {}
    for transport in ("raw", "packed", "auto"):
        result = call("simulate", "--profile", path, "--transport", transport, "--json", "-")
        assert result.status == 0, result.said
        found[transport] = json.loads(result.out)
    assert set(found["raw"]["transports"]) == {"raw"}
    assert set(found["packed"]["transports"]) == {"packed"}
    assert 0.69 < found["packed"]["streamed_bytes"] / found["raw"]["streamed_bytes"] < 0.72
    assert found["auto"]["forward_ms"] <= 1.001 * found["raw"]["forward_ms"]
    assert any("taken for" in line for line in found["packed"]["basis"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--transport", "packed"), "--model or --profile beside --transport"),
        (("--decode-rate", "1TB/s"), "--model or --profile beside --decode-rate"),
        (("--tokens", "1"), "--model or --profile beside --tokens"),
        (("--mode", "sync"), "--model or --profile beside --mode"),
        (("--granularity", "layer"), "--model or --profile beside --granularity"),
        (("--transport", "raw"), "--model or --profile beside --transport"),
        (("--model", "CONFIG", "--gpu", "h100", "--granularity", "auto"), "got 'auto'"),
        (("--profile", "P", "--efficiency", "0.5"), "--efficiency without --profile"),
        (("--profile", "P", "--context", "9"), "--context without --profile"),
        (("--profile", "P", "--model", "CONFIG", "--gpu", "h100"), "--gpu without --profile"),
        (("--profile", "P", "--batch", "2"), "--batch beside --model"),
        (("--profile", "P", "--tokens", "2"), "--tokens beside --model"),
        (("--profile", "P", "--granularity", "layer"), "--granularity beside --model"),
        (("--model", "CONFIG", "--gpu", "h100", "--transport", "zip"), "got 'zip'"),
        (
            ("--model", "CONFIG", "--gpu", "h100", "--transport", "auto", "--decode-rate", "0GB/s"),
            "--decode-rate as a rate",
        ),
        (("--layers", "0"), "layers between 1 and"),
        (("--mha-h2d", "-3"), "mha-h2d as a duration"),
        (("--mha-h2d", "nan"), "mha-h2d as a duration"),
        (("--streams", "many"), "'shared' or 'split', got 'many'"),
        (("--sweep", "depth"), "--model or --profile beside --sweep"),
        (("--model", "CONFIG", "--layers", "3"), "either durations and --layers, or --model"),
        (("--model", "CONFIG"), "compute times: --gpu h100"),
        (("--model", "CONFIG", "--gpu", "h100", "--sweep", "mood"), "--sweep to list some of"),
        (("--model", "CONFIG", "--gpu", "h100", "--out", "a.json"), "--out as a picture"),
        (
            ("--model", "CONFIG", "--gpu", "h100", "--gpu-budget", "1KiB"),
            "--gpu-budget of at least",
        ),
        (("--model", "nowhere", "--gpu", "h100"), "got 'nowhere'"),
        (("--profile", "nowhere"), "No such file or directory: 'nowhere'"),
        (("--profile", "CONFIG"), "expected a profile"),
        (("--json", "no/such/folder/r.json"), "make the folder first"),
    ],
)
def test_simulate_with_bad_input_is_one_line(
    call: Call, config: Path, arguments: tuple[str, ...], words: str
) -> None:
    given = [str(config) if argument == "CONFIG" else argument for argument in arguments]
    result = call("simulate", *given)
    assert result.status == BAD_INPUT
    assert words in result.said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "a config as JSON"),
        ("[]", "with a model_type"),
        ('{"model_type": 7}', "with a model_type"),
        ('{"model_type": "unheard-of"}', "transformers knows"),
        (json.dumps({**LLAMA, "hidden_size": "wide"}), "config"),
        (json.dumps({**LLAMA, "num_hidden_layers": 0}), "no units found"),
    ],
)
def test_simulate_with_a_broken_config_is_one_line(
    call: Call, config: Path, text: str, words: str
) -> None:
    config.write_text(text)
    result = call("simulate", "--model", config, "--gpu", "h100")
    assert result.status == BAD_INPUT
    assert words in result.said


# ---- timeline ----------------------------------------------------------------------------------


def test_timeline_prints_to_the_width_of_the_terminal(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    result = call("timeline", "--mode", "events", "--layers", 2)
    assert result.status == 0
    assert max(map(len, result.out.splitlines())) <= 72
    assert "weight_h2d" in result.out


@pytest.mark.parametrize("suffix", ["png", "svg", "json", "txt"])
def test_timeline_compares_modes_in_a_file(call: Call, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t.{suffix}"
    result = call("timeline", "--compare", "sync,pipeline", "--layers", 2, "--out", path)
    assert result.status == 0, result.error
    assert path.stat().st_size > 500
    if suffix == "json":
        document = json.loads(path.read_text())
        assert faults_of(document) == []
        names = [e["args"]["name"] for e in document["traceEvents"] if e["name"] == "process_name"]
        assert names == ["sync", "pipeline"]


def test_timeline_of_a_saved_trace_can_be_cut(call: Call, tmp_path: Path) -> None:
    saved, cut = tmp_path / "saved.json", tmp_path / "cut.json"
    call("timeline", "--out", saved)
    result = call("timeline", "--trace", saved, "--from-ms", 100, "--to-ms", 150, "--out", cut)
    assert result.status == 0, result.error
    rest = json.loads(cut.read_text())["otherData"]["traces"][0]
    assert rest["end_ns"] == 50_000_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--mode", "quick"), "'sync', 'streams', 'events' or 'pipeline', got 'quick'"),
        (("--compare", "sync,quick"), "--compare to list some of"),
        (("--compare", ","), "got nothing"),
        (("--layers", "0"), "--layers between 1 and"),
        (("--copy-engines", "0"), "--copy-engines between 1 and"),
        (("--ahead", "-1"), "--ahead between 0 and"),
        (("--mode", "sync", "--streams", "split"), "sync knows one stream"),
        (("--out", "t.doc"), ".png, .svg, .pdf, .json or .txt"),
        (("--out", "no/such/t.png"), "make the folder first"),
        (("--from-ms", "9", "--to-ms", "3"), "--from-ms before --to-ms"),
        (("--from-ms", "99999"), "--from-ms before --to-ms"),
        (("--trace", "nowhere.json"), "No such file"),
        (("--trace", "CONFIG"), "expected a timeline"),
    ],
)
def test_timeline_with_bad_input_is_one_line(
    call: Call, config: Path, arguments: tuple[str, ...], words: str
) -> None:
    given = [str(config) if argument == "CONFIG" else argument for argument in arguments]
    result = call("timeline", *given)
    assert result.status == BAD_INPUT
    assert words in result.said


# ---- compare -----------------------------------------------------------------------------------


def test_compare_runs_every_method_and_finds_them_equal(
    call: Call, config: Path, tmp_path: Path
) -> None:
    report = tmp_path / "r.json"
    result = call("compare", config, "--device", "cpu", "--rounds", 2, "--json", report)
    assert result.status == 0, result.error
    document = json.loads(report.read_text())
    rows = {row["method"]: row for row in document["rows"]}
    assert list(rows) == ["plain", "sync", "pipeline", "accelerate"]
    assert [row["is_equal"] for row in rows.values()] == [None, True, True, True]
    assert rows["sync"]["onloads"] == rows["pipeline"]["onloads"] == 8
    assert rows["pipeline"]["device_bytes"] < rows["plain"]["device_bytes"]
    assert document["is_well"] is True
    assert "yes" in result.out


def test_compare_loads_the_weights_of_a_folder(call: Call, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"})
    ).save_pretrained(tmp_path / "m")
    result = call("compare", tmp_path / "m", "--device", "cpu", "--methods", "plain,pipeline")
    assert result.status == 0, result.error


@pytest.mark.parametrize("transport", ["packed", "packed_resident"])
def test_compare_of_packed_weights_finds_them_equal(
    call: Call, tmp_path: Path, transport: str
) -> None:
    config = LLAMA | {"hidden_size": 256, "intermediate_size": 512, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = {}
    for way in ("raw", transport):
        result = call(
            "compare", tmp_path, "--device", "cpu", "--methods", "plain,pipeline", "--rounds", 1,
            "--transport", way, "--json", "-",
        )  # fmt: skip
        assert result.status == 0, result.error
        rows = json.loads(result.out)["rows"]
        found[way] = next(row for row in rows if row["method"] == "pipeline")
    assert found[transport]["is_equal"]
    assert found[transport]["device_bytes"] > found["raw"]["device_bytes"]  # ring or packed units


def test_help_lists_the_transports_that_a_command_takes(call: Call) -> None:
    for command, takes in (("plan", True), ("simulate", False), ("compare", True)):
        text = call(command, "--help").out
        assert "raw, packed" in text, command
        assert ("packed_resident" in text) == takes, command


def test_compare_of_different_bits_fails(
    call: Call, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch_offload.comparison._are_equal", lambda *_: False)
    result = call("compare", config, "--device", "cpu", "--methods", "plain,sync", "--rounds", 1)
    assert result.status == BAD_ANSWER
    assert "NO" in result.out


def test_compare_says_what_is_not_installed(
    call: Call, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "accelerate" else find(name)
    )
    result = call("compare", config, "--device", "cpu", "--methods", "plain,accelerate")
    assert result.status == 0, result.error
    assert "accelerate: not installed" in result.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--methods", "plain,magic"), "--methods to list some of"),
        (("--batch", "0"), "--batch between 1 and"),
        (("--device", "toaster"), "--device cuda or cpu, got 'toaster'"),
        (("--gpu-budget", "1KiB"), "gpu_budget of at least"),
    ],
)
def test_compare_with_bad_input_is_one_line(
    call: Call, config: Path, arguments: tuple[str, ...], words: str
) -> None:
    result = call("compare", config, "--methods", "sync", "--device", "cpu", *arguments)
    assert result.status == BAD_INPUT
    assert words in result.error.strip().splitlines()[-1]
    assert "Traceback" not in result.error


def test_compare_of_broken_weights_is_one_line(call: Call, config: Path) -> None:
    (config.parent / "model.safetensors").write_bytes(b"not weights")
    result = call("compare", config.parent, "--device", "cpu")
    assert result.status == BAD_INPUT
    assert "cannot load the model" in result.error
    assert "Traceback" not in result.error


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_compare_without_a_gpu_that_was_asked_for_says_so(call: Call, config: Path) -> None:
    result = call("compare", config, "--device", "cuda")
    assert result.status == NOT_HERE
    assert "a machine where torch sees none" in result.said


# ---- demo and bench ----------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What `demo` and `bench` start, which is not run."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 4)

    monkeypatch.setattr("torch_offload.cli.scripts.subprocess.run", run)
    return commands


def test_demo_runs_the_script_and_passes_its_status_on(
    call: Call, started: list[list[str]]
) -> None:
    assert call("demo", "--device", "cpu", "--stand-in").status == 4
    assert started[0][1:] == [str(ROOT / "examples/demo.py"), "--device", "cpu", "--stand-in"]


def test_bench_hands_its_arguments_to_pytest(call: Call, started: list[list[str]]) -> None:
    assert call("bench", "--tiny", "-k", "link").status == 4
    assert started[0][1:] == ["-m", "pytest", str(ROOT / "benchmarks"), "--tiny", "-k", "link"]
    call("bench", "benchmarks/bench_modes.py")
    assert started[1][1:] == ["-m", "pytest", "benchmarks/bench_modes.py"]


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_scripts_outside_the_repository_say_so(
    call: Call, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch_offload.cli.scripts._ROOT", tmp_path)
    result = call(command)
    assert result.status == NOT_HERE
    assert "belongs to the repository" in result.said


# ---- doctor ------------------------------------------------------------------------------------


def test_doctor_says_what_it_found_and_what_it_could_not_try(call: Call, tmp_path: Path) -> None:
    report = tmp_path / "d.json"
    result = call("doctor", "--json", report)
    document = json.loads(report.read_text())
    off = [finding for finding in document["findings"] if finding["status"] == "off"]
    assert result.status == (BAD_ANSWER if off else 0)
    assert all(finding["cost"] and finding["mend"] for finding in off)
    named = {finding["what"] for finding in document["findings"]}
    assert {"versions", "driver", "host memory", "huge pages", "GPU", "NUMA placement"} <= named
    if not torch.cuda.is_available():
        assert "torch sees none" in " ".join(result.out.split())
