"""The examples, run as a user runs them, and the demo's verdict when something is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_offload
from tests.python.dropin import tiny_llama

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples"
README = ROOT / "README.md"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [path for path in (os.environ.get("PYTHONPATH"), str(ROOT)) if path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=EXAMPLES,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_own_model_runs_and_reports() -> None:
    result = run("own_model.py")
    assert result.returncode == 0, result.stderr
    assert "layers.7" in result.stdout
    assert "never ran" not in result.stdout


def test_readme_shows_the_example_as_it_is() -> None:
    example = (EXAMPLES / "own_model.py").read_text().split("\n\n", 1)[1]
    assert f"```python\n{example}```" in README.read_text()


@pytest.mark.slow
def test_demo_without_data_packages_says_so_and_passes() -> None:
    result = run("demo.py", "--stand-in")
    assert result.returncode == 0, result.stdout + result.stderr
    said = " ".join(result.stdout.split())  # whatever the width of the console
    assert said.count("random weights takes the place") == 2
    assert result.stdout.count("yes") == 4, result.stdout
    assert "equal to the last bit" in said


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import demo

    return demo


def a_run(demo, *, onloaded: int, is_equal: bool):
    from torch_offload import OffloadStats

    stats = OffloadStats(
        forwards=1,
        onloads=1,
        prefetched=0,
        misses=1,
        bytes_onloaded=onloaded,
        bytes_resident=0,
        window_bytes=1,
        host_bytes=1,
        cpu_seconds=0.0,
        hits=0,
        extra_places=0,
        bytes_copied=onloaded,
        staging_bytes=0,
        file_bytes_locked=0,
        packed_bytes=0,
    )
    return demo.Run("model", "sync", 1.0, 1, stats, is_equal)


def test_demo_verdict_with_equal_outputs_is_well(demo) -> None:
    is_well, _ = demo.verdict_of([a_run(demo, onloaded=1, is_equal=True)], torch.device("cpu"))
    assert is_well


def test_demo_verdict_with_another_output_fails(demo) -> None:
    is_well, lines = demo.verdict_of([a_run(demo, onloaded=1, is_equal=False)], torch.device("cpu"))
    assert not is_well
    assert "DIFFERS" in lines[0]


def test_demo_verdict_with_nothing_streamed_fails(demo) -> None:
    is_well, lines = demo.verdict_of([a_run(demo, onloaded=0, is_equal=True)], torch.device("cpu"))
    assert not is_well
    assert "NOTHING was streamed" in lines[0]


@pytest.mark.parametrize("planted", [False, True])
def test_demo_ends_with_1_where_an_output_differs(
    demo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], planted: bool
) -> None:
    """The planted fault: in pipeline alone the model answers with another bit."""
    from real_models import RealModel

    model = tiny_llama()

    def spoil(model: torch.nn.Module, args: tuple[object, ...], output):
        handle = torch_offload.handle_of(model)
        if planted and handle is not None and handle.config.mode == "pipeline":
            output.logits = torch.nextafter(output.logits, torch.full_like(output.logits, 9.0))
        return output

    model.register_forward_hook(spoil)
    monkeypatch.setattr(demo, "load_tasks", lambda device, *_: [demo.forward_task(loaded, device)])
    loaded = RealModel("tiny", model, None)
    assert demo.main(["--device", "cpu"]) == int(planted)
    said = " ".join(capsys.readouterr().out.split())
    assert ("tiny, pipeline: the output DIFFERS" in said) == planted
    assert "tiny, sync: the output DIFFERS" not in said
    assert ("equal to the last bit" in said) != planted


def test_demo_same_bits_tells_a_negative_zero_apart(demo) -> None:
    zero = (torch.zeros(3),)
    assert demo.same_bits(zero, (torch.zeros(3),))
    assert not demo.same_bits(zero, (-torch.zeros(3),))
    assert demo.same_bits((torch.full((2,), torch.nan),), (torch.full((2,), torch.nan),))
