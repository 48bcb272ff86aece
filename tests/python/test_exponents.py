"""Exponents are counted where the weights are, once, and tell just what the encoder decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.python.dropin import packable_llama
from torch_offload import _C, exponents, offload, packing
from torch_offload.exponents import count_exponents, count_exponents_by_torch
from torch_offload.packing import packed_bytes_of

PIECE = _C.counted_weights


def weights(num_weights: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_weights)
    if kind == "normal":
        return (torch.randn(num_weights, generator=generator) * 0.02).bfloat16()
    if kind == "zero":
        return torch.zeros(num_weights, dtype=torch.bfloat16)
    if kind == "nan":
        return torch.full((num_weights,), torch.nan).bfloat16()
    bits = torch.randint(-(2**15), 2**15, (num_weights,), generator=generator)
    return bits.to(torch.int16).view(torch.bfloat16)


def reference_counts(flat: torch.Tensor) -> torch.Tensor:
    """Piece by piece, in plain Python."""
    pieces = []
    for begin in range(0, flat.numel(), PIECE):
        words = flat[begin : begin + PIECE].view(torch.int16).int() & 0xFFFF
        pieces.append(torch.bincount(words % 0x8000 // 128, minlength=256).int())
    return torch.stack(pieces) if pieces else torch.zeros(0, 256, dtype=torch.int32)


@pytest.mark.parametrize("kind", ["normal", "zero", "nan", "bits"])
@pytest.mark.parametrize("size", [0, 1, 4095, PIECE - 1, PIECE, PIECE + 1, 17 * PIECE + 5])
def test_counts_of_the_host_and_of_torch_are_the_reference(size: int, kind: str) -> None:
    flat = weights(size, kind)
    expected = reference_counts(flat)
    for counts in (_C.count_exponents(flat), count_exponents_by_torch(flat)):
        assert counts.dtype == torch.int32
        assert torch.equal(counts, expected)
        assert int(counts.sum()) == size


@given(
    st.lists(
        st.tuples(st.integers(0, 70_000), st.sampled_from(["normal", "zero", "nan", "bits"])),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_size_by_counts_is_that_of_the_blob(drawn: list[tuple[int, str]], by_torch: bool) -> None:
    tensors = [weights(size, kind) for size, kind in drawn]
    count = count_exponents_by_torch if by_torch else _C.count_exponents
    room = _C.packed_room([t.nbytes for t in tensors], [count(t) for t in tensors])
    blob = _C.pack(tensors).blob.numel()
    assert room == _C.packed_room_bytes(blob)


def test_other_types_count_as_they_are() -> None:
    single = torch.randn(1000)
    assert count_exponents(single) is None
    blob = _C.pack([single]).blob.numel()
    assert _C.packed_room([single.nbytes], [None]) == _C.packed_room_bytes(blob)


def test_transposed_weights_are_counted_as_they_lie() -> None:
    flat = weights(2 * PIECE, "normal")
    across = flat.view(-1, 512).t()
    counts = count_exponents(across)
    assert counts is not None
    assert torch.equal(counts, reference_counts(flat))


def test_counts_of_something_else_are_refused() -> None:
    flat = weights(PIECE + 1, "normal")
    counts = _C.count_exponents(flat)
    for wrong in (counts[:1], counts.long(), counts[:, :255], counts.t()):
        with pytest.raises(ValueError, match="expected counts of"):
            _C.packed_room([flat.nbytes], [wrong])
    with pytest.raises(ValueError, match="for each of 2 tensors, got 1"):
        _C.packed_room([flat.nbytes, 2], [counts])
    with pytest.raises(TypeError, match="bfloat16 tensor on the CPU"):
        _C.count_exponents(flat.float())
    with pytest.raises(TypeError, match="contiguous"):
        _C.count_exponents(flat[: 2 * (PIECE // 2)].view(-1, 2).t())


# --- offload -------------------------------------------------------------------------------------


@pytest.mark.parametrize("masters", ["plain", "packed"])
@pytest.mark.parametrize("granularity", ["sublayer", "auto"])
@pytest.mark.parametrize("share", [None, 0.8])
def test_offload_counts_every_weight_once(
    monkeypatch: pytest.MonkeyPatch, share: float | None, granularity: Any, masters: Any
) -> None:
    read: list[int] = []

    def counting(parameter: torch.Tensor) -> torch.Tensor | None:
        read.append(parameter.data_ptr())
        return count_exponents(parameter)

    monkeypatch.setattr(packing, "count_exponents", counting)
    model = packable_llama()
    whole = sum(parameter.nbytes for parameter in model.parameters())
    budget = None if share is None else int(share * whole)
    options: Any = {"granularity": granularity, "masters": masters, "gpu_budget": budget}
    with offload(model, "cpu", transport="packed", **options):
        assert read
        assert len(read) == len(set(read)), "weights were counted more than once"


@pytest.mark.parametrize("by_torch", [False, True])
def test_planned_sizes_are_those_of_the_packed_units(
    monkeypatch: pytest.MonkeyPatch, by_torch: bool
) -> None:
    if by_torch:
        monkeypatch.setattr(exponents._C, "count_exponents", count_exponents_by_torch)
    model = packable_llama()
    plain = {
        name: parameter.detach().clone().view(-1) for name, parameter in model.named_parameters()
    }
    with offload(model, "cpu", transport="packed") as handle:
        packed = [unit for unit in handle.units if unit.transport == "packed"]
        assert packed
        for unit in packed:
            assert unit.copied_bytes == _C.pack([plain[n] for n in unit.parameters]).blob.numel()
            room = packed_bytes_of([(name, plain[name]) for name in unit.parameters], {})
            assert room == _C.packed_room_bytes(unit.copied_bytes)


@pytest.mark.parametrize("masters", ["plain", "packed"])
def test_weights_that_change_behind_their_count_fail_and_are_as_they_were(
    monkeypatch: pytest.MonkeyPatch, masters: Any
) -> None:
    """Somebody writes from another thread while the model is offloaded."""
    model = packable_llama()
    weight = model.model.layers[0].mlp.down_proj.weight

    def disturbed(parameter: torch.Tensor) -> torch.Tensor | None:
        counts = count_exponents(parameter)
        if parameter is weight:
            with torch.no_grad():
                parameter.view(-1)[: parameter.numel() // 2].mul_(2.0**40)
        return counts

    monkeypatch.setattr(packing, "count_exponents", disturbed)
    with pytest.raises(_C.StateError, match="stay as they are while they are packed"):
        offload(model, "cpu", transport="packed", masters=masters)
    assert all(type(parameter) is torch.nn.Parameter for parameter in model.parameters())
    assert bool((weight.abs() > 1e6).any())
    monkeypatch.undo()
    with offload(model, "cpu", transport="packed", masters=masters) as handle:
        assert any(unit.transport == "packed" for unit in handle.units)


@pytest.mark.parametrize("rows", [32, 512])
@pytest.mark.parametrize(
    "edit",
    [
        *[lambda w, s=step: w * 2 ** (s / 8) for step in range(1, 8)],
        *[
            lambda w, r=rank, a=alpha: (
                w + a * 0.02 * torch.randn(w.shape[0], r) @ torch.randn(r, w.shape[1]) / r**0.5
            )
            for rank, alpha in ((8, 0.1), (16, 1.0), (64, 3.0))
        ],
        lambda w: w + 0.02 * torch.randn_like(w),
    ],
)
def test_edits_fit_the_room_of_the_unit(edit: Any, rows: int) -> None:
    torch.manual_seed(rows)
    before = (torch.randn(rows, 4096) * 0.02).bfloat16()
    room = _C.packed_room_bytes(_C.pack([before]).blob.numel())
    assert _C.pack([edit(before.float()).bfloat16()]).blob.numel() <= room
