"""Checkpoints on disk for benches: one file per module, written by several threads."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

_THREADS = 8
_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def save_checkpoint(model: Any, folder: Path) -> list[Path]:
    """Writes a Llama as `save_pretrained` does, but faster, and each layer into a file of its own.

    AirLLM wants one file per module, and would write a second checkpoint to have it.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        words = name.split(".")
        owner = ".".join(words[:3] if words[1] == "layers" else words[:-1])
        parts.setdefault(owner, {})[name] = parameter
    files = [
        folder / f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        for number in range(1, len(parts) + 1)
    ]
    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(_write, files, parts.values()))
    weight_map = {
        name: path.name for path, part in zip(files, parts.values(), strict=True) for name in part
    }
    size = sum(parameter.nbytes for parameter in model.parameters())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model.config.architectures = [type(model).__name__]
    model.config.dtype = next(model.parameters()).dtype
    model.config.save_pretrained(folder)
    return files


def _write(path: Path, tensors: Mapping[str, nn.Parameter]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            rest = memoryview(tensor.detach().cpu().view(-1).view(torch.uint8).numpy())
            while rest:  # one call writes 2 GiB at most
                rest = rest[file.write(rest) :]


def save_tokenizer(folder: Path) -> None:
    """One that knows no word: some loaders insist on one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(folder)


def drop_from_page_cache(files: list[Path]) -> None:
    """Writes files to the disk where that is still to be done, and lets memory go of them."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
