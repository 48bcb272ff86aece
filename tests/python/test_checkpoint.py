"""Headers and indexes of checkpoints, read strictly: broken ones are one clear error."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from tests.lanes.bad_checkpoints import file_of, fuzz_headers
from torch_offload import CheckpointError, checkpoint
from torch_offload.checkpoint import parse_header, parse_index, read_header, stored_tensors
from torch_offload.selfcheck.lane import Tally


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
        (file_of(b"not json"), "expected a header of JSON"),
        (file_of(b"\xff\xfe{}"), "expected a header of JSON"),
        (file_of(b"[" * 100000), "expected a header of JSON"),
        (file_of(b'{"a": 1, "a": 2}'), "a name that is there twice"),
        (file_of([]), "named tensors in x.safetensors, got list"),
        (file_of({"__metadata__": {"a": 1}}), "expected metadata of text"),
        (file_of({"__metadata__": {"a": "\udc80"}}), "surrogates not allowed"),
        (file_of({"a\udc80": _entry()}, b"\0" * 8), "surrogates not allowed"),
        (file_of({"a": 3}), "expected dtype, shape and data_offsets for tensor 'a'"),
        (file_of({"a": _entry("F31")}, b"\0" * 8), "expected a dtype of BOOL"),
        (file_of({"a": _entry(shape=[-2])}, b"\0" * 8), "got -2, where only counts can be"),
        (file_of({"a": _entry(shape=[2.0])}, b"\0" * 8), "a shape of whole numbers"),
        (file_of({"a": _entry(shape=[True])}, b"\0" * 8), "a shape of whole numbers"),
        (file_of({"a": _entry(span=[0])}, b"\0" * 8), "data_offsets of two whole numbers"),
        (file_of({"a": _entry(span=[8, 0])}, b"\0" * 8), "8 bytes apart"),
        (file_of({"a": _entry(span=[0, 4])}, b"\0" * 8), "8 bytes apart"),
        (file_of({"a": _entry(shape=[2**62, 2**62])}, b"\0" * 8), "bytes apart"),
        (file_of({"a": _entry(span=[8, 16])}, b"\0" * 16), "to begin where the one before it ends"),
        (file_of({"a": _entry(), "b": _entry()}, b"\0" * 8), "to begin where the one before it"),
        (file_of({"a": _entry()}, b"\0" * 7), "as its header says, got"),
        (file_of({"a": _entry()}, b"\0" * 9), "cut short or written over"),
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
    assert list(stored_tensors(tmp_path)) == [tmp_path / "x.safetensors"]
    index.write_text('{"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}')
    with pytest.raises(CheckpointError, match="expected 'b' in"):
        stored_tensors(tmp_path)


def test_file_that_cannot_be_read_fails(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="got No such file"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="got Is a directory"):
        read_header(tmp_path)
    with pytest.raises(CheckpointError, match="which is none"):
        stored_tensors(tmp_path / "nowhere")


# --- fuzz: tests/lanes/bad_checkpoints.py ---------------------------------------------------------


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
    tally = Tally()
    fuzz_headers(tally, 3000, seed=2)
    assert tally.num_faults
