"""Embeddings that are gathered on the host while they lie in checkpoint files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.python import models
from tests.python.checkpoints import (
    assert_streams_the_same,
    bytes_in_files,
    handle_of,
    load,
    load_plain,
    streamed_bytes,
)
from tests.python.dropin import IDLE_WARNING, tiny_llama
from torch_offload import StateError
from torch_offload.config import Config
from torch_offload.host_memory import _FileMappings
from torch_offload.planning import cut_model, least_budget

HOST = torch.device("cpu")
VOCAB = 512
IDS = torch.tensor([[3, 511, 7, 3], [0, 1, 2, 500]])
# Whose vocabulary is large beside their layers, of all that are loaded from checkpoints.
FAMILIES = [
    case
    for case in models.CASES.values()
    if case.kind not in ("diffusion", "plain") and not case.name.endswith("lora")
]


def cut_of(model: nn.Module, resident: Any = ()) -> Any:
    return cut_model(model, Config(resident=list(resident)))[0]


def tables_of(model: Any) -> list[nn.Parameter]:
    return [table.weight for table in cut_of(model).outsiders.tables]


def lies_in_a_file(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() in _FileMappings()


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint with a large vocabulary."""
    model = tiny_llama(vocab_size=VOCAB, tie_word_embeddings=request.param)
    model.save_pretrained(tmp_path)
    return tmp_path


def load_least(folder: Path, **options: Any) -> tuple[Any, Any]:
    """Within the least budget; and the plain model."""
    plain = load_plain(_llama(), folder, HOST)
    options = {"gpu_budget": least_budget(cut_of(plain)), **options}
    return load(_llama(), folder, HOST, **options), plain


def _llama() -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
def test_family_within_its_least_budget_streams_and_gathers_from_files(
    case: Any, tmp_path: Path
) -> None:
    source = case.build()
    cut = cut_of(source, case.cure)
    least = least_budget(cut)
    source.save_pretrained(tmp_path)
    plain = load_plain(type(source), tmp_path, HOST)
    model = load(type(source), tmp_path, HOST, resident=list(case.cure), gpu_budget=least)
    handle = handle_of(model)
    assert handle.stats.bytes_resident + handle.stats.window_bytes <= least
    gathered = set(handle.explain().gathered)
    streamed_tables = {table.name for table in cut.outsiders.tables if table.head}
    assert gathered == {table.name for table in cut.outsiders.tables}
    for name in gathered:
        assert lies_in_a_file(model.get_parameter(name)), name
    # A tied table is its head's master; others are no unit's.
    assert bytes_in_files(handle) == streamed_bytes(handle) > 0
    assert streamed_tables <= gathered
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=IDLE_WARNING)
        assert_streams_the_same(model, plain, case.inputs())
    handle.remove()
    for (name, parameter), expected in zip(
        model.named_parameters(), plain.parameters(), strict=True
    ):
        assert torch.equal(parameter, expected), name


def test_many_families_gather() -> None:
    """Else the test above says little."""
    gathering = [case.name for case in FAMILIES if cut_of(case.build()).outsiders.tables]
    assert len(gathering) >= 5, gathering


@torch.no_grad()
def test_rows_that_are_asked_for_are_all_that_is_copied(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = load_least(folder)
    handle = handle_of(model)
    tables: list[torch.Tensor] = []
    embed = nn.functional.embedding

    def spy(ids: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
        tables.append(weight)
        return embed(ids, weight, *args)

    monkeypatch.setattr(nn.functional, "embedding", spy)
    got = model(IDS).logits
    monkeypatch.undo()
    assert torch.equal(got, plain(IDS).logits)
    (rows,) = tables
    assert torch.equal(rows, plain.model.embed_tokens.weight[IDS.unique()])
    assert not lies_in_a_file(rows)
    before = handle.stats
    model(IDS)
    streamed = sum(unit.size_bytes for unit in handle.units if unit.place is not None)
    assert handle.stats.bytes_onloaded - before.bytes_onloaded == streamed


@pytest.mark.parametrize("padding", range(0, 64, 8))
@torch.no_grad()
def test_table_stays_in_its_file_wherever_that_begins(tmp_path: Path, padding: int) -> None:
    source = tiny_llama(vocab_size=VOCAB)
    source.save_pretrained(tmp_path)
    weights = {name: tensor.contiguous() for name, tensor in source.state_dict().items()}
    save_file(
        weights, tmp_path / "model.safetensors", metadata={"format": "pt", "x": "x" * padding}
    )
    model, plain = load_least(tmp_path)
    table = model.model.embed_tokens.weight
    assert handle_of(model).explain().gathered
    assert lies_in_a_file(table), f"copied from {table.data_ptr() % 64} modulo 64"
    assert torch.equal(model(IDS).logits, plain(IDS).logits)


@torch.no_grad()
def test_edited_rows_are_gathered_and_saved_and_the_file_is_untouched(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, plain = load_least(folder)
    before = (folder / "model.safetensors").read_bytes()
    model(IDS)
    for one in (model, plain):
        one.model.embed_tokens.weight.data[3] += 1.0
    handle_of(model).refresh()  # a tied head streams it as well
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    saved = tmp_path_factory.mktemp("saved")
    model.save_pretrained(saved)
    again = load_plain(_llama(), saved, HOST)
    assert torch.equal(again.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    assert (folder / "model.safetensors").read_bytes() == before


@torch.no_grad()
def test_file_cut_short_is_an_error_before_a_row_is_read(folder: Path) -> None:
    model, _ = load_least(folder)
    embedding = model.get_input_embeddings()
    model(IDS)
    file = folder / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(4096)
    for call in (lambda: model(IDS), lambda: model.model(IDS), lambda: embedding(IDS)):
        with pytest.raises(StateError, match=r"model.safetensors to stay as it was"):
            call()


@pytest.mark.parametrize("edits", [False, True])
@torch.no_grad()
def test_table_goes_to_the_device_and_back_to_its_file(tmp_path: Path, edits: bool) -> None:
    tiny_llama(vocab_size=VOCAB).save_pretrained(tmp_path)
    model, plain = load_least(tmp_path)
    handle = handle_of(model)
    least = handle.explain().device_bytes
    table = model.model.embed_tokens.weight
    whole = 2 * sum(parameter.nbytes for parameter in model.parameters())
    for _ in range(2):
        handle.replan(gpu_budget=whole)
        assert not handle.explain().gathered
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
        if edits:
            # As on a GPU, where a table that stays has memory of its own.
            table.data = table.data.clone()
            table.data[7] *= 2
            plain.model.embed_tokens.weight.data[7] *= 2
        handle.replan(gpu_budget=least)
        assert handle.explain().gathered
        assert lies_in_a_file(table) != edits
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    handle.remove()
    assert torch.equal(table, plain.model.embed_tokens.weight)


def test_what_comes_back_from_the_device_is_compared_bit_for_bit(tmp_path: Path) -> None:
    from torch_offload import _C, installation

    table = torch.randn(40, 8)
    table[3, 4] = float("nan")
    save_file({"table": table}, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    mapping = _C.FileMapping(str(tmp_path / "model.safetensors"))
    view = _C.FileView([(mapping, size - table.nbytes, table.nbytes)])
    shown = installation._shown_again(view, table)
    assert shown is not None
    assert shown.data_ptr() == view.address
    other = table.clone()
    other[39, 7] = -other[39, 7]
    zeros = torch.zeros_like(table)
    for wrong in (other, zeros, -zeros):
        assert installation._shown_again(view, wrong) is None
    assert installation._shown_again(None, table) is None
