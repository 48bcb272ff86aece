"""The Python of README and docs, run as it is written; without a GPU on the host device."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_offload
from tests.python.dropin import tiny_llama, tiny_stack, tokens
from tests.python.expect import assert_at_rest

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def blocks_of(file: str) -> list[str]:
    return _BLOCK.findall((ROOT / file).read_text())


def run(text: str, device: torch.device, **names: Any) -> dict[str, Any]:
    """What a block leaves behind."""
    if device.type != "cuda":
        text = text.replace('"cuda"', '"cpu"')
    exec(compile(text, "the docs", "exec"), names)
    return names


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user stands who has a checkpoint in "folder"."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


@pytest.mark.parametrize("file", ["README.md", "docs/checkpoints.md"])
def test_model_straight_from_its_checkpoint(file: str, folder: Path, device: torch.device) -> None:
    tiny_llama().save_pretrained(folder)
    blocks = [text for text in blocks_of(file) if "from_pretrained" in text]
    assert len(blocks) == 1
    names = run(blocks[0], device)
    model = names["model"]
    handle = torch_offload.handle_of(model)
    assert handle is names.get("handle", handle)
    plain = tiny_llama().to(device)
    with torch.no_grad():
        assert torch.equal(model(tokens(device)).logits, plain(tokens(device)).logits)


def test_model_of_ones_own(folder: Path, device: torch.device) -> None:
    from safetensors.torch import save_file

    save_file(dict(tiny_stack().state_dict()), folder / "model.safetensors")
    (text,) = (text for text in blocks_of("docs/checkpoints.md") if "MyModel" in text)
    names = run(text, device, torch=torch, torch_offload=torch_offload, MyModel=tiny_stack_on_meta)
    assert_at_rest(names["handle"])
    x = torch.ones(2, 16, device=device)
    with torch.no_grad():
        assert torch.equal(names["model"](x), tiny_stack().to(device)(x))


def tiny_stack_on_meta() -> Any:
    from torch_offload.selfcheck.subjects import Stack

    return Stack(4, 16).eval()


@pytest.fixture
def former_logging() -> Iterator[None]:
    """One block configures logging, which is the process's."""
    root, ours = logging.getLogger(), logging.getLogger("torch_offload")
    handlers, level = root.handlers[:], ours.level
    yield
    root.handlers[:] = handlers
    ours.setLevel(level)


@pytest.mark.usefixtures("former_logging")
@pytest.mark.parametrize("number", range(3))
def test_looking_at_a_run(number: int, folder: Path, device: torch.device) -> None:
    model = tiny_llama(num_hidden_layers=4).model
    with torch_offload.offload(model, device) as handle, torch.no_grad():
        inputs = {"input_ids": tokens(device)}
        model(**inputs)
        run(blocks_of("docs/tuning.md")[number], device, handle=handle, model=model, inputs=inputs)
    made = {path.name for path in folder.parent.iterdir()} - {"folder"}
    assert made == [{"p.json"}, {"t.png"}, set()][number]


def test_tables_are_what_one_run_of_the_script_makes_of_the_json(tmp_path: Path) -> None:
    files = {ROOT / "README.md": "chosen results", ROOT / "docs/figures.md": "results"}
    copies = {}
    for path, kind in files.items():
        before, mark, rest = path.read_text().partition(f"<!-- {kind} -->\n")
        end = f"<!-- /{kind} -->"
        block, _, after = rest.partition(end)
        assert block.count("\n|") > 5, f"{path.name} has no table of {kind}"
        copies[path] = tmp_path / path.name
        copies[path].write_text(f"{before}{mark}{end}{after}")
    subprocess.run(
        [sys.executable, "tools/results_table.py", "--write", *copies.values()],
        cwd=ROOT,
        check=True,
    )
    for path, copied in copies.items():
        assert copied.read_text() == path.read_text(), "run tools/results_table.py --write"


@pytest.mark.parametrize("text", ["", "<!-- results -->\n", "<!-- /results --><!-- results -->"])
def test_file_without_its_two_marks_fails_and_stays(text: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    made = subprocess.run(
        [sys.executable, "tools/results_table.py", "--write", tmp_path / "page.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 1
    assert "expected one block" in made.stderr
    assert (tmp_path / "page.md").read_text() == text


def test_every_result_is_in_the_list_of_results_and_what_that_names_is_there() -> None:
    folder = ROOT / "benchmarks" / "results"
    rows = [row for row in (folder / "README.md").read_text().splitlines() if row[:3] == "| `"]
    first_cells = [row.split("|")[1] for row in rows]
    named = {name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)}
    kept = {path.name for path in folder.glob("*.json")}
    kept |= {f"{path.parent.name}/" for path in folder.glob("*/*.json")} - {"tiny/"}
    assert not {name for name in kept if not any(fnmatch(name, pattern) for pattern in named)}
    absent = {pattern for pattern in named if not any(fnmatch(name, pattern) for name in kept)}
    assert not [
        pattern
        for pattern in absent
        for cell in first_cells
        if f"`{pattern}`" in cell and "not kept yet" not in cell
    ]


def test_links_lead_somewhere() -> None:
    """Files and headings, of all pages, by the names that GitHub gives to headings."""
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    pages += [*(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/results/README.md"]
    dead = []
    for page in pages:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in target:
                continue
            file, _, anchor = target.partition("#")
            path = (page.parent / file).resolve() if file else page
            if not path.exists() or (anchor and anchor not in anchors_of(path)):
                dead.append(f"{page.name}: {target}")
    assert not dead


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")
        for heading in headings
    }


def test_no_block_is_left_out() -> None:
    """One that is added is to be run here, or by the examples' tests."""
    counts = {
        file.relative_to(ROOT).as_posix(): len(blocks_of(file.relative_to(ROOT).as_posix()))
        for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    }
    counts = {file: count for file, count in counts.items() if count}
    assert counts == {"README.md": 2, "docs/checkpoints.md": 2, "docs/tuning.md": 3}, counts


def test_tests_that_design_names_are_where_it_says() -> None:
    """`test_file`: `name`, `name`: as the invariants list what shows them."""
    text = (ROOT / "docs" / "design.md").read_text()
    files = {path.name: path for path in (ROOT / "tests").rglob("test_*") if path.is_file()}
    named = re.findall(r"`(test_\w+\.(?:py|cpp))`: ((?:`\w+`(?:, )?)+)", text)
    assert len(named) > 20
    missing = [
        f"{file}: {name}"
        for file, names in named
        for name in re.findall(r"\w+", names)
        if file not in files or name not in files[file].read_text()
    ]
    assert not missing


def test_every_note_is_told_once() -> None:
    """A title alone on its line, or before a colon, tells it; any other mention refers to it."""
    homes: dict[str, list[str]] = {}
    mentioned: dict[str, str] = {}
    for path in sources("csrc", "torch_offload", "docs", "tests", "benchmarks", "tools"):
        text, name = path.read_text(), path.relative_to(ROOT).as_posix()
        for title in re.findall(r"^\W*Note \[([^\]\n]+)\](?::.*)?$", text, re.MULTILINE):
            homes.setdefault(title, []).append(name)
        on_one_line = re.sub(r"\s*\n\s*(?:///?|#)?\s*", " ", text)
        mentioned.update(dict.fromkeys(re.findall(r"Note \[([^\]]+)\]", on_one_line), name))
    assert len(homes) > 20
    twice = {title: where for title, where in homes.items() if len(where) > 1}
    assert twice == {}
    assert {title: where for title, where in mentioned.items() if title not in homes} == {}


def sources(*folders: str) -> list[Path]:
    kinds = {".cpp", ".cu", ".h", ".md", ".py"}
    return [
        path
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in kinds and path != Path(__file__)
    ]


def test_picture_of_design_names_every_source() -> None:
    text = (ROOT / "docs/design.md").read_text()
    picture = text[text.index("## The picture") : text.index("Arrows point down only")]
    named = set(re.findall(r"\w+", picture))
    shown = list((ROOT / "torch_offload").glob("*.py"))
    shown += [path.parent for path in (ROOT / "torch_offload").glob("*/__init__.py")]
    for folder in ("bindings", "check", "core", "cuda", "host", "params", "planner", "sim"):
        shown += (ROOT / "csrc" / folder).glob("*.c*")
    made = {"__init__", "__main__", "_build_info", "_version"}
    assert {path.stem for path in shown} - named == made & {path.stem for path in shown}
