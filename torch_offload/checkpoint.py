"""Checkpoints on disk: safetensors files, read strictly and without loading a weight."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torch_offload.names import first_line

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# As safetensors itself: a longer header is a broken file, not a large model.
_MOST_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


class CheckpointError(ValueError):
    """A folder or file that holds no checkpoint that can be streamed; the message says why."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        dtype: As stored.
        shape: As stored, contiguous.
        offset: Of its first byte in the file.
        size_bytes: What it takes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


def parse_header(head: bytes, file_bytes: int, file: str) -> dict[str, StoredTensor]:
    """Reads the header of a safetensors file.

    Args:
        head: The begin of the file: its length field and header, and whatever follows.
        file_bytes: How large the file is.
        file: Its name, for errors.

    Raises:
        CheckpointError: If the header is broken, or does not describe a file of this size.
    """
    header_bytes = header_length(head, file_bytes, file)
    text = head[_LENGTH_BYTES : _LENGTH_BYTES + header_bytes]
    try:
        header = json.loads(
            text.decode("utf-8"), object_pairs_hook=_checked_fields, parse_int=_count
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"expected a header of JSON in {file}, got {first_line(error)}"
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError(
            f"expected a header of named tensors in {file}, got {type(header).__name__}"
        )
    _check_metadata(header.pop("__metadata__", {}), file)
    begin = _LENGTH_BYTES + header_bytes
    tensors = {name: _tensor(name, entry, begin, file) for name, entry in header.items()}
    reached = begin
    for name, tensor in sorted(tensors.items(), key=lambda one: (one[1].offset, one[1].size_bytes)):
        if tensor.offset != reached:
            raise CheckpointError(
                f"expected tensor {name!r} of {file} to begin where the one before it ends, at "
                f"byte {reached}, got {tensor.offset}"
            )
        reached += tensor.size_bytes
    if reached != file_bytes:
        raise CheckpointError(
            f"expected {file} to take {reached} bytes, as its header says, got {file_bytes}; it "
            "was cut short or written over: copy or download it again"
        )
    return tensors


def header_length(head: bytes, file_bytes: int, file: str) -> int:
    """Reads how long a header is.

    Raises:
        CheckpointError: If it does not fit the file.
    """
    if len(head) < _LENGTH_BYTES:
        raise CheckpointError(
            f"expected a safetensors file in {file}, got one of {file_bytes} bytes, too short for "
            "a header"
        )
    (header_bytes,) = struct.unpack("<Q", head[:_LENGTH_BYTES])
    if header_bytes > min(_MOST_HEADER_BYTES, file_bytes - _LENGTH_BYTES):
        raise CheckpointError(
            f"expected a safetensors file in {file}, got one of {file_bytes} bytes whose header "
            f"would take {header_bytes}; it is broken or of another kind"
        )
    return int(header_bytes)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Reads and checks the header of a file. Reads no weight.

    Raises:
        CheckpointError: If there is no such file, or its header is broken.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_LENGTH_BYTES)
            head += file.read(header_length(head, file_bytes, str(path)))
    except OSError as error:
        raise CheckpointError(
            f"expected a safetensors file that can be read at {path}, got {error.strerror}"
        ) from error
    return parse_header(head, file_bytes, str(path))


def parse_index(text: str | bytes, file: str) -> dict[str, str]:
    """Reads the index of a checkpoint in several files: which tensor is in which.

    Raises:
        CheckpointError: If it is broken, or names a file outside the folder.
    """
    try:
        index = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"expected an index of JSON in {file}, got {first_line(error)}"
        ) from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"expected a 'weight_map' of names and files in {file}, got none")
    for name, part in weight_map.items():
        if (
            not isinstance(part, str)
            or not part.endswith(".safetensors")
            or "\0" in part
            or Path(part).is_absolute()
            or ".." in Path(part).parts
        ):
            raise CheckpointError(
                f"expected a safetensors file beside the index for {name!r} in {file}, got {part!r}"
            )
    return weight_map


def stored_tensors(folder: Path) -> dict[Path, Mapping[str, StoredTensor]]:
    """The safetensors files of a checkpoint folder with what each holds. Reads headers, no weight.

    Of ``model.safetensors`` where there is one; else by the folder's index: every file that it
    names is there, its header fits it, and it holds what the index says.

    Raises:
        CheckpointError: If that is not so, or the weights are pickled.
    """
    if not folder.is_dir():
        raise CheckpointError(f"expected a checkpoint folder, got {str(folder)!r}, which is none")
    if (single := folder / SINGLE_NAME).is_file():
        return {single: read_header(single)}
    index_file = folder / INDEX_NAME
    if not index_file.is_file():
        raise CheckpointError(_nothing_found(folder))
    try:
        text = index_file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"expected an index at {index_file}, got {error.strerror}") from error
    index = parse_index(text, str(index_file))
    files = [folder / part for part in sorted(set(index.values()))]
    headers: dict[Path, Mapping[str, StoredTensor]] = {path: read_header(path) for path in files}
    for name, part in index.items():
        if name not in headers.get(folder / part, {}):
            raise CheckpointError(f"expected {name!r} in {folder / part}, as the index says")
    return headers


def _nothing_found(folder: Path) -> str:
    pickled = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickled:
        return (
            f"expected safetensors files in {folder}, got {pickled[0]}, a pickle: it cannot be "
            "mapped, and loading it can run any code; convert it once with "
            "model.save_pretrained(folder)"
        )
    return f"expected {SINGLE_NAME} or {INDEX_NAME} in {folder}, got neither"


def _checked_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name that is there twice")
    for text in (*fields, *fields.values()):
        if isinstance(text, str):
            text.encode()  # half a character, written as an escape, is a ValueError
    return fields


def _count(digits: str) -> int:
    if digits.startswith("-"):
        raise ValueError(f"{digits[:20]}, where only counts can be")
    return int(digits)


def _check_metadata(metadata: object, file: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            f"expected metadata of text in the header of {file}, got {metadata!r}"
        )


def _tensor(name: str, entry: object, begin: int, file: str) -> StoredTensor:
    def wrong(what: str, got: object) -> CheckpointError:
        return CheckpointError(f"expected {what} for tensor {name!r} of {file}, got {got!r}")

    if not isinstance(entry, dict):
        raise wrong("dtype, shape and data_offsets", entry)
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry.get("dtype"), str) else None
    if dtype is None:
        raise wrong(f"a dtype of {', '.join(_DTYPES)}", entry.get("dtype"))
    shape = entry.get("shape")
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise wrong("a shape of whole numbers", shape)
    span = entry.get("data_offsets")
    if not isinstance(span, list) or len(span) != 2 or not all(_is_count(at) for at in span):
        raise wrong("data_offsets of two whole numbers", span)
    size_bytes = math.prod(shape) * dtype.itemsize
    if span[1] - span[0] != size_bytes:
        raise wrong(f"data_offsets that are {size_bytes} bytes apart, as its shape is", span)
    return StoredTensor(dtype, tuple(shape), begin + span[0], size_bytes)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
