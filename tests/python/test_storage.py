"""What stays on the device moves by the bytes that it uses, shared ones once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import torch_offload
from tests.python import expect
from tests.python.dropin import assert_streams_like_plain, rows, streamed, tiny_stack
from torch_offload.checks import check_can_stay_on
from torch_offload.planning import bytes_outside
from torch_offload.storage import ResidentMove, is_aligned, pieces
from torch_offload.structure import size_bytes

HOST = torch.device("cpu")

# Torch says so at the first one of a process.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta:UserWarning")


def askew(num_bytes: int, skip: int = 4) -> torch.Tensor:
    """Bytes that begin at `skip` modulo a cache line."""
    whole = torch.arange(num_bytes + 64 + skip, dtype=torch.int64).to(torch.uint8)
    begin = -whole.data_ptr() % 64 + skip
    return whole[begin : begin + num_bytes]


def members(tensors: list[torch.Tensor]) -> list[tuple[list[int], int]]:
    """Each piece by the positions of its tensors, and its size."""
    position = {id(tensor): index for index, tensor in enumerate(tensors)}
    return [
        (sorted(position[id(tensor)] for tensor in piece.tensors), piece.size_bytes)
        for piece in pieces(tensors)
    ]


class TestPieces:
    """Who moves with whom."""

    def test_views_that_do_not_overlap_are_alone(self) -> None:
        flat = torch.zeros(100)
        assert members([flat[50:60], flat[:50], flat[60:]]) == [([0], 40), ([1], 200), ([2], 160)]

    def test_chains_of_overlaps_are_one(self) -> None:
        flat = torch.zeros(100)
        tensors = [flat[20:40], flat[90:], flat[10:30], flat[12:14], flat[39:50]]
        assert members(tensors) == [([0, 2, 3, 4], 160), ([1], 40)]

    def test_strided_views_reach_as_far_as_their_last_element(self) -> None:
        table = torch.zeros(10, 10)
        assert members([table[:, :5], table[:, 5:]]) == [([0, 1], 400)]
        assert members([table[:5], table[5:]]) == [([0], 200), ([1], 200)]

    def test_what_has_no_bytes_to_compare_is_alone(self) -> None:
        meta = torch.empty(4, device="meta")
        empty = torch.zeros(0)
        found = members([meta, meta.view(2, 2), empty, empty[:]])
        assert found == [([0], 16), ([1], 16), ([2], 0), ([3], 0)]
        assert len(pieces([meta, empty, meta])) == 2

    @given(
        spans=st.lists(
            st.tuples(st.integers(0, 60), st.integers(1, 20)), min_size=1, max_size=8, unique=True
        )
    )
    def test_random_views_are_parted_where_no_byte_is_shared(
        self, spans: list[tuple[int, int]]
    ) -> None:
        flat = torch.zeros(80)
        tensors = [flat[begin : begin + length] for begin, length in spans]
        used = [set(range(begin, begin + length)) for begin, length in spans]
        found = members(tensors)
        together = [set().union(*(used[p] for p in positions)) for positions, _ in found]
        assert sorted(p for positions, _ in found for p in positions) == list(range(len(spans)))
        for index, one in enumerate(together):
            assert all(one.isdisjoint(other) for other in together[index + 1 :])
            assert len(one) == max(one) - min(one) + 1, "a gap: two pieces were one"
            assert found[index][1] == 4 * len(one)


class TestResidentMove:
    """Moving and undoing."""

    def test_only_the_bytes_in_use_are_moved(self, device: torch.device) -> None:
        flat = askew(40_000).view(torch.float32)
        one, other = nn.Parameter(flat[16:32]), nn.Parameter(flat[5000:5008])
        shared = nn.Parameter(flat[20:28])
        values = [tensor.detach().clone() for tensor in (one, other, shared)]
        former = [tensor.data_ptr() for tensor in (one, other, shared)]
        move = ResidentMove(device)
        move.move([one, other, shared])
        assert move.size_bytes == 64 + 32
        for tensor, value in zip((one, other, shared), values, strict=True):
            assert tensor.device.type == device.type
            assert torch.equal(tensor.cpu(), value)
            assert tensor.untyped_storage().nbytes() <= 64
        with torch.no_grad():
            shared.fill_(7)
            assert torch.equal(one[4:12].cpu(), torch.full((8,), 7.0))
            assert torch.equal(flat[20:28], values[2]), "the former bytes were written to"
        move.undo()
        assert [tensor.data_ptr() for tensor in (one, other, shared)] == former

    def test_tensors_of_several_types_keep_their_offsets(self, device: torch.device) -> None:
        raw = askew(256, skip=16)
        half = nn.Parameter(raw[6:30].view(torch.float16), requires_grad=False)
        wide = nn.Parameter(raw[24:88].view(torch.float64), requires_grad=False)
        values = [half.detach().clone(), wide.detach().clone()]
        move = ResidentMove(device)
        move.move([half, wide])
        assert wide.data_ptr() - half.data_ptr() == 18
        for tensor, value in zip((half, wide), values, strict=True):
            got, must = tensor.cpu().view(torch.uint8), value.view(torch.uint8)
            assert torch.equal(got, must)

    def test_sparse_tensors_move_with_all_that_they_are_made_of(self, device: torch.device) -> None:
        for name, make in SPARSE.items():
            if device.type == "cuda" and name != "sparse_coo":
                continue  # `offload` refuses it
            tensor = make(torch.eye(8))
            values = tensor.to_dense()
            move = ResidentMove(device)
            moved: list[int] = []
            move.move([tensor], advance=moved.append)
            assert tensor.device.type == device.type
            assert torch.equal(tensor.to_dense().cpu(), values)
            assert moved == [move.size_bytes] == [size_bytes(tensor)]
            move.undo()
            assert tensor.device.type == "cpu"
            assert torch.equal(tensor.to_dense(), values)

    def test_aligned_tensors_stay_where_they_are_on_the_host(self) -> None:
        flat = askew(4096, skip=0).view(torch.float32)
        tensors = [flat[:64], flat[32:96], flat[128:]]
        former = [tensor.data_ptr() for tensor in tensors]
        move = ResidentMove(HOST)
        move.move(tensors)
        assert [tensor.data_ptr() for tensor in tensors] == former
        assert move.size_bytes == 384 + 4096 - 512
        assert move.former_devices() == []


SPARSE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sparse_coo": lambda dense: dense.to_sparse(),
    "sparse_csr": lambda dense: dense.to_sparse_csr(),
    "sparse_csc": lambda dense: dense.to_sparse_csc(),
    "sparse_bsr": lambda dense: dense.to_sparse_bsr((4, 4)),
    "sparse_bsc": lambda dense: dense.to_sparse_bsc((4, 4)),
}


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("sparse_coo", 2 * 8 * 8 + 8 * 4),
        ("sparse_csr", 9 * 8 + 8 * 8 + 8 * 4),
        ("sparse_csc", 9 * 8 + 8 * 8 + 8 * 4),
        ("sparse_bsr", 3 * 8 + 2 * 8 + 2 * 16 * 4),
        ("sparse_bsc", 3 * 8 + 2 * 8 + 2 * 16 * 4),
    ],
)
def test_size_of_a_sparse_tensor_is_that_of_its_parts(layout: str, expected: int) -> None:
    tensor = SPARSE[layout](torch.eye(8))
    assert size_bytes(tensor) == expected
    assert members([torch.eye(8), tensor]) == [([0], 256), ([1], expected)]
    assert is_aligned(tensor)


class _Mixing(nn.Module):
    """A block with a sparse matrix beside its dense weights, as graph networks have."""

    def __init__(self, dense: nn.Module, layout: str, *, as_parameter: bool) -> None:
        super().__init__()
        self.dense = dense
        self.layout = layout
        matrix = SPARSE[layout](torch.eye(16).roll(1, 0) * torch.linspace(0.5, 2, 16))
        if as_parameter:
            self.matrix = nn.Parameter(matrix, requires_grad=False)
        else:
            self.register_buffer("matrix", matrix)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        matrix = self.matrix.to_dense() if self.layout == "sparse_bsc" else self.matrix
        mixed: torch.Tensor = self.dense((matrix @ x.t()).t())
        return mixed


@pytest.mark.parametrize("options", [{}, {"granularity": "module"}, {"masters": "packed"}], ids=str)
@pytest.mark.parametrize("as_parameter", [True, False])
@pytest.mark.parametrize("layout", SPARSE)
@torch.no_grad()
def test_model_with_sparse_tensors_streams_as_any_other(
    device: torch.device, layout: str, as_parameter: bool, options: dict[str, Any]
) -> None:
    def build() -> Any:
        model = tiny_stack()
        for block in model.blocks:
            block.attn = _Mixing(block.attn, layout, as_parameter=as_parameter)
        return torch_offload.align(model)

    if device.type == "cuda" and layout != "sparse_coo":
        with pytest.raises(ValueError, match=r"blocks\.0\.attn\.matrix.*to_sparse_coo"):
            torch_offload.offload(build(), device)
        return
    model, plain = build(), build().to(device)
    before = {name: (p, p.device) for name, p in model.named_parameters()}
    matrices = [block.attn.matrix for block in model.blocks]
    x = rows(device)
    if "masters" in options:
        options = options | {"transport": "packed"}
    with streamed(model, device, **options) as handle:
        streams = {name for unit in handle.units if unit.place for name in unit.parameters}
        assert "blocks.1.attn.dense.weight" in streams
        assert not any("matrix" in name for name in streams)
        held = [t for t in matrices if t.device.type == device.type]
        assert handle.stats.bytes_resident >= sum(size_bytes(matrix) for matrix in held) > 0
        if handle.config.granularity == "module":
            model(x)  # cuts the leaves
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))
        model.load_state_dict(model.state_dict())
        assert torch.equal(model(x), plain(x))
    assert {name: (p, p.device) for name, p in model.named_parameters()} == before
    for block, matrix in zip(model.blocks, matrices, strict=True):
        assert block.attn.matrix is matrix
        assert matrix.device.type == "cpu"
    assert torch.equal(model(x.cpu()), plain.cpu()(x.cpu()))


@pytest.mark.parametrize("layout", SPARSE)
def test_compressed_sparse_tensor_that_would_have_to_move_fails(layout: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_buffer("matrix", SPARSE[layout](torch.eye(8)))
    check_can_stay_on(HOST, model)
    if layout == "sparse_coo":
        check_can_stay_on(torch.device("cuda", 0), model)
        return
    with pytest.raises(ValueError, match=rf"'0\.matrix' as torch\.{layout} on cpu.*to_sparse_coo"):
        check_can_stay_on(torch.device("cuda", 0), model)


def test_align_heeds_no_default_device() -> None:
    model = nn.Linear(4, 4)
    values = torch.arange(16.0).view(4, 4)
    model.weight.data = askew(64).view(torch.float32).view(4, 4).copy_(values)
    with torch.device("meta"):
        torch_offload.align(model)
    assert model.weight.device.type == "cpu"
    assert model.weight.data_ptr() % 256 == 0
    assert torch.equal(model.weight, values)


@torch.no_grad()
def test_offload_heeds_no_default_device(device: torch.device) -> None:
    model = tiny_stack()
    for parameter in model.parameters():  # so that what stays has to move on the host as well
        raw = askew(parameter.nbytes).view(torch.float32).view(parameter.shape)
        parameter.data = raw.copy_(parameter)
    plain = torch_offload.align(copy.deepcopy(model)).to(device)
    x = rows(device)
    must = plain(x)
    for options in ({}, {"transport": "packed"}, {"granularity": "module"}):
        with torch.device("meta"), streamed(model, device, **options) as handle:
            assert torch.equal(model(x), must)
            assert torch.equal(model(x), must)
            with handle.profile():
                model(x)
            handle.explain()
            handle.replan(gpu_budget=None)
            assert torch.equal(model(x), must)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def in_one_storage(model: nn.Module) -> Any:
    """Makes every weight a view of one vector, as optimizers and averages of models do."""
    vector_to_parameters(parameters_to_vector(model.parameters()).detach(), model.parameters())
    return model


@pytest.mark.parametrize("share", [None, 0.5])
@torch.no_grad()
def test_model_in_one_storage_streams_as_any_other(
    device: torch.device, share: float | None
) -> None:
    plain = tiny_stack()
    whole = sum(parameter.nbytes for parameter in plain.parameters())
    budget = None if share is None else int(share * whole)
    packed = in_one_storage(copy.deepcopy(plain))
    assert len({p.untyped_storage().data_ptr() for p in packed.parameters()}) == 1
    assert bytes_outside(packed, [], set()) == bytes_outside(plain, [], set())
    counts = []
    for model in (plain, packed):
        x = rows(device)
        must = torch_offload.align(copy.deepcopy(model)).to(device)(x)
        with torch_offload.offload(model, device, gpu_budget=budget) as handle:
            assert torch.equal(model(x), must)
            stats = handle.stats
            counts.append((stats.bytes_resident, stats.window_bytes, stats.host_bytes))
            assert budget is None or stats.bytes_resident + stats.window_bytes <= budget
            expect.assert_at_rest(handle)
    assert counts[0] == counts[1]
