"""Broken checkpoints, by the ten thousand: headers, indexes and configs.

Each is taken or refused by the error that its reader promises. A header that is taken says what
safetensors reads from the same bytes, an index that is taken stays in its folder.
"""

from __future__ import annotations

import json
import os
import random
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors
import torch
import transformers
from safetensors.torch import save

from torch_offload import CheckpointError, checkpoint
from torch_offload.checkpoint import parse_header, parse_index
from torch_offload.model_files import ModelFileError, read_config
from torch_offload.selfcheck.lane import Effort, Lane, Tally

_ODD = (0, -1, 2**64, 1.5, None, True, "F16", [], [0], [0, 24], [24, 32], [24, None], {}, ["2", 3])
_INDEX = json.dumps(
    {
        "metadata": {"total_size": 32},
        "weight_map": {"a": "x-1-of-2.safetensors", "b": "x-2-of-2.safetensors"},
    }
).encode()
_CONFIG = json.dumps(
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


def file_of(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with this header, as JSON or as it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, dropped, repeated or cut off."""
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


def mutated_header(rng: random.Random) -> bytes:
    """A file whose header was changed, its length mostly made to fit, or any bytes changed."""
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}
    content = save(tensors, metadata={"format": "pt"})
    (length,) = struct.unpack("<Q", content[:8])
    text, data = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.3:
        return mutated(content, rng)
    if rng.random() < 0.5:
        header = json.loads(text)
        name = rng.choice(list(header))
        field = rng.choice(("dtype", "shape", "data_offsets", "extra"))
        header[name][field] = rng.choice(_ODD)
        return file_of(header, data)
    return file_of(mutated(text, rng), data)


def is_header_taken(content: bytes) -> bool:
    """Whether it was taken; if so it is what safetensors reads as well."""
    try:
        parsed = parse_header(content, len(content), "x.safetensors")
    except CheckpointError:
        return False
    expected = dict(safetensors.deserialize(content))
    assert parsed.keys() == expected.keys(), "other names than safetensors reads"
    for name, stored in parsed.items():
        assert 8 <= stored.offset <= stored.offset + stored.size_bytes <= len(content)
        raw = content[stored.offset : stored.offset + stored.size_bytes]
        assert raw == bytes(expected[name]["data"]), f"other bytes of {name}"
        assert list(stored.shape) == expected[name]["shape"], f"another shape of {name}"
    return True


def is_index_taken(text: bytes) -> bool:
    """Whether it was taken; if so its files lie in the folder."""
    try:
        index = parse_index(text, "index.json")
    except CheckpointError:
        return False
    for part in index.values():
        resolved = os.path.normpath(os.path.join("/folder", part))
        assert resolved.startswith("/folder/"), f"{part!r} is outside the folder"
        assert resolved.endswith(".safetensors"), f"{part!r} is another kind of file"
    return True


def is_config_taken(text: bytes, folder: Path) -> bool:
    """Whether transformers makes a config of it."""
    file = folder / "config.json"
    file.write_bytes(text)
    said = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it tells of keys that it does not know
    try:
        read_config(file)
    except ModelFileError:
        return False
    finally:
        transformers.logging.set_verbosity(said)
    return True


class CheckpointFiles(Lane):
    """So many of each."""

    name = "checkpoint files"
    tried = "mutated headers, indexes and configs of checkpoints: read right, or one clear error"
    counts = "inputs"

    def control(self) -> Tally:
        """A reader that takes any number for a count."""
        tally = Tally()
        with mock.patch.object(checkpoint, "_is_count", return_value=True):
            self._try(tally, "headers", 2000, is_header_taken, mutated_header, 2)
        return tally

    def run(self, effort: Effort) -> Tally:
        """Quick: some 2,000; full: 105,000."""
        tally = Tally()
        total = effort.pick(2_050, 105_000)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            parts: list[tuple[str, int, Any, Callable[[random.Random], bytes]]] = [
                ("headers", effort.pick(1000, 60_000), is_header_taken, mutated_header),
                ("indexes", effort.pick(1000, 40_000), is_index_taken, _mutated_index),
                (
                    "configs",
                    effort.pick(50, 5_000),
                    lambda text: is_config_taken(text, folder),
                    _mutated_config,
                ),
            ]
            for seed, (what, count, is_taken, draw) in enumerate(parts):
                self._try(tally, what, count, is_taken, draw, seed)
                effort.progress(tally.count, total)
        return tally

    @staticmethod
    def _try(
        tally: Tally,
        what: str,
        count: int,
        is_taken: Callable[[bytes], bool],
        draw: Callable[[random.Random], bytes],
        seed: int,
    ) -> None:
        rng = random.Random(seed)
        taken = 0
        for _ in range(count):
            content = draw(rng)
            tally.count += 1
            try:
                taken += is_taken(content)
            except Exception as error:  # whatever is not what the reader promises
                tally.add_fault(f"{what}: {content[:200]!r}: {type(error).__name__}: {error}")
        tally.figures[what] = {"taken": taken, "refused": count - taken}
        # Neither may be all: almost right is what is worth trying.
        if not 0 < taken < count:
            tally.add_fault(f"{what}: {taken} of {count} taken")


def _mutated_index(rng: random.Random) -> bytes:
    return mutated(_INDEX, rng)


def _mutated_config(rng: random.Random) -> bytes:
    return mutated(_CONFIG, rng)
