"""Which units are found in each family, and that every read of a streamed weight is inside one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import nn

from tests.python.models import CASES, Case, names_of
from tests.python.zoo.case import library
from tests.python.zoo.plain import WIDTH, Attention, Block, Mlp, Stack
from torch_offload.reads import ReadTrace, trace_reads
from torch_offload.structure import attribute_name, is_table, size_bytes
from torch_offload.units import UnitSpec, find_units, leaf_units

LANGUAGE_MODELS = names_of("causal-lm", "encoder", "seq2seq")
# Its altup is never called by its own name, so it has no place among the calls.
UNORDERED = {"gemma3n"}


@dataclass(frozen=True)
class Survey:
    """One model, its sublayer units, and what a forward of it read."""

    case: Case
    model: nn.Module
    units: list[UnitSpec]
    trace: ReadTrace


@cache  # about 100 MB of tiny models, each built and traced once
def survey(name: str) -> Survey:
    case = CASES[name]
    model = case.build()
    with torch.no_grad(), trace_reads(model) as trace:
        model(**case.inputs())
    return Survey(case, model, find_units(model), trace)


def owners(units: list[UnitSpec]) -> dict[str, nn.Module]:
    return {name: unit.module for unit in units for name, _ in unit.parameters}


def streamed_bytes(units: list[UnitSpec]) -> int:
    return sum(unit.num_bytes for unit in units)


@pytest.mark.parametrize("name", list(CASES))
class TestZoo:
    """What holds for every family."""

    def test_halves_of_family_are_found(self, name: str) -> None:
        found = survey(name)
        parts = Counter(
            "" if unit.name.isdigit() else attribute_name(unit.name) for unit in found.units
        )
        assert parts == Counter(found.case.units)
        modules = dict(found.model.named_modules())
        assert all(modules[unit.name] is unit.module for unit in found.units)

    def test_parameters_belong_to_one_unit_and_first_one_stays(self, name: str) -> None:
        found = survey(name)
        parameters = dict(found.model.named_parameters(remove_duplicate=False))
        streamed = [pair for unit in found.units for pair in unit.parameters]
        assert all(parameters[full_name] is parameter for full_name, parameter in streamed)
        assert len({id(parameter) for _, parameter in streamed}) == len(streamed)
        assert next(found.model.parameters()) not in {parameter for _, parameter in streamed}

    @pytest.mark.parametrize("granularity", ["sublayer", "layer"])
    def test_no_unit_lies_inside_another(self, name: str, granularity: str) -> None:
        units = find_units(survey(name).model, granularity)
        modules = {id(unit.module) for unit in units}
        for unit in units:
            inner = [m for m in unit.module.modules() if m is not unit.module]
            assert not modules & {id(module) for module in inner}, unit.name

    def test_every_unit_is_called(self, name: str) -> None:
        found = survey(name)
        idle = {unit.name for unit in found.units if not found.trace.calls[unit.name]}
        allowed = {*found.case.idle, *(c.removeprefix("*.") for c in found.case.cure)}
        assert {attribute_name(unit) for unit in idle} <= allowed
        assert len(idle) < len(found.units) / 2

    def test_reads_are_inside_their_unit_or_are_reported(self, name: str) -> None:
        found = survey(name)
        outside = found.trace.outside(owners(found.units))
        assert bool(outside) == bool(found.case.cure), outside
        cured = find_units(found.model, resident=found.case.cure)
        assert not found.trace.outside(owners(cured))
        assert sum(found.trace.calls[unit.name] > 0 for unit in cured) >= len(cured) / 2

    def test_leaves_are_read_inside_their_own_call(self, name: str) -> None:
        found = survey(name)
        proven = found.trace.proven_leaves()
        sublayers = find_units(found.model, "module", resident=found.case.cure)
        leaves = leaf_units(found.model, sublayers, proven)
        assert not found.trace.outside(owners(leaves))
        assert {id(p) for unit in leaves for _, p in unit.parameters} <= {
            id(p) for unit in sublayers for _, p in unit.parameters
        }
        # What is left of a cut unit is small: biases of norms, no matrix.
        assert streamed_bytes(leaves) >= 0.9 * streamed_bytes(sublayers)

    def test_build_and_inputs_are_the_same_each_time(self, name: str) -> None:
        case = CASES[name]
        first, second = case.build(), case.build()
        for (key, one), (_, other) in zip(
            first.state_dict().items(), second.state_dict().items(), strict=True
        ):
            assert torch.equal(one, other), key
        for key, value in case.inputs().items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, case.inputs()[key])
        assert not first.training


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_most_bytes_outside_tables_and_heads_stream(name: str) -> None:
    found = survey(name)
    tables = {id(p) for m in found.model.modules() if is_table(m) for p in m.parameters()}
    heads = {"lm_head", "cls", "head", "embed_out"}
    movable = sum(
        size_bytes(parameter)
        for full_name, parameter in found.model.named_parameters()
        if id(parameter) not in tables and not heads & set(full_name.split("."))
    )
    assert streamed_bytes(found.units) >= found.case.share * movable


@pytest.mark.parametrize("name", [n for n in names_of("causal-lm") if n not in UNORDERED])
def test_order_of_language_model_is_its_order_of_calls(name: str) -> None:
    found = survey(name)
    expected = [unit.name for unit in found.units]
    calls = [called for called in found.trace.calls if called in set(expected)]
    assert calls == expected


def test_ffn_registered_first_comes_after_attention() -> None:
    found = survey("ffn_registered_first")
    assert [unit.kind for unit in found.units] == ["mha", "ffn"] * 5
    assert [unit.layer_index for unit in found.units] == [i for i in range(5) for _ in range(2)]


def test_lists_of_halves_beside_each_other_alternate() -> None:
    names = [unit.name for unit in survey("xlm").units]
    assert names[:4] == ["attentions.0", "ffns.0", "attentions.1", "ffns.1"]


@pytest.mark.parametrize(
    ("name", "first", "count"),
    [
        ("llama", "model.layers.0", 5),
        ("t5", "encoder.block.0", 8),
        ("albert", "encoder.albert_layer_groups.0.albert_layers.0", 1),
        ("funnel", "encoder.blocks.0.0", 6),
        ("swin", "encoder.layers.0.blocks.0", 8),
        ("mobilebert", "encoder.layer.0", 4),
        ("flux", "transformer_blocks.0", 8),
        ("stages", "0.layers.0", 9),
    ],
)
def test_layers_are_blocks_not_stages_nor_halves(name: str, first: str, count: int) -> None:
    units = find_units(survey(name).model, "layer")
    assert (units[0].name, len(units)) == (first, count)


def test_layer_called_by_its_forward_is_reported() -> None:
    found = survey("squeezebert")
    layers = find_units(found.model, "layer")
    assert not any(found.trace.calls[unit.name] for unit in layers)
    assert set(found.trace.outside(owners(layers))) == set(owners(layers))


@pytest.mark.parametrize(("name", "part"), [("mamba", "mixer"), ("wavlm", "attention")])
def test_half_with_functional_reads_stays_whole_in_module_granularity(name: str, part: str) -> None:
    found = survey(name)
    leaves = leaf_units(found.model, found.units, found.trace.proven_leaves())
    whole = [unit.name for unit in found.units if attribute_name(unit.name) == part]
    assert whole
    assert set(whole) <= {unit.name for unit in leaves}


def test_leaf_that_is_not_proven_joins_its_parent() -> None:
    found = survey("stack")
    proven = found.trace.proven_leaves()
    leaves = leaf_units(found.model, found.units, proven)
    assert "blocks.2.mlp.up" in {unit.name for unit in leaves}
    assert "blocks.2.mlp" not in {unit.name for unit in leaves}
    joined = {
        unit.name for unit in leaf_units(found.model, found.units, proven - {"blocks.2.mlp.up"})
    }
    assert "blocks.2.mlp" in joined
    assert not {"blocks.2.mlp.up", "blocks.2.mlp.down"} & joined


def test_closed_modules_are_never_cut_into_leaves() -> None:
    for name in ("transformer", "lstms"):
        found = survey(name)
        leaves = leaf_units(found.model, found.units, found.trace.proven_leaves())
        assert [unit.name for unit in leaves] == [unit.name for unit in found.units]
    found = survey("weight_norm")
    names = {u.name for u in leaf_units(found.model, found.units, found.trace.proven_leaves())}
    assert not any("parametrizations" in name for name in names)


class OwnLargeWeight(nn.Module):
    """A block with a matrix that belongs to no child of it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.table = nn.Parameter(torch.randn(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x) + (x @ self.table.t()) @ self.table


class MethodsOnly(nn.Module):
    """Holds a weight, and has no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)


class CallsMethods(nn.Module):
    """A block beside whose halves stands a module that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.mlp = Mlp()
        self.extra = MethodsOnly()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.attention(x)) + self.extra.proj(x)


def test_block_with_large_weight_of_its_own_is_one_unit() -> None:
    units = find_units(Stack([OwnLargeWeight() for _ in range(3)]))
    assert [unit.name for unit in units] == ["blocks.0", "blocks.1", "blocks.2"]


def test_module_without_forward_is_no_unit() -> None:
    names = [unit.name for unit in find_units(Stack([CallsMethods() for _ in range(3)]))]
    assert names[:2] == ["blocks.0.attention", "blocks.0.mlp"]
    assert not any("extra" in name for name in names)


class TestResidency:
    """Parameters that a unit must leave on the device."""

    def test_parameter_shared_between_units_stays(self) -> None:
        model = Stack([Block() for _ in range(4)])
        model.blocks[2].mlp.up.weight = model.blocks[0].mlp.up.weight
        streamed = owners(find_units(model))
        assert "blocks.1.mlp.up.weight" in streamed
        assert not {"blocks.0.mlp.up.weight", "blocks.2.mlp.up.weight"} & set(streamed)

    def test_parameter_shared_with_outside_stays(self) -> None:
        model = Stack([Block() for _ in range(4)])
        model.head.weight = model.blocks[1].attention.out.weight
        streamed = owners(find_units(model))
        assert "blocks.1.attention.out.weight" not in streamed
        assert "blocks.1.attention.out.bias" in streamed

    def test_views_of_one_storage_stay_where_they_overlap(self) -> None:
        model = Stack([Block() for _ in range(4)])
        other = model.blocks[1].mlp.up.weight
        model.blocks[3].mlp.up.weight = nn.Parameter(other.detach()[:])
        model.register_buffer("peek", model.blocks[2].mlp.down.weight.detach()[1:2])
        streamed = owners(find_units(model))
        for name in ("blocks.1.mlp.up", "blocks.3.mlp.up", "blocks.2.mlp.down"):
            assert f"{name}.weight" not in streamed
        assert "blocks.0.mlp.up.weight" in streamed

    def test_pieces_of_one_storage_stream_where_they_do_not_overlap(self) -> None:
        model = Stack([Block() for _ in range(4)])
        before = owners(find_units(model))
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        offset = 0
        for parameter in model.parameters():
            piece = flat[offset : offset + parameter.numel()]
            parameter.data = piece.view(parameter.shape)
            offset += parameter.numel()
        assert set(owners(find_units(model))) == set(before)

    @pytest.mark.parametrize(
        ("make", "streams"),
        [
            (lambda: torch.randn(1, WIDTH).expand(3 * WIDTH, WIDTH), False),
            (lambda: torch.randn(3 * WIDTH, 2 * WIDTH)[:, :WIDTH], False),
            (lambda: torch.randn(WIDTH, 3 * WIDTH).t(), True),
        ],
        ids=["expanded", "gaps", "transposed"],
    )
    def test_only_dense_parameters_stream(self, make: object, streams: bool) -> None:
        assert callable(make)
        model = Stack([Block() for _ in range(3)])
        model.blocks[1].mlp.up.weight = nn.Parameter(make())
        assert ("blocks.1.mlp.up.weight" in owners(find_units(model))) is streams

    def test_first_parameter_stays_although_its_unit_streams(self) -> None:
        units = find_units(survey("sequential").model)
        assert units[0].name == "0.attention"
        assert "0.attention.query.weight" not in owners(units)
        assert "0.attention.query.bias" in owners(units)

    def test_embedding_inside_half_stays(self) -> None:
        streamed = owners(survey("t5").units)
        assert not any("relative_attention_bias" in name for name in streamed)

    def test_resident_takes_modules_parameters_and_patterns(self) -> None:
        model = Stack([Block() for _ in range(4)])
        units = find_units(
            model, resident=["blocks.1", "blocks.0.mlp.up.weight", "*.attention.out.*"]
        )
        streamed = set(owners(units))
        assert "blocks.1.mlp" not in {unit.name for unit in units}
        assert "blocks.0.mlp.up.weight" not in streamed
        assert "blocks.0.mlp.up.bias" in streamed
        assert not any(".attention.out." in name for name in streamed)

    def test_lazy_parameter_fails(self) -> None:
        model = Stack([nn.Sequential(Block(), nn.LazyLinear(WIDTH)) for _ in range(2)])
        with pytest.raises(ValueError, match="run one forward"):
            find_units(model)

    def test_meta_model_is_cut_the_same(self) -> None:
        model = Stack([Block() for _ in range(3)])
        names = [unit.name for unit in find_units(model)]
        assert [unit.name for unit in find_units(model.to("meta"))] == names


class TestZooItself:
    """The zoo must not pass by skipping."""

    @pytest.mark.parametrize("name", [n for n in CASES if CASES[n].generate is not None])
    def test_generate_gives_new_tokens(self, name: str) -> None:
        case = CASES[name]
        inputs = case.inputs()
        inputs.pop("decoder_input_ids", None)
        with torch.no_grad():
            ids = survey(name).model.generate(**inputs, **case.generate)
        assert ids.shape[0] == next(iter(inputs.values())).shape[0]
        assert ids.shape[1] > 1

    def test_missing_family_skips(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TORCH_OFFLOAD_REQUIRE_ALL_MODELS", raising=False)
        with pytest.raises(pytest.skip.Exception, match="has no SpaceTransformer"):
            library("torch", "SpaceTransformer")

    def test_missing_family_fails_where_all_are_required(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_OFFLOAD_REQUIRE_ALL_MODELS", "1")
        with pytest.raises(pytest.fail.Exception, match="no_such_library cannot be imported"):
            library("no_such_library")
