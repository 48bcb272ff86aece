"""Packed units against a decoder of the tests' own, and what packing makes of real weights."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from examples.real_models import RealModel
from tests.python import packed_reference
from tests.python.trained_models import minilm
from torch_offload import _C

__all__ = ["minilm"]  # a fixture: used by name

CODECS = ("raw", "e4p", "e33")
FILLER = 0x5C


def weights_of(patterns: list[int] | torch.Tensor) -> torch.Tensor:
    """bf16 weights of these bit patterns."""
    return torch.as_tensor(patterns, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def expected_place(tensors: list[torch.Tensor]) -> bytes:
    place = b""
    for tensor in tensors:
        plain = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
        place += plain + bytes([FILLER]) * (-len(plain) % 256)
    return place


def unpacked(unit: _C.PackedUnit) -> bytes:
    place = torch.full((unit.place_bytes,), FILLER, dtype=torch.uint8)
    _C.unpack(unit.blob, place)
    return bytes(place.tolist())


def check(tensors: list[torch.Tensor], codec: str | None, pieces: int = 0) -> None:
    """Both decoders give back what was packed."""
    unit = _C.pack(tensors, codec, 2, pieces)
    expected = expected_place(tensors)
    assert unpacked(unit) == expected
    assert packed_reference.decode(bytes(unit.blob.tolist()), unit.place_bytes, FILLER) == expected


@pytest.mark.parametrize("codec", CODECS)
def test_all_patterns_come_back(codec: str) -> None:
    check([weights_of(torch.arange(2**16, dtype=torch.int32))], codec)


def test_memory_that_is_there_is_packed_into() -> None:
    tensors = [weights_of(torch.arange(2**12, dtype=torch.int32))]
    expected = _C.pack(tensors).blob
    memory = torch.full((expected.numel() + 5,), FILLER, dtype=torch.uint8)
    unit = _C.pack(tensors, memory=memory)
    assert unit.blob.data_ptr() == memory.data_ptr()
    assert torch.equal(unit.blob, expected)
    assert memory[expected.numel() :].tolist() == 5 * [FILLER]
    with pytest.raises(ValueError, match=f"of {expected.numel()} bytes, got 8"):
        _C.pack(tensors, memory=memory[:8])
    with pytest.raises(TypeError, match="contiguous uint8 tensor on the CPU"):
        _C.pack(tensors, memory=memory.float())


EXPONENTS = st.lists(st.integers(0, 255), min_size=1, max_size=24)
LENGTHS = st.one_of(
    st.integers(0, 70),
    st.sampled_from([block + off for block in (1024, 2048, 4096, 8192) for off in (-1, 0, 1)]),
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Weights of few or many exponents, or some other type."""
    kind = draw(st.sampled_from(["exponents", "bits", "float32", "uint8"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    length = draw(LENGTHS)

    def random(bound: int) -> torch.Tensor:
        return torch.randint(bound, (length,), generator=generator, dtype=torch.int32)

    if kind == "float32":
        return torch.rand(length, generator=generator)
    if kind == "uint8":
        return random(256).to(torch.uint8)
    if kind == "bits":
        return weights_of(random(2**16))
    exponents = torch.tensor(draw(EXPONENTS), dtype=torch.int32)
    chosen = exponents[random(len(exponents)).long()]
    return weights_of(random(2**16) & 0x807F | chosen << 7)


@settings(max_examples=60, deadline=None)
@given(unit=st.lists(tensors(), max_size=3), codec=st.sampled_from([None, "e4p", "e33"]))
def test_both_decoders_agree_on_any_unit(unit: list[torch.Tensor], codec: str | None) -> None:
    check(unit, codec)


@settings(max_examples=15, deadline=None)
@given(unit=st.lists(tensors(), min_size=1, max_size=2), codec=st.sampled_from(["e4p", "e33"]))
def test_both_decoders_agree_on_any_unit_in_pieces(unit: list[torch.Tensor], codec: str) -> None:
    check(unit, codec, pieces=4096)


def bits_a_weight(unit: list[torch.Tensor]) -> float:
    return 8 * _C.pack(unit).blob.numel() / sum(tensor.numel() for tensor in unit)


def test_normal_weights_take_less_than_11_2_bits() -> None:
    weights = torch.randn(2**20, generator=torch.Generator().manual_seed(1)).mul_(0.02).bfloat16()
    assert bits_a_weight([weights]) < 11.2


def test_trained_weights_take_less_than_11_2_bits(minilm: RealModel) -> None:
    layers = [
        parameter.detach().cpu().bfloat16()
        for name, parameter in minilm.model.named_parameters()
        if "encoder.layer" in name and parameter.dim() == 2
    ]
    assert sum(tensor.numel() for tensor in layers) > 10**7
    assert bits_a_weight(layers) < 11.2


@pytest.mark.parametrize(
    ("edit", "error", "piece"),
    [
        ({8: 9}, NotImplementedError, "format version"),
        ({0: 0}, ValueError, "magic"),
        ({100: 1}, ValueError, "checksum"),
    ],
)
def test_damaged_unit_fails(edit: dict[int, int], error: type[Exception], piece: str) -> None:
    unit = _C.pack([torch.zeros(5000, dtype=torch.bfloat16)])
    blob = unit.blob.clone()
    for at, value in edit.items():
        blob[at] = value
    place = torch.full((unit.place_bytes,), FILLER, dtype=torch.uint8)
    with pytest.raises(error, match=piece):
        _C.unpack(blob, place)
    assert (place == FILLER).all()


def test_unpack_into_another_place_fails() -> None:
    unit = _C.pack([torch.zeros(5000, dtype=torch.bfloat16)])
    with pytest.raises(ValueError, match="another unit"):
        _C.unpack(unit.blob, torch.empty(unit.place_bytes - 256, dtype=torch.uint8))


def test_unpack_of_other_than_bytes_fails() -> None:
    with pytest.raises(TypeError, match="uint8"):
        _C.unpack(torch.zeros(64), torch.empty(64, dtype=torch.uint8))


def test_pack_with_unknown_codec_fails() -> None:
    with pytest.raises(ValueError, match="'e4p' or 'e33'"):
        _C.pack([torch.zeros(8)], "zip")
