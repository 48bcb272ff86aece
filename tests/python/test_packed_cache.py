"""Packed weights that are kept for the next run: taken when they are the model's, else ignored."""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import torch_offload
from tests.lanes.failures import Operator
from tests.lanes.fault_trials import Case, Trial
from tests.python import packed_reference
from tests.python.checkpoints import load, load_plain
from tests.python.dropin import assert_equal, plain_on, tiny_llama
from tests.python.dropin import logits as run
from tests.python.dropin import packable_llama as llama
from torch_offload import _C, Config, offload, packed_cache
from torch_offload.pretrained import CACHE_FOLDER

HOST = torch.device("cpu")
_ROOT = Path(torch_offload.__file__).parents[1]
_ANEW = "packed anew"


class Runs:
    """Offloads a model with a cache, and knows how many units came from there."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "torch_offload")
        self._caplog = caplog

    def __call__(self, model: nn.Module, folder: Path, **options: Any) -> int:
        """Asserts equal bits in two passes. Returns how many units were taken from the cache."""
        self._caplog.clear()
        expected = run(plain_on(model, HOST))
        options = {"transport": "packed", "depth": 0} | options
        with offload(model, HOST, packed_cache=folder, **options) as handle:
            before = handle.stats.bytes_copied  # to the device, to stay there
            assert_equal(run(model), expected)
            assert_equal(run(model), expected)
            copied = handle.stats.bytes_copied - before
            ways = {unit.transport for unit in handle.units if unit.place is not None}
            assert "raw" not in ways
            assert (copied > 0) == ("packed" in ways)
            assert copied < handle.stats.bytes_onloaded
        assert not list(folder.glob("*.tmp"))
        said = [record.getMessage() for record in self._caplog.records]
        return sum(int(one.split()[0]) for one in said if "packed units taken from" in one)


@pytest.fixture
def runs(caplog: pytest.LogCaptureFixture) -> Runs:
    return Runs(caplog)


def only_file(folder: Path) -> Path:
    (file,) = folder.glob("packed-*.safetensors")
    return file


# --- what is kept --------------------------------------------------------------------------------


def test_second_run_takes_every_unit(runs: Runs, tmp_path: Path) -> None:
    model = llama()
    assert runs(model, tmp_path / "new" / "folder") == 0
    written = only_file(tmp_path / "new" / "folder").stat()
    assert runs(llama(), tmp_path / "new" / "folder") == 6
    assert only_file(tmp_path / "new" / "folder").stat().st_mtime_ns == written.st_mtime_ns
    assert runs(model, tmp_path / "new" / "folder", mode="sync") == 6


def test_file_is_valid_safetensors_of_blobs_that_decode_to_the_weights(
    runs: Runs, tmp_path: Path
) -> None:
    model = llama()
    runs(model, tmp_path)
    file = only_file(tmp_path)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["format"] == "torch_offload packed units"
    assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()
    blob = load_file(file)["model.layers.1.mlp"]
    mlp = model.model.layers[1].mlp
    weights = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
    plain = b"".join(bytes(w.detach().reshape(-1).view(torch.uint8).tolist()) for w in weights)
    assert packed_reference.decode(bytes(blob.tolist()), len(plain), 0) == plain


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_budgets_and_granularities_share_a_folder(runs: Runs, tmp_path: Path) -> None:
    model = llama()
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert runs(model, tmp_path, gpu_budget=int(0.5 * size)) == 0
    few = len(load_file(only_file(tmp_path)))
    assert runs(model, tmp_path) == 0
    assert len(load_file(only_file(tmp_path))) == 6 > few
    assert runs(model, tmp_path, gpu_budget=int(0.5 * size)) == few
    assert runs(model, tmp_path) == 6
    assert runs(model, tmp_path, granularity="layer") == 0
    assert runs(model, tmp_path, granularity="layer") == 3
    assert runs(model, tmp_path, granularity="module") == 6  # sublayers first; leaves are kept too
    assert runs(model, tmp_path, granularity="module") > 6
    assert runs(model, tmp_path) == 6


@pytest.mark.parametrize("masters", ["plain", "packed"])
def test_units_that_stay_packed_on_the_device_are_kept_and_taken(
    runs: Runs, tmp_path: Path, masters: Any
) -> None:
    model = llama()
    options = {"transport": "packed_resident", "masters": masters}
    assert runs(model, tmp_path, **options) == 0
    blobs = load_file(only_file(tmp_path))
    assert len(blobs) == 6
    assert runs(model, tmp_path, **options) == 6
    assert runs(model, tmp_path) == 6  # the very same blobs travel
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 7.0
    with pytest.warns(RuntimeWarning, match=r"1 of 6 units.*layers\.1\.mlp.*packed anew"):
        assert runs(model, tmp_path, **options) == 0
    assert runs(model, tmp_path, **options) == 6
    after = load_file(only_file(tmp_path))
    differ = [name for name, blob in blobs.items() if not torch.equal(blob, after[name])]
    assert differ == ["model.layers.1.mlp"]


def test_host_memory_to_read_back_what_stays_on_the_device_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(_C, "check_host_memory", lambda needed, reserve: asked.append(needed))
    for folder in (None, tmp_path):
        with offload(llama(), HOST, transport="packed_resident", packed_cache=folder) as handle:
            packed_bytes = handle.stats.packed_bytes
    assert asked[1] - asked[0] == packed_bytes > 0


def test_units_of_other_runs_stay_kept(runs: Runs, tmp_path: Path) -> None:
    model = llama()
    runs(model, tmp_path)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(0.5)
    size = sum(parameter.nbytes for parameter in model.parameters())
    with pytest.warns(RuntimeWarning, match=_ANEW):
        runs(model, tmp_path, gpu_budget=int(0.8 * size))
    assert len(load_file(only_file(tmp_path))) == 6


def test_from_pretrained_keeps_the_cache_in_the_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    llama().save_pretrained(tmp_path)
    options = {"dtype": torch.bfloat16}
    expected = run(load_plain(AutoModelForCausalLM, tmp_path, HOST, **options))
    for _ in range(2):
        model = load(
            AutoModelForCausalLM,
            tmp_path,
            HOST,
            transport="packed",
            packed_cache=True,
            **options,
        )
        assert_equal(run(model), expected)
        assert list(torch_offload.checkpoint.stored_tensors(tmp_path)) == [
            tmp_path / "model.safetensors"
        ]
    only_file(tmp_path / CACHE_FOLDER)
    twin = llama()
    expected = run(twin)  # whose buffers are bf16
    handle = torch_offload.offload_from_checkpoint(
        twin, tmp_path, HOST, transport="packed", packed_cache=True
    )
    assert_equal(run(twin), expected)
    handle.remove()


# --- what is stale -------------------------------------------------------------------------------


def test_edited_weights_are_packed_anew(runs: Runs, tmp_path: Path) -> None:
    model = llama()
    runs(model, tmp_path)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 7.0  # no counter tells of it
    with pytest.warns(RuntimeWarning, match=r"1 of 6 units.*layers\.1\.mlp.*packed anew"):
        assert runs(model, tmp_path) == 0
    assert runs(model, tmp_path) == 6
    model.model.layers[0].self_attn.q_proj.weight.data.neg_()
    with pytest.warns(RuntimeWarning, match=_ANEW):
        runs(model, tmp_path)


def test_units_that_are_as_they_were_are_taken_beside_stale_ones(tmp_path: Path) -> None:
    model = llama()
    with offload(model, HOST, transport="packed", packed_cache=tmp_path):
        pass
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    taken: list[int] = []
    plain = _C.Engine.pack

    class Spy:
        def __init__(self, engine: Any) -> None:
            self._engine = engine

        def __getattr__(self, name: str) -> Any:
            return getattr(self._engine, name)

        def pack(self, *args: Any) -> None:
            plain(self._engine, *args)
            taken.extend(self._engine.blobs_taken)

    keep = packed_cache.PackedCache.pack
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            packed_cache.PackedCache,
            "pack",
            lambda self, engine, *args, **options: keep(self, Spy(engine), *args, **options),
        )
        with pytest.warns(RuntimeWarning, match=_ANEW):
            offload(model, HOST, transport="packed", packed_cache=tmp_path)
    assert len(taken) == 5


def test_edit_between_forwards_of_a_cached_model_is_seen(tmp_path: Path) -> None:
    model = llama()
    with offload(model, HOST, transport="packed", packed_cache=tmp_path):
        pass
    with offload(model, HOST, transport="packed", packed_cache=tmp_path):
        before = run(model)
        model.model.layers[1].mlp.up_proj.weight.data *= 3
        twin = llama()
        twin.load_state_dict(model.state_dict())
        after = run(model)
        assert not torch.equal(before, after)
        assert_equal(after, run(twin))


def test_checkpoint_of_the_same_size_and_date_is_noticed(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    llama().save_pretrained(tmp_path)
    options = {"dtype": torch.bfloat16, "transport": "packed", "packed_cache": True}
    load(AutoModelForCausalLM, tmp_path, HOST, **options)
    file = tmp_path / "model.safetensors"
    times = file.stat()
    state = load_file(file)
    state["model.layers.1.mlp.up_proj.weight"][2, 2] += 1
    save_file(state, file, {"format": "pt"})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.warns(RuntimeWarning, match=_ANEW):
        model = load(AutoModelForCausalLM, tmp_path, HOST, **options)
    plain = load_plain(AutoModelForCausalLM, tmp_path, HOST, dtype=torch.bfloat16)
    assert_equal(run(model), run(plain))


# --- later plans ---------------------------------------------------------------------------------


def run_of_twin(model: nn.Module) -> torch.Tensor:
    twin = llama()
    twin.load_state_dict(model.state_dict())
    return run(twin)


def test_replan_of_edited_weights_leaves_the_file_to_those_of_the_checkpoint(
    runs: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = llama()
    runs(model, tmp_path)
    before = only_file(tmp_path).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edited = llama()
        with offload(edited, HOST, transport="packed", packed_cache=tmp_path) as handle:
            with torch.no_grad():
                edited.model.layers[1].mlp.up_proj.weight.add_(0.001)
            expected = run_of_twin(edited)
            caplog.clear()
            handle.replan(gpu_budget=None, depth="1GiB")
            assert "5 packed units taken" in caplog.text
            assert_equal(run(edited), expected)
    assert only_file(tmp_path).read_bytes() == before
    assert runs(model, tmp_path) == 6


def test_leaves_of_edited_weights_take_no_others_place(runs: Runs, tmp_path: Path) -> None:
    model = llama()
    runs(model, tmp_path, granularity="module")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(before) == 2
    edited = llama()
    options: dict[str, Any] = {"transport": "packed", "granularity": "module"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with offload(edited, HOST, packed_cache=tmp_path, **options) as handle:
            with torch.no_grad():
                edited.model.layers[1].mlp.up_proj.weight.add_(0.001)
            expected = run_of_twin(edited)
            assert_equal(run(edited), expected)
            assert_equal(run(edited), expected)
            assert len(handle.units) > 6
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_relative_folder_stays_where_it_was_at_offload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "torch_offload")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = llama()
    with offload(model, HOST, transport="packed", packed_cache="kept") as handle:
        monkeypatch.chdir(tmp_path / "elsewhere")
        caplog.clear()
        handle.replan(gpu_budget=None, depth="1GiB")
        assert f"6 packed units taken from {tmp_path / 'kept'}" in caplog.text
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with offload(llama(), HOST, transport="packed", packed_cache="~/kept"):
        pass
    only_file(tmp_path / "home" / "kept")
    assert list((tmp_path / "elsewhere").iterdir()) == []


# --- what is damaged -----------------------------------------------------------------------------


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def _cut_in_the_header(file: Path) -> None:
    os.truncate(file, 100)


def _emptied(file: Path) -> None:
    os.truncate(file, 0)


def _grown(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"\0")


def _bit_flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1000] ^= 0x10
    file.write_bytes(data)


def _rewritten(
    file: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]
) -> None:
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors, metadata)
    save_file(tensors, file, metadata)


def _other_version(file: Path) -> None:
    _rewritten(file, lambda tensors, metadata: metadata.update(blob_version="2"))


def _other_kind(file: Path) -> None:
    _rewritten(file, lambda tensors, metadata: metadata.clear())


def _other_seal(file: Path) -> None:
    _rewritten(file, lambda tensors, metadata: metadata.update(seal="0" * 64))


def _other_content(file: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        units = json.loads(metadata["units"])
        first, second = "model.layers.0.mlp", "model.layers.1.mlp"
        units[first]["content"], units[second]["content"] = (
            units[second]["content"],
            units[first]["content"],
        )
        metadata["units"] = json.dumps(units)

    _rewritten(file, change)


def _swapped(file: Path) -> None:
    """Two sound blobs of one layout, each under the other's name."""

    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        first, second = "model.layers.0.mlp", "model.layers.1.mlp"
        tensors[first], tensors[second] = tensors[second], tensors[first]

    _rewritten(file, change)


def _of_another_type(file: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.view(torch.int8)

    _rewritten(file, change)


def _without_a_blob(file: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        del tensors["model.layers.0.mlp"]

    _rewritten(file, change)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / "inside").touch()


def _pipe(file: Path) -> None:
    """To open it would wait for a writer, for good."""
    file.unlink()
    os.mkfifo(file)


_DAMAGES = [
    _cut,
    _cut_in_the_header,
    _emptied,
    _grown,
    _bit_flipped,
    _other_version,
    _other_kind,
    _other_seal,
    _other_content,
    _swapped,
    _of_another_type,
    _without_a_blob,
    _folder,
    _pipe,
]


def test_operator_that_fails_beside_a_cache_comes_out_as_itself() -> None:
    """For every k. Out of safetensors' own reading an error comes as a ValueError."""
    for k in itertools.count(1):
        failure = Operator(KeyboardInterrupt, k)
        Trial(Case(transport="packed", cache="filled"), "offload", failure).run()
        if not failure.struck:
            break
    assert k > 20


@pytest.mark.parametrize("damage", _DAMAGES)
def test_damaged_file_is_ignored_with_one_warning_and_replaced(
    runs: Runs, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    model = llama()
    runs(model, tmp_path)
    damage(only_file(tmp_path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert runs(model, tmp_path) == 0
    said = [str(one.message) for one in caught if _ANEW in str(one.message)]
    assert len(said) == 1
    assert str(only_file(tmp_path)) in said[0]
    if damage is not _folder:  # which no file can be renamed over
        assert runs(model, tmp_path) == 6


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A sound file, and what the model gives."""
    folder = tmp_path_factory.mktemp("kept")
    model = _small()
    with offload(model, HOST, transport="packed", packed_cache=folder):
        expected = run(model)
    return only_file(folder), expected


def _content(file: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    """Safetensors writes metadata in any order."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    return metadata, {name: blob.tolist() for name, blob in load_file(file).items()}


def _small() -> Any:
    return tiny_llama(hidden_size=128, intermediate_size=128, num_hidden_layers=1).bfloat16()


@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_damage_gives_the_right_bits(
    kept: tuple[Path, torch.Tensor], data: st.DataObject
) -> None:
    file, expected = kept
    name, sound = file.name, file.read_bytes()
    header_end = 8 + int.from_bytes(sound[:8], "little")
    damaged = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "zero", "move"]))
        most = data.draw(st.sampled_from([8, header_end, len(damaged)]))
        at = data.draw(st.integers(0, max(0, min(most, len(damaged)) - 1)))
        size = data.draw(st.integers(1, 64))
        if kind == "flip" and damaged:
            damaged[at] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            end = data.draw(st.sampled_from([at + size, len(damaged)]))
            del damaged[at:end]
        elif kind == "insert":
            damaged[at:at] = data.draw(st.binary(max_size=16))
        elif kind == "zero":
            damaged[at : at + size] = bytes(len(damaged[at : at + size]))
        else:
            target = data.draw(st.integers(0, max(0, len(damaged) - 1)))
            damaged[target : target + size] = damaged[at : at + size]
    model = _small()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Path(folder, name).write_bytes(damaged)
        with offload(model, HOST, transport="packed", packed_cache=folder):
            assert_equal(run(model), expected)
        # Either it was noticed, told once and replaced, or it said what it had said before.
        assert len(caught) <= 1
        assert _content(Path(folder, name)) == _content(file)
        if not caught:
            assert Path(folder, name).read_bytes() == damaged


# --- folders, disks, processes -------------------------------------------------------------------


@pytest.mark.parametrize("place", ["/proc/self/torch_offload", "file"])
def test_folder_that_cannot_be_written_is_a_warning(runs: Runs, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        assert runs(llama(), tmp_path / place) == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_a_warning(runs: Runs, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        runs(llama(), tmp_path)


def test_file_of_a_folder_that_is_read_only_now_is_taken(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    runs(model, tmp_path)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(packed_cache, "mkdtemp", refuse)
    assert runs(model, tmp_path) == 6
    only_file(tmp_path).unlink()
    with pytest.warns(RuntimeWarning, match="Permission denied"):
        runs(model, tmp_path)


def test_interrupt_while_writing_leaves_plain_model_and_former_file(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    runs(model, tmp_path)
    before = only_file(tmp_path).read_bytes()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(0.5)
    expected = run(model)

    def interrupted(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packed_cache, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            offload(model, HOST, transport="packed", packed_cache=tmp_path)
    assert torch_offload.handle_of(model) is None
    assert_equal(run(model), expected)
    assert [file.name for file in tmp_path.iterdir()] == [only_file(tmp_path).name]
    assert only_file(tmp_path).read_bytes() == before


def test_leftovers_of_killed_writers_are_removed_and_of_living_ones_kept(
    runs: Runs, tmp_path: Path
) -> None:
    model = llama()
    with offload(model, HOST, transport="packed", packed_cache=tmp_path):
        pass
    file = only_file(tmp_path)
    file.unlink()
    folders = {}
    for kind in ("killed", "living", "young"):
        folders[kind] = tmp_path / f"{file.name}.{kind}.tmp"
        folders[kind].mkdir()
        (folders[kind] / "part").write_bytes(b"half")
        if kind != "young":
            os.utime(folders[kind], (0, 0))
    lock = os.open(folders["living"], os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with offload(model, HOST, transport="packed", packed_cache=tmp_path):
            pass
    finally:
        os.close(lock)
    assert [kind for kind, folder in folders.items() if folder.exists()] == ["living", "young"]


_SCRIPT = """
import resource, signal, sys, time, warnings
from pathlib import Path
import torch
from tests.python.dropin import tiny_llama, tokens
from torch_offload import offload
folder, me, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
model = tiny_llama(hidden_size=256, intermediate_size=512).bfloat16()
ids = tokens(torch.device("cpu"))
with torch.inference_mode():
    expected = model(ids).logits
if how == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
else:
    (folder / f"ready-{me}").touch()
    while len(list(folder.glob("ready-*"))) < 2:
        time.sleep(0.001)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(1 if how == "full" else 8):
        if how != "full":
            for file in folder.glob("packed-*.safetensors"):
                file.unlink(missing_ok=True)
        with offload(model, "cpu", transport="packed", packed_cache=folder), torch.inference_mode():
            assert torch.equal(model(ids).logits, expected)
print([str(one.message) for one in caught])
"""


def _start(folder: Path, me: str, how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(folder), me, how],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_write_at_once(runs: Runs, tmp_path: Path) -> None:
    processes = [_start(tmp_path, me, "both") for me in ("a", "b")]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert (process.returncode, out.strip()) == (0, "[]"), err
    assert sorted(file.suffix for file in tmp_path.iterdir()) == ["", "", ".safetensors"]
    assert runs(llama(), tmp_path) == 6


def test_file_that_is_removed_while_it_is_opened_is_none_yet(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    runs(model, tmp_path)
    mapped = _C.FileMapping

    def removed(path: str) -> Any:
        Path(path).unlink()
        return mapped(path)

    monkeypatch.setattr(_C, "FileMapping", removed)
    assert runs(model, tmp_path) == 0
    monkeypatch.undo()
    assert runs(model, tmp_path) == 6


def test_full_disk_is_a_warning(tmp_path: Path) -> None:
    process = _start(tmp_path, "a", "full")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "cannot be written" in out
    assert "File too large" in out
    assert list(tmp_path.iterdir()) == []


# --- options -------------------------------------------------------------------------------------


def test_cache_without_packing_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 'raw', which packs nothing"):
        offload(llama(), HOST, packed_cache=tmp_path)


def test_cache_beside_no_checkpoint_fails() -> None:
    folders: tuple[Any, ...] = (True, 3, "")
    for folder in folders:
        with pytest.raises(ValueError, match="packed_cache as a folder"):
            Config(transport="packed", packed_cache=folder)
    with pytest.raises(ValueError, match="name a folder"):
        load(type(llama()), Path("some/hub-id"), HOST, transport="packed", packed_cache=True)


def test_nothing_to_pack_writes_no_file(tmp_path: Path) -> None:
    model = llama().float()
    with offload(model, HOST, transport="packed", packed_cache=tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
