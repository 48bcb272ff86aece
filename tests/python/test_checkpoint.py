"""Headers and indexes of checkpoints, read strictly: broken ones are one clear error, never more.

TORCH_OFFLOAD_FUZZ=100000 runs that many broken inputs instead of the slice of every day.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save

from torch_offload import CheckpointError, checkpoint
from torch_offload.checkpoint import checkpoint_files, parse_header, parse_index, read_header
from torch_offload.model_files import ModelFileError, read_config

ROUNDS = int(os.environ.get("TORCH_OFFLOAD_FUZZ", "3000"))


def _file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _parse(content: bytes) -> Any:
    return parse_header(content, len(content), "x.safetensors")


def _entry(dtype: str = "F32", shape: Any = (2,), span: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


def test_header_says_where_tensors_lie() -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "b": torch.tensor(3.0, dtype=torch.float64),
        "c": torch.zeros(0, 4),
        "d": torch.tensor([True, False, True]),
    }
    content = save(tensors, metadata={"format": "pt"})
    parsed = _parse(content)
    assert parsed.keys() == tensors.keys()
    for name, tensor in tensors.items():
        stored = parsed[name]
        assert (stored.dtype, stored.shape) == (tensor.dtype, tuple(tensor.shape))
        raw = content[stored.offset : stored.offset + stored.size_bytes]
        assert raw == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too short for a header"),
        (b"1234567", "too short for a header"),
        (struct.pack("<Q", 100) + b"{}", "whose header would take 100"),
        (struct.pack("<Q", 2**63) + b"{}", "whose header would take"),
        (b"PK\x03\x04" + b"\0" * 60, "broken or of another kind"),
        (_file(b"not json"), "expected a header of JSON"),
        (_file(b"\xff\xfe{}"), "expected a header of JSON"),
        (_file(b"[" * 100000), "expected a header of JSON"),
        (_file(b'{"a": 1, "a": 2}'), "a name that is there twice"),
        (_file(b'{"__metadata__": {"a": "\\udc80"}}'), "surrogates not allowed"),
        (_file([]), "named tensors in x.safetensors, got list"),
        (_file({"__metadata__": {"a": 1}}), "expected metadata of text"),
        (_file({"a": 3}), "expected dtype, shape and data_offsets for tensor 'a'"),
        (_file({"a": _entry("F31")}, b"\0" * 8), "expected a dtype of BOOL"),
        (_file({"a": _entry(shape=[-2])}, b"\0" * 8), "got -2, where only counts can be"),
        (_file({"a": _entry(shape=[2.0])}, b"\0" * 8), "a shape of whole numbers"),
        (_file({"a": _entry(shape=[True])}, b"\0" * 8), "a shape of whole numbers"),
        (_file({"a": _entry(span=[0])}, b"\0" * 8), "data_offsets of two whole numbers"),
        (_file({"a": _entry(span=[8, 0])}, b"\0" * 8), "8 bytes apart"),
        (_file({"a": _entry(span=[0, 4])}, b"\0" * 8), "8 bytes apart"),
        (_file({"a": _entry(shape=[2**62, 2**62])}, b"\0" * 8), "bytes apart"),
        (_file({"a": _entry(span=[8, 16])}, b"\0" * 16), "to begin where the one before it ends"),
        (_file({"a": _entry(), "b": _entry()}, b"\0" * 8), "to begin where the one before it"),
        (_file({"a": _entry()}, b"\0" * 7), "as its header says, got"),
        (_file({"a": _entry()}, b"\0" * 9), "cut short or written over"),
    ],
)
def test_broken_header_fails(content: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        _parse(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected an index of JSON"),
        ("[]", "expected a 'weight_map'"),
        ('{"weight_map": {}}', "expected a 'weight_map'"),
        ('{"weight_map": {"a": 3}}', "beside the index for 'a'"),
        ('{"weight_map": {"a": "model.bin"}}', "beside the index for 'a'"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "beside the index for 'a'"),
        ('{"weight_map": {"a": "/x.safetensors"}}', "beside the index for 'a'"),
        ('{"weight_map": {"a": "x\\u0000.safetensors"}}', "beside the index for 'a'"),
    ],
)
def test_broken_index_fails(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_index(text, "index.json")


def test_index_that_names_what_no_file_holds_fails(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(save({"a": torch.ones(2)}))
    index = tmp_path / checkpoint.INDEX_NAME
    index.write_text('{"weight_map": {"a": "x.safetensors"}}')
    assert checkpoint_files(tmp_path) == [tmp_path / "x.safetensors"]
    index.write_text('{"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}')
    with pytest.raises(CheckpointError, match="expected 'b' in"):
        checkpoint_files(tmp_path)


def test_file_that_cannot_be_read_fails(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="got No such file"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="got Is a directory"):
        read_header(tmp_path)
    with pytest.raises(CheckpointError, match="which is none"):
        checkpoint_files(tmp_path / "nowhere")


# --- fuzz --------------------------------------------------------------------------------------


def _mutated(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif kind == 1:
            del changed[at : at + rng.randrange(1, 9)]
        elif kind == 2:
            changed[at:at] = rng.choice((b'"', b"0", b"-", b"9" * 20, b"]", b"{", b"null", b"1e9"))
        elif kind == 3 and changed:
            end = rng.randrange(len(changed))
            changed[at:at] = changed[min(at, end) : max(at, end)][:40]
        else:
            changed = changed[:at]
    return bytes(changed)


_ODD = (0, -1, 2**64, 1.5, None, True, "F16", [], [0], [0, 24], [24, 32], [24, None], {}, ["2", 3])


def _mutated_header(rng: random.Random) -> bytes:
    """A file whose header was changed, its length mostly made to fit, or any bytes changed."""
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}
    content = save(tensors, metadata={"format": "pt"})
    (length,) = struct.unpack("<Q", content[:8])
    text, data = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.3:
        return _mutated(content, rng)
    if rng.random() < 0.5:
        header = json.loads(text)
        name = rng.choice(list(header))
        field = rng.choice(("dtype", "shape", "data_offsets", "extra"))
        header[name][field] = rng.choice(_ODD)
        return _file(header, data)
    return _file(_mutated(text, rng), data)


def _check_header(content: bytes) -> bool:
    """Whether it was taken; if so it is what safetensors reads as well."""
    try:
        parsed = _parse(content)
    except CheckpointError:
        return False
    expected = dict(safetensors.deserialize(content))
    assert parsed.keys() == expected.keys()
    for name, stored in parsed.items():
        assert 8 <= stored.offset <= stored.offset + stored.size_bytes <= len(content)
        raw = content[stored.offset : stored.offset + stored.size_bytes]
        assert raw == bytes(expected[name]["data"])
        assert list(stored.shape) == expected[name]["shape"]
    return True


def test_fuzz_of_headers() -> None:
    rng = random.Random(1)
    taken = sum(_check_header(_mutated_header(rng)) for _ in range(ROUNDS))
    assert 0 < taken < ROUNDS


@pytest.mark.parametrize(
    ("name", "weakened"),
    [
        ("_is_count", lambda value: True),
        ("header_length", lambda head, *_: min(struct.unpack("<Q", head[:8])[0], 10**6)),
        ("_check_metadata", lambda metadata, file: metadata.keys()),
    ],
)
def test_fuzz_finds_a_check_that_was_left_out(
    monkeypatch: pytest.MonkeyPatch, name: str, weakened: Callable[..., Any]
) -> None:
    monkeypatch.setattr(checkpoint, name, weakened)
    rng = random.Random(2)
    faults = 0
    for _ in range(3000):
        try:
            _check_header(_mutated_header(rng))
        except Exception:  # whatever a missing check leads to
            faults += 1
    assert faults


def test_fuzz_of_indexes() -> None:
    rng = random.Random(3)
    text = json.dumps(
        {
            "metadata": {"total_size": 32},
            "weight_map": {"a": "x-1-of-2.safetensors", "b": "x-2-of-2.safetensors"},
        }
    ).encode()
    taken = 0
    for _ in range(ROUNDS):
        try:
            index = parse_index(_mutated(text, rng), "index.json")
        except CheckpointError:
            continue
        taken += 1
        for part in index.values():
            resolved = os.path.normpath(os.path.join("/folder", part))
            assert resolved.startswith("/folder/")
            assert resolved.endswith(".safetensors")
    assert 0 < taken < ROUNDS


def test_fuzz_of_configs(tmp_path: Path) -> None:
    rng = random.Random(4)
    file = tmp_path / "config.json"
    text = json.dumps(
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "dtype": "bfloat16",
        }
    ).encode()
    taken = 0
    rounds = ROUNDS // 20
    for _ in range(rounds):
        file.write_bytes(_mutated(text, rng))
        try:
            read_config(file)
        except ModelFileError:
            continue
        taken += 1
    assert 0 < taken < rounds
