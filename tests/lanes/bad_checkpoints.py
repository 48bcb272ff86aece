"""Checkpoints by the ten thousand that are almost right: headers, indexes, configs, whole folders.

`fuzz_headers` holds what is taken against safetensors' own reader. `fuzz_folders` offloads a model
from files with a few bytes changed: what is taken must compute, and be left whole when it is not.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import safetensors
import torch
import transformers
from safetensors.torch import save
from torch import nn

import torch_offload
from tests.lanes.bad_input_controls import expecting
from tests.lanes.fuzzing import Fuzz, mutated_bytes, mutated_document
from torch_offload import checkpoint
from torch_offload.calls import unwrap
from torch_offload.checkpoint import INDEX_NAME, parse_header, parse_index
from torch_offload.model_files import read_config
from torch_offload.selfcheck.lane import Effort, Lane, Tally, all_caught
from torch_offload.selfcheck.subjects import Stack

HOST = torch.device("cpu")
_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "dtype": "bfloat16",
}
#: So many different inputs a full run tries, at least.
_LEAST = 100_000
_TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def file_of(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with this header, as JSON or as it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def changed_file(choice: random.Random, content: bytes) -> bytes:
    """A safetensors file with another header, whose length fits mostly, or with other bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    text, data = content[8 : 8 + length], content[8 + length :]
    kind = choice.random()
    if kind < 0.3:
        return mutated_bytes(choice, content)
    if kind < 0.7:
        return file_of(mutated_document(choice, json.loads(text)), data)
    return file_of(mutated_bytes(choice, text), data)


def expect_agreement(content: bytes) -> None:
    """What is taken is what safetensors reads."""
    parsed = parse_header(content, len(content), "file.safetensors")
    expected = dict(safetensors.deserialize(content))
    assert parsed.keys() == expected.keys(), (parsed.keys(), expected.keys())
    for name, stored in parsed.items():
        raw = content[stored.offset : stored.offset + stored.size_bytes]
        assert raw == bytes(expected[name]["data"]), name
        assert list(stored.shape) == expected[name]["shape"], name


def fuzz_headers(tally: Tally, count: int, seed: int) -> None:
    """Headers of safetensors files."""
    fuzz = Fuzz(tally, seed)
    content = save(_TENSORS, metadata={"format": "pt"})
    for _ in fuzz.draws(count):
        data = changed_file(fuzz.choice, content)
        fuzz.attempt("header", data, lambda data=data: expect_agreement(data))  # type: ignore[misc]


def _stays_inside(text: bytes) -> None:
    for part in parse_index(text, "index.json").values():
        path = Path("/folder", part)
        assert path.is_relative_to("/folder"), part
        assert ".." not in path.parts, part
        assert path.name.endswith(".safetensors"), part


def fuzz_indexes(tally: Tally, count: int, seed: int) -> None:
    """Indexes of checkpoints in parts: what is taken names files of the folder only."""
    fuzz = Fuzz(tally, seed)
    index = {
        "metadata": {"total_size": 32},
        "weight_map": {"a": "x-1-of-2.safetensors", "b": "x-2-of-2.safetensors"},
    }
    for _ in fuzz.draws(count):
        if fuzz.choice.random() < 0.5:
            text = json.dumps(mutated_document(fuzz.choice, index)).encode()
        else:
            text = mutated_bytes(fuzz.choice, json.dumps(index).encode())
        fuzz.attempt("index", text, lambda text=text: _stays_inside(text))  # type: ignore[misc]


def _has_layers(file: Path) -> None:
    config = read_config(file)
    assert isinstance(config, transformers.PretrainedConfig), f"no config: {config!r}"
    assert isinstance(config.model_type, str), f"no type of model: {config.model_type!r}"


def fuzz_configs(tally: Tally, count: int, seed: int, folder: Path) -> None:
    """Configs that a plan is to be made from."""
    fuzz = Fuzz(tally, seed)
    file = folder / "fuzzed_config.json"
    for _ in fuzz.draws(count):
        if fuzz.choice.random() < 0.7:
            text = json.dumps(mutated_document(fuzz.choice, _CONFIG)).encode()
        else:
            text = mutated_bytes(fuzz.choice, json.dumps(_CONFIG).encode())
        file.write_bytes(text)
        fuzz.attempt("config file", text, lambda: _has_layers(file))


def fuzz_folders(tally: Tally, count: int, seed: int, folder: Path) -> None:
    """Whole checkpoints of which one file is changed, from the drop-in call."""
    fuzz = Fuzz(tally, seed)
    torch.manual_seed(seed)
    source = Stack(3, 16).eval()
    x = torch.randn(2, 16)
    weights = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    names = list(weights)
    parts = [dict.fromkeys(names[::2]), dict.fromkeys(names[1::2])]
    files = {
        f"model-{number}.safetensors": save({name: weights[name] for name in part})
        for number, part in enumerate(parts)
    }
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    good = {**files, INDEX_NAME: json.dumps({"weight_map": weight_map}).encode()}
    where = folder / "fuzzed_checkpoint"
    for _ in fuzz.draws(count):
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir()
        changed = fuzz.choice.choice(list(good))
        given = b""
        for name, content in good.items():
            data = content
            if name == changed and name == INDEX_NAME:
                data = json.dumps(mutated_document(fuzz.choice, json.loads(content))).encode()
            elif name == changed:
                data = changed_file(fuzz.choice, content)
            if name == changed:
                given = name.encode() + data
            (where / name).write_bytes(data)
        fuzz.attempt("checkpoint", given, lambda: _offloads_or_leaves_alone(where, x))


def _offloads_or_leaves_alone(where: Path, x: torch.Tensor) -> None:
    with torch.device("meta"):
        model: Any = Stack(3, 16).eval()
    before = dict(model.named_parameters())
    try:
        handle = torch_offload.offload_from_checkpoint(model, where, HOST)
    except Exception:
        now = dict(model.named_parameters())
        assert all(now[name] is before[name] for name in before), "changed by a refused call"
        assert torch_offload.handle_of(model) is None
        raise
    with torch.no_grad():
        got = model(x)
        onloads = handle.stats.onloads
        handle.remove()
        assert onloads > 0, "nothing was streamed"
        must = torch_offload.align(model)(x)
    # By their bits: a changed byte of a weight may have made NaN of all of them.
    assert torch.equal(got.view(torch.int32), must.view(torch.int32)), "streamed other bits"


@contextmanager
def _transformers_quiet() -> Iterator[None]:
    """It tells of each key that it does not know."""
    said = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(said)


# --- what is planted -----------------------------------------------------------------------------


def _planted(folder: Path) -> dict[str, Tally]:
    def tried(fuzz: Callable[[Tally], None], patch: Any, fault: str) -> Tally:
        tally = Tally()
        with patch, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch_offload: the first forward called 0")
            fuzz(tally)
        return expecting(tally, fault)

    this = sys.modules[__name__]
    real_offload = torch_offload.offload_from_checkpoint

    def unwrapped(model: nn.Module, where: Path, device: torch.device) -> Any:
        handle = real_offload(model, where, device)
        for unit in handle.units:
            unwrap(model.get_submodule(unit.name))
        return handle

    def changing(model: nn.Module, where: Path, device: torch.device) -> Any:
        try:
            return real_offload(model, where, device)
        except Exception:
            cast(Any, model).embed.weight = nn.Parameter(torch.zeros(16, 16))
            raise

    def wrong(model: nn.Module, where: Path, device: torch.device) -> Any:
        handle = real_offload(model, where, device)
        model.register_forward_hook(lambda m, args, output: output + len(_FORWARDS) % 2)
        model.register_forward_hook(lambda *_: _FORWARDS.append(1))
        return handle

    def folders(tally: Tally) -> None:
        fuzz_folders(tally, 40, 4, folder)

    offload = partial(mock.patch.object, torch_offload, "offload_from_checkpoint")
    return {
        "a reader that takes anything for a count": tried(
            lambda tally: fuzz_headers(tally, 2000, 5),
            mock.patch.object(checkpoint, "_is_count", return_value=True),
            " ",
        ),
        "an index that is trusted": tried(
            lambda tally: fuzz_indexes(tally, 300, 2),
            mock.patch.object(
                this, "parse_index", lambda text, path: json.loads(text)["weight_map"]
            ),
            "KeyError|AttributeError|AssertionError",
        ),
        "a config that is trusted": tried(
            lambda tally: fuzz_configs(tally, 100, 3, folder),
            mock.patch.object(this, "read_config", lambda file: json.loads(file.read_bytes())),
            "no config",
        ),
        "a model that is not streamed": tried(folders, offload(unwrapped), "nothing was streamed"),
        "a refused call that changes the model": tried(
            folders, offload(changing), "changed by a refused call"
        ),
        "wrong outputs": tried(folders, offload(wrong), "streamed other bits"),
    }


_FORWARDS: list[int] = []


class BadCheckpoints(Lane):
    """So many of all of these: mostly headers and indexes, which are quick."""

    name = "bad checkpoints"
    tried = "mutated headers, indexes, configs and folders of checkpoints: right, or a clear error"
    counts = "different inputs"

    def control(self) -> Tally:
        """For each judge what it must not let through."""
        with tempfile.TemporaryDirectory() as name, _transformers_quiet():
            return all_caught(_planted(Path(name)))

    def run(self, effort: Effort) -> Tally:
        """Quick: some 1,000; full: 105,000."""
        tally = Tally()
        count = effort.pick(1_000, 105_000)
        with tempfile.TemporaryDirectory() as name, _transformers_quiet():
            folder = Path(name)
            fuzz_headers(tally, count * 45 // 100, 1)
            effort.progress(tally.count, count)
            fuzz_indexes(tally, count * 40 // 100, 2)
            effort.progress(tally.count, count)
            fuzz_configs(tally, count * 14 // 100, 3, folder)
            effort.progress(tally.count, count)
            fuzz_folders(tally, count // 100, 4, folder)
            effort.progress(tally.count, count)
        if effort.full and tally.count < _LEAST:
            tally.add_fault(f"only {tally.count:,} different inputs, expected {_LEAST:,}")
        return tally
