"""Checkpoint files that change, and checkpoints larger than what may be locked or held."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.lanes.leftovers import Devices
from tests.python.checkpoints import (
    assert_streams_the_same,
    bytes_in_files,
    handle_of,
    load,
    load_plain,
    save_llama,
    streamed_bytes,
)
from tests.python.dropin import assert_equal, tokens
from torch_offload import _C, StateError
from torch_offload.devices import devices_made_by

MIB = 2**20
ROOT = Path(__file__).resolve().parents[2]


def _inputs(device: torch.device) -> dict[str, Any]:
    return {"input_ids": tokens(device)}


# --- what stays on the device ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edits", "mode"),
    [(True, "pipeline"), *((False, mode) for mode in ("sync", "streams", "events", "pipeline"))],
)
def test_large_weights_that_stay_are_copied_from_locked_pages(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, edits: bool, mode: str
) -> None:
    model_class = _save_large(tmp_path, num_layers=2, vocab_size=4096)  # tables of 4 MiB each
    copied: list[bool] = []
    copy_resident = _C.Engine.copy_resident

    def watched(engine: _C.Engine, view: _C.FileView, destination: torch.Tensor) -> bool:
        if edits:
            view.tensor(torch.uint8, [view.size_bytes])[-1] ^= 1
        copied.append(copy_resident(engine, view, destination))
        return copied[-1]

    monkeypatch.setattr(_C.Engine, "copy_resident", watched)
    model = load(model_class, tmp_path, device, mode=mode)
    assert copied == [not edits] * 2
    plain = load_plain(model_class, tmp_path, device)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        got = model.get_parameter(name)
        assert got.device == device
        assert torch.equal(got, plain.get_parameter(name)) == (not edits)
    if not edits:
        assert_streams_the_same(model, plain, _inputs(device))


def test_weights_that_stay_share_one_event(tmp_path: Path, device: torch.device) -> None:
    model_class = _save_large(tmp_path, num_layers=2, vocab_size=4096)
    devices = Devices()
    with devices_made_by(devices):
        model = load(model_class, tmp_path, device)
    placed = [unit for unit in handle_of(model).units if unit.place is not None]
    # Two of each unit, one for the pipeline's hand-overs, and one for both tables.
    assert devices.held().events == 2 * len(placed) + 2


def test_copy_of_a_weight_that_stays_checks_its_destination(
    tmp_path: Path, device: torch.device
) -> None:
    source = save_llama(tmp_path)
    model = load(type(source), tmp_path, device)
    mapping = _C.FileMapping(str(tmp_path / "model.safetensors"))
    view = _C.FileView([(mapping, 64, 256)])
    with pytest.raises(ValueError, match="expected a dense tensor of 256 bytes"):
        handle_of(model)._engine.copy_resident(view, torch.empty(3, device=device))


# --- files that change -------------------------------------------------------------------------


def _overwrite(file: Path) -> None:
    """Other numbers at the same length: nothing but the time of change tells."""
    before = os.stat(file)
    with file.open("r+b") as opened:
        opened.seek(-64, os.SEEK_END)
        opened.write(b"\x3f" * 64)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def _cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 4096)


def _grow(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"more")


@pytest.mark.parametrize("change", [_overwrite, _cut_short, _grow])
@pytest.mark.parametrize("forwards", [0, 2])
def test_changed_file_is_an_error_at_the_next_forward(
    tmp_path: Path, device: torch.device, change: Any, forwards: int
) -> None:
    source = save_llama(tmp_path)
    model = load(type(source), tmp_path, device)
    with torch.inference_mode():
        for _ in range(forwards):
            model(**_inputs(device))
        change(tmp_path / "model.safetensors")
        before = handle_of(model).stats
        for _ in range(2):
            with pytest.raises(StateError, match=r"model.safetensors to stay as it was"):
                model(**_inputs(device))
        assert handle_of(model).stats.onloads == before.onloads, "something was streamed"


@pytest.mark.parametrize("replaces", [True, False])
def test_file_that_is_renamed_over_or_deleted_streams_on(
    tmp_path: Path, device: torch.device, replaces: bool
) -> None:
    source = save_llama(tmp_path)
    plain = load_plain(type(source), tmp_path, device)
    model = load(type(source), tmp_path, device)
    if replaces:
        (tmp_path / "new").write_bytes(b"something else")
        (tmp_path / "new").rename(tmp_path / "model.safetensors")
    else:
        (tmp_path / "model.safetensors").unlink()
    assert_streams_the_same(model, plain, _inputs(device))


def test_arena_streams_on_whatever_becomes_of_the_file(
    tmp_path: Path, device: torch.device
) -> None:
    source = save_llama(tmp_path)
    plain = load_plain(type(source), tmp_path, device)
    model = load(type(source), tmp_path, device, masters="arena")
    with (tmp_path / "model.safetensors").open("ab") as opened:
        opened.write(b"more")
    assert_streams_the_same(model, plain, _inputs(device))


def test_deleted_model_lets_go_of_its_files_without_a_collection(
    tmp_path: Path, device: torch.device
) -> None:
    source = save_llama(tmp_path)
    model = load(type(source), tmp_path, device)
    with torch.inference_mode():
        model(**_inputs(device))
    handle = weakref.ref(handle_of(model))
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    gc.collect()
    gc.disable()
    try:
        del model
        assert handle() is None
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()


def test_forked_child_reads_weights_at_rest(tmp_path: Path, device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("CUDA does not survive a fork")
    source = save_llama(tmp_path)
    model = load(type(source), tmp_path, device)
    expected = source.model.layers[1].mlp.up_proj.weight
    child = os.fork()
    if child == 0:
        equal = torch.equal(model.model.layers[1].mlp.up_proj.weight, expected)
        os._exit(0 if equal else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- larger than what may be locked ------------------------------------------------------------


def _save_large(folder: Path, num_layers: int, width: int = 512, vocab_size: int = 64) -> Any:
    """A Llama in bf16 whose weights are mostly those that stream; returns its class."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=vocab_size,
        pad_token_id=0,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    layer = {
        name: torch.randn(tensor.shape, dtype=torch.bfloat16) * 0.02
        for name, tensor in model.model.layers[0].named_parameters()
    }
    weights = {
        name: torch.randn(tensor.shape, dtype=torch.bfloat16) * 0.02
        for name, tensor in model.named_parameters()
        if ".layers." not in name
    }
    for index in range(num_layers):
        for name, tensor in layer.items():
            weights[f"model.layers.{index}.{name}"] = tensor + index / 1024
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return LlamaForCausalLM


@pytest.mark.parametrize("mode", ["pipeline", "streams"])
def test_files_larger_than_the_host_budget_are_locked_in_turns(
    tmp_path: Path, device: torch.device, mode: str
) -> None:
    model_class = _save_large(tmp_path, num_layers=16)  # 8.4 MB each
    model = load(model_class, tmp_path, device, host_budget="64MiB", mode=mode)
    handle = handle_of(model)
    plain = load_plain(model_class, tmp_path, device)
    assert bytes_in_files(handle) == streamed_bytes(handle) >= 128 * MIB
    with torch.inference_mode():
        expected = plain(**_inputs(device))
        with handle.record() as log:
            for _ in range(3):
                assert_equal(model(**_inputs(device)), expected)
                assert handle.stats.host_bytes <= 64 * MIB
    assert handle.check() == []
    assert sum(op.kind == "unregister" for op in log.ops) >= 48


def test_weights_that_stay_leave_the_host_budget_to_those_that_stream(
    tmp_path: Path, device: torch.device
) -> None:
    model_class = _save_large(tmp_path, num_layers=16, vocab_size=4096)
    size = (tmp_path / "model.safetensors").stat().st_size
    model = load(model_class, tmp_path, device, host_budget="64MiB")
    handle = handle_of(model)
    chunk = 2 * MIB
    first = next(unit for unit in handle.units if unit.place is not None)
    assert handle.stats.file_bytes_locked >= 8 * MIB + first.size_bytes, (
        "tables come from locked pages"
    )
    assert handle.stats.host_bytes <= first.size_bytes + 2 * chunk, "and leave none behind"
    plain = load_plain(model_class, tmp_path, device)
    read = []
    with torch.inference_mode():
        expected = plain(**_inputs(device))
        for _ in range(5):
            before = handle.stats.file_bytes_locked
            assert_equal(model(**_inputs(device)), expected)
            read.append(handle.stats.file_bytes_locked - before)
    # Three quarters of the budget stay, whole chunks of them: the rest is read by each forward.
    assert read[2] == read[3] == read[4]
    assert size - 8 * MIB - 48 * MIB - 2 * chunk <= read[4] <= size - 48 * MIB + 2 * chunk


def test_host_budget_below_one_unit_fails_with_the_way_out(
    tmp_path: Path, device: torch.device
) -> None:
    source = save_llama(tmp_path)
    with pytest.raises(MemoryError, match="raise host_budget"):
        load(type(source), tmp_path, device, host_budget=4096, masters="mmap")


def _anonymous_bytes() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not in use
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_private_host_memory_is_a_twentieth_of_the_weights(
    tmp_path: Path, device: torch.device
) -> None:
    model_class = _save_large(tmp_path, num_layers=16)
    warm = load(model_class, tmp_path, device)  # libraries take what they take once
    with torch.inference_mode():
        warm(**_inputs(device))
    weights = streamed_bytes(handle_of(warm))
    del warm
    before = _anonymous_bytes()
    model = load(model_class, tmp_path, device)
    handle = handle_of(model)
    with torch.inference_mode():
        for _ in range(2):
            model(**_inputs(device))
    handle.refresh()
    window = handle.stats.window_bytes if device.type == "cpu" else 0
    used = _anonymous_bytes() - before - window
    assert bytes_in_files(handle) == weights
    assert used / weights <= 0.05
    before = _anonymous_bytes()
    arena = load(model_class, tmp_path, device, masters="arena")
    assert _anonymous_bytes() - before >= weights, "what is measured shows"
    assert bytes_in_files(handle_of(arena)) == 0


# --- larger than the host's memory -------------------------------------------------------------

_CGROUPS = Path("/sys/fs/cgroup/memory")
_IN_A_CGROUP = """
import os, sys, warnings
group, folder, limit = sys.argv[1:]
import torch, torch_offload
from transformers import LlamaForCausalLM
import transformers.models.llama.modeling_llama
with open(f"{group}/memory.limit_in_bytes", "w") as file:
    file.write(limit)
with open(f"{group}/cgroup.procs", "w") as file:
    file.write(str(os.getpid()))
model = torch_offload.from_pretrained(LlamaForCausalLM, folder, device="cpu")
ids = torch.arange(1, 13).view(2, 6)
with torch.inference_mode():
    logits = [model(input_ids=ids).logits for _ in range(2)]
assert torch.equal(*logits)
torch.save(logits[0], f"{folder}/logits.pt")
handle = torch_offload.handle_of(model)
print(handle.stats.onloads, sum(unit.bytes_in_files for unit in handle.units))
"""


@pytest.mark.slow
def test_model_larger_than_the_memory_limit_runs_on_the_host(tmp_path: Path) -> None:
    group = _CGROUPS / f"torch_offload_test_{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        if not (group / "memory.limit_in_bytes").exists():
            pytest.skip("no memory cgroup can be made here")
        model_class = _save_large(tmp_path, num_layers=24)
        size = (tmp_path / "model.safetensors").stat().st_size
        limit = 128 * MIB
        assert size > 1.4 * limit
        done = subprocess.run(
            [sys.executable, "-c", _IN_A_CGROUP, str(group), str(tmp_path), str(limit)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        onloads, in_files = (int(word) for word in done.stdout.split())
        assert onloads > 48
        assert in_files > limit
        with torch.inference_mode():
            plain = load_plain(model_class, tmp_path, torch.device("cpu"))
            expected = plain(input_ids=torch.arange(1, 13).view(2, 6)).logits
        assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
    finally:
        group.rmdir()
