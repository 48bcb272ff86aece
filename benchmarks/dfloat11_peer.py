"""DFloat11 on the benchmarks' models: its decoder and its offloading, its format written here.

Its own encoder takes 13 minutes for a layer of Llama-70B's shape, a symbol at a time in Python;
the same bits are put together here by torch, in a second a layer. What it makes of them is its own:
tables, kernel and hook are the package's (https://github.com/LeanModels/DFloat11, 0.5.0).
"""

from __future__ import annotations

import contextlib
import io
import sys
import types
from pathlib import Path
from typing import Any

import torch
from clocks import DEVICE
from torch import nn

# Of one layer, in the order in which the package's Llama models combine them.
_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_BYTES_PER_THREAD = 8
_THREADS_PER_BLOCK = 512
_BITS_PER_THREAD = 8 * _BYTES_PER_THREAD
_CHUNK = 2**25


def _package() -> Any:
    """The package. It asks pkg_resources for its kernel, which newer setuptools do not have.

    Raises:
        ImportError: If it, dahuffman or cupy is not there.
    """
    import importlib.util

    if importlib.util.find_spec("pkg_resources") is None:
        stand_in = types.ModuleType("pkg_resources")

        def resource_filename(package: str, name: str) -> str:
            spec = importlib.util.find_spec(package)
            assert spec is not None
            assert spec.origin is not None
            return str(Path(spec.origin).parent / name)

        vars(stand_in)["resource_filename"] = resource_filename
        sys.modules["pkg_resources"] = stand_in
    from dfloat11 import dfloat11

    return dfloat11


class Encoded:
    """Huffman codes of symbols, as DFloat11's kernel reads them.

    Attributes:
        codes: The codes, most significant bit first, the last byte filled by the code that ends.
        gaps: For every thread the bits until its first code begins, 5 bits each.
        output_positions: For every block of threads the number of its first symbol; then all.
    """

    def __init__(
        self, symbols: torch.Tensor, table: dict[Any, tuple[int, int]], end: tuple[int, int]
    ) -> None:
        device = symbols.device
        lengths = torch.zeros(256, dtype=torch.int64)
        values = torch.zeros(256, dtype=torch.int64)
        for symbol, (length, value) in table.items():
            if isinstance(symbol, int):
                lengths[symbol], values[symbol] = length, value
        lengths, values = lengths.to(device), values.to(device)
        counts = torch.bincount(symbols, minlength=256)
        total_bits = int((counts * lengths).sum())
        words = torch.zeros(total_bits // 32 + 3, dtype=torch.int64, device=device)
        gaps, positions = [], []
        begin_bits, last_start = 0, -1
        for first in range(0, symbols.numel(), _CHUNK):
            chunk = symbols[first : first + _CHUNK].long()
            length = lengths[chunk]
            starts = torch.cumsum(length, 0) - length + begin_bits
            _put(words, starts, length, values[chunk])
            previous = torch.cat((starts.new_tensor([last_start]), starts[:-1]))
            gaps.append(_first_of(starts, previous, _BITS_PER_THREAD, starts))
            numbers = torch.arange(first, first + chunk.numel(), device=device)
            positions.append(
                _first_of(starts, previous, _BITS_PER_THREAD * _THREADS_PER_BLOCK, numbers)
            )
            last_start = int(starts[-1])
            begin_bits = last_start + int(length[-1])
        if total_bits % 8:  # the code that ends begins like a symbol's
            start = words.new_tensor([total_bits])
            previous = words.new_tensor([last_start])
            _put(words, start, words.new_tensor([end[0]]), words.new_tensor([end[1]]))
            gaps.append(_first_of(start, previous, _BITS_PER_THREAD, start))
            number = words.new_tensor([symbols.numel()])
            positions.append(
                _first_of(start, previous, _BITS_PER_THREAD * _THREADS_PER_BLOCK, number)
            )
        num_bytes = (total_bits + 7) // 8
        shifts = torch.tensor([24, 16, 8, 0], device=device)
        codes = [
            (part[:, None] >> shifts).to(torch.uint8).reshape(-1) for part in words.split(2**24)
        ]
        self.codes = torch.cat(codes)[:num_bytes]
        num_blocks = -(-num_bytes // (_THREADS_PER_BLOCK * _BYTES_PER_THREAD))
        starts = torch.cat(gaps)
        gap = torch.zeros(num_blocks * _THREADS_PER_BLOCK, dtype=torch.int64, device=device)
        gap[: starts.numel()] = starts % _BITS_PER_THREAD
        bits = (gap[:, None] >> torch.arange(4, -1, -1, device=device)) & 1
        weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], device=device)
        self.gaps = (bits.reshape(-1, 8) * weights).sum(1).to(torch.uint8)
        positions.append(words.new_tensor([symbols.numel()]))
        self.output_positions = torch.cat(positions).to(torch.int32).view(torch.uint32)


def _put(
    words: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, values: torch.Tensor
) -> None:
    """Adds codes that begin at these bits to words of 32; none overlaps another."""
    aligned = values << (64 - lengths - starts % 32)
    index = starts // 32
    words.index_add_(0, index, (aligned >> 32) & 0xFFFFFFFF)
    words.index_add_(0, index + 1, aligned & 0xFFFFFFFF)


def _first_of(
    starts: torch.Tensor, previous: torch.Tensor, bits: int, answer: torch.Tensor
) -> torch.Tensor:
    """What `answer` says of each code that is the first to begin within a stretch of so many."""
    return answer[starts // bits > torch.div(previous, bits, rounding_mode="floor")]


class DFloat11Offload:
    """Codes wait in pinned memory; a layer's are copied, decoded and used one after another."""

    def __init__(self, model: nn.Module) -> None:
        package = _package()
        self.model: Any = model
        for layer in self.model.model.layers:
            _compress(package, layer)

    def __enter__(self) -> DFloat11Offload:
        return self

    def __exit__(self, *_: object) -> None:
        self.model = None


def _compress(package: Any, layer: Any) -> None:
    """As the package's loader leaves a layer whose larger tensors are offloaded."""
    linears = [layer.get_submodule(name) for name in _LINEARS]
    weights = [linear.weight.detach().reshape(-1) for linear in linears]
    bits = torch.cat(weights).view(torch.int16)
    for linear in linears:
        del linear.weight
    sizes = [weight.numel() for weight in weights]
    del weights
    exponents = ((bits >> 7) & 0xFF).to(torch.uint8)
    others = (((bits >> 8) & 0x80) | (bits & 0x7F)).to(torch.uint8)
    counts = torch.bincount(exponents, minlength=256).tolist()
    counter = {symbol: count for symbol, count in enumerate(counts) if count}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its tables
        codec, _, table = package.get_32bit_codec(counter)
        luts = package.get_luts(table)
    encoded = Encoded(exponents, table, codec._table[codec._eof])
    positions = encoded.output_positions.cpu()
    layer.offloaded_tensors = {
        "encoded_exponent": encoded.codes.cpu().pin_memory(),
        "sign_mantissa": others.cpu().pin_memory(),
    }
    layer.register_buffer("luts", luts.to(DEVICE))
    layer.register_buffer("gaps", encoded.gaps)
    layer.register_buffer("output_positions", encoded.output_positions)
    layer.split_positions = torch.tensor(sizes).cumsum(0)[:-1].tolist()
    layer.weight_injection_modules = linears
    largest = int(positions.to(torch.int64).diff().max())
    layer.shared_mem_size = _THREADS_PER_BLOCK * 4 + 4 + largest * 2
    layer.register_forward_pre_hook(package.get_hook((_THREADS_PER_BLOCK,), _BYTES_PER_THREAD))
