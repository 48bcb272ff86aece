"""`units=` and `resident=` as users write them, and what is said where nothing is found."""

from __future__ import annotations

import pytest
from torch import nn

from tests.python.zoo.plain import WIDTH, Attention, Block, Mlp, Stack
from torch_offload.units import find_units


class TestSelection:
    """`units=` and `resident=` as users write them."""

    def test_names_patterns_and_modules_select_in_module_order(self) -> None:
        model = Stack([Block() for _ in range(4)])
        units = find_units(model, units=["blocks.3", model.blocks[0].mlp, "blocks.[12].attention"])
        assert [(unit.name, unit.layer_index, unit.kind) for unit in units] == [
            ("blocks.0.mlp", 0, "ffn"),
            ("blocks.1.attention", 1, "mha"),
            ("blocks.2.attention", 2, "mha"),
            ("blocks.3", 3, "mha"),
        ]

    def test_pattern_means_outermost_modules(self) -> None:
        model = Stack([Block() for _ in range(4)])
        names = [unit.name for unit in find_units(model, units=["blocks*"])]
        assert names == [f"blocks.{index}" for index in range(4)]

    def test_unique_ending_is_enough(self) -> None:
        model = nn.Sequential(Stack([Block() for _ in range(2)]))
        assert [unit.name for unit in find_units(model, units=["blocks.1"])] == ["0.blocks.1"]

    def test_named_embedding_streams(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.Embedding(100, 8))
        assert [unit.name for unit in find_units(model, units=["1"])] == ["1"]

    @pytest.mark.parametrize(
        ("units", "message"),
        [
            (["blocks.7"], "matches nothing"),
            (["blockz.1.mlp"], "did you mean 'blocks.1.mlp'"),
            (["*.ffn"], "matches nothing"),
            ([""], "got an empty string"),
            (["mlp"], r"matches 4 names .* pattern '\*\.mlp'"),
            (["blocks.1", "blocks.1.mlp"], "overlap: 'blocks.1.mlp' lies inside 'blocks.1'"),
            (["*.mlp", "blocks.1.mlp"], "selects module 'blocks.1.mlp' twice"),
            (["blocks"], r"never called; name its elements instead: 'blocks\.\*'"),
            (["block?"], r"never called .* 'blocks\.\*'"),
            ([nn.Linear(2, 2)], "no module of this model"),
            ([], "no units|nothing"),
        ],
    )
    def test_wrong_units_fail(self, units: list[str | nn.Module], message: str) -> None:
        model = Stack([Block() for _ in range(4)])
        with pytest.raises(ValueError, match=message):
            find_units(model, units=units)

    def test_the_model_itself_is_one_unit(self) -> None:
        model = Stack([Block() for _ in range(4)])
        assert [unit.name for unit in find_units(model, units=[model])] == [""]

    def test_module_without_parameters_fails(self) -> None:
        model = nn.Sequential(Block(), nn.ReLU())
        with pytest.raises(ValueError, match="without parameters"):
            find_units(model, units=["1"])

    @pytest.mark.parametrize("argument", ["units", "resident"])
    def test_bare_string_fails(self, argument: str) -> None:
        with pytest.raises(TypeError, match=r"takes a sequence"):
            find_units(Stack([Block()]), **{argument: "blocks.0"})

    @pytest.mark.parametrize("argument", ["units", "resident"])
    def test_entry_of_another_type_fails(self, argument: str) -> None:
        with pytest.raises(TypeError, match=r"names|patterns"):
            find_units(Stack([Block()]), **{argument: [3]})

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ("lm_head", "matches nothing"),
            ("mlp.up", r"matches 4 names .* pattern '\*\.mlp\.up'"),
            ("*.gate", "matches nothing"),
        ],
    )
    def test_wrong_resident_fails(self, entry: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            find_units(Stack([Block() for _ in range(4)]), resident=[entry])

    def test_everything_resident_fails(self) -> None:
        with pytest.raises(ValueError, match=r"nothing is left .* resident=\['\*'\]"):
            find_units(Stack([Block()]), resident=["*"])

    def test_unknown_granularity_fails(self) -> None:
        with pytest.raises(ValueError, match="'sublayer', 'layer', 'module', not 'tensor'"):
            find_units(Stack([Block()]), "tensor")


class TwoTowers(nn.Module):
    """No container anywhere: nothing that a rule would call a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, WIDTH)
        self.wide = Mlp()
        self.deep = Attention()


def test_nothing_found_lists_what_was_seen_and_what_would_do() -> None:
    with pytest.raises(ValueError, match="no units found in TwoTowers") as raised:
        find_units(TwoTowers())
    text = str(raised.value)
    assert "'wide' (Mlp, 25,088 bytes)" in text
    assert "units=['wide', 'deep']" in text
    assert [unit.name for unit in find_units(TwoTowers(), units=["wide", "deep"])] == [
        "wide",
        "deep",
    ]


def test_model_without_parts_fails() -> None:
    with pytest.raises(ValueError, match="nothing to stream"):
        find_units(nn.Linear(4, 4, bias=False))


def test_model_that_is_one_module_says_what_would_do() -> None:
    for model, streamed in (
        (nn.LSTM(8, 8), "1,280 of its 2,304"),
        (nn.Linear(4, 4), "16 of its 80"),
    ):
        message = rf"units=\[model\] streams it as one unit, {streamed} bytes"
        with pytest.raises(ValueError, match=message):
            find_units(model)
        (unit,) = find_units(model, units=[model])
        assert f"{unit.num_bytes:,} of" in message
