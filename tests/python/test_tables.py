"""Heads that stream and tables that are gathered on the host."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python import expect
from tests.python.dropin import tiny_llama
from torch_offload.config import Config
from torch_offload.planning import cut_model, least_budget
from torch_offload.tables import find_outsiders
from torch_offload.units import find_units

HOST = torch.device("cpu")
# A vocabulary that is large beside the layers.
VOCAB = 512
IDS = torch.tensor([[3, 511, 7, 3], [0, 1, 2, 500]])


def wordy_llama(**changes: Any) -> Any:
    return tiny_llama(vocab_size=VOCAB, **changes)


def least_of(model: nn.Module) -> int:
    return least_budget(cut_model(model, Config())[0])


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest) -> Any:
    return wordy_llama(tie_word_embeddings=request.param)


@torch.no_grad()
def test_least_budget_is_the_largest_unit_and_small_change(model: Any) -> None:
    must = model(IDS).logits
    before = expect.snapshot(model)
    least = least_of(model)
    head = model.lm_head.weight.nbytes
    small = sum(b.nbytes for b in model.buffers()) + sum(
        p.nbytes for n, p in model.named_parameters() if "norm" in n
    )
    assert head <= least <= head + 2 * small + 4096, "neither table nor head is sacred"
    with torch_offload.offload(model, HOST, gpu_budget=least) as handle:
        assert handle.stats.bytes_resident + handle.stats.window_bytes <= least
        assert "lm_head" in [unit.name for unit in handle.units if unit.place is not None]
        onloads = handle.stats.onloads
        for _ in range(2):
            assert torch.equal(model(IDS).logits, must)
        assert handle.stats.onloads > onloads
        assert handle.explain().gathered == {
            "model.embed_tokens.weight": model.model.embed_tokens.weight.nbytes
        }
        expect.assert_at_rest(handle)
    expect.assert_unchanged(model, before, same_memory=False)
    assert torch.equal(model(IDS).logits, must)


@torch.no_grad()
def test_table_is_gathered_while_a_pass_is_traced_for_leaves(model: Any) -> None:
    must = model(IDS).logits
    least = least_of(model)
    with torch_offload.offload(model, HOST, gpu_budget=least, granularity="module") as handle:
        for _ in range(3):  # the first is traced, then the units are cut anew
            assert torch.equal(model(IDS).logits, must)
            assert list(handle.explain().gathered) == ["model.embed_tokens.weight"]
        assert "model.layers.0.self_attn.q_proj" in [unit.name for unit in handle.units]
        expect.assert_at_rest(handle)


@torch.no_grad()
def test_only_the_rows_that_are_asked_for_are_copied(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[torch.Size] = []
    plain = nn.functional.embedding

    def spy(ids: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
        shapes.append(weight.shape)
        return plain(ids, weight, *args)

    with torch_offload.offload(model, HOST, gpu_budget=least_of(model)):
        monkeypatch.setattr(nn.functional, "embedding", spy)
        model(IDS)
    assert shapes == [(len(IDS.unique()), model.config.hidden_size)]


@torch.no_grad()
def test_generate_and_pipeline_are_as_plain(model: Any) -> None:
    options = {"max_new_tokens": 5, "do_sample": False}
    must = model.generate(IDS, **options)
    with torch_offload.offload(model, HOST, gpu_budget=least_of(model)):
        assert torch.equal(model.generate(IDS, **options), must)
        assert torch.equal(model.generate(IDS, num_beams=2, **options)[0, :4], IDS[0])
        assert model.to(HOST) is model


@torch.no_grad()
def test_rows_may_be_edited_between_forwards(model: Any) -> None:
    plain = copy.deepcopy(model)
    with torch_offload.offload(model, HOST, gpu_budget=least_of(model)):
        model(IDS)
        for one in (model, plain):
            one.model.embed_tokens.weight.data[3] += 1.0
        model_handle = torch_offload.handle_of(model)
        assert model_handle is not None
        model_handle.refresh()
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


@torch.no_grad()
def test_indices_outside_the_table_fail_and_leave_it_whole(model: Any) -> None:
    with torch_offload.offload(model, HOST, gpu_budget=least_of(model)) as handle:
        whole = model.model.embed_tokens.weight
        for wrong in (torch.tensor([[VOCAB]]), torch.tensor([[-1]])):
            with pytest.raises(IndexError, match=f"from 0 to {VOCAB - 1}"):
                model(wrong)
        assert model.model.embed_tokens.weight is whole
        assert model.model.embed_tokens.padding_idx == 0
        expect.assert_at_rest(handle)
        assert model(IDS).logits.shape == (2, 4, VOCAB)


def test_embeddings_of_other_calls_and_empty_ones_work() -> None:
    model = wordy_llama()
    must = model.model.embed_tokens(IDS)
    with torch.no_grad(), torch_offload.offload(model, HOST, gpu_budget=least_of(model)):
        embed = model.model.embed_tokens
        assert torch.equal(embed(IDS), must)
        assert torch.equal(embed(input=IDS), must)
        assert torch.equal(embed(IDS.to(torch.int32)), must)
        assert embed(IDS[:, :0]).shape == (2, 0, model.config.hidden_size)
        assert torch.equal(model(inputs_embeds=must).logits, model(IDS).logits)


@torch.no_grad()
def test_replan_brings_the_table_to_the_device_and_back(model: Any) -> None:
    must = model(IDS).logits
    before = expect.snapshot(model)
    whole = 2 * sum(p.nbytes for p in model.parameters())
    least = least_of(model)
    with torch_offload.offload(model, HOST, gpu_budget=whole) as handle:
        for budget in (least, whole, least, None, least):
            handle.replan(gpu_budget=budget)
            assert bool(handle.explain().gathered) == (budget == least)
            assert torch.equal(model(IDS).logits, must)
            expect.assert_at_rest(handle)
    expect.assert_unchanged(model, before, same_memory=False)


@pytest.mark.parametrize("budget", [None, "auto", "whole"])
@torch.no_grad()
def test_replan_goes_as_low_as_offload_whatever_the_first_budget(model: Any, budget: Any) -> None:
    must = model(IDS).logits
    least = least_of(model)
    if budget == "whole":
        budget = 2 * sum(p.nbytes for p in model.parameters())
    with torch_offload.offload(model, HOST, gpu_budget=budget) as handle:
        assert not handle.explain().gathered
        assert torch.equal(model(IDS).logits, must)
        with pytest.raises(ValueError, match=f"at least {least} bytes"):
            handle.replan(gpu_budget=least - 1)
        handle.replan(gpu_budget=least)
        assert handle.explain().gathered
        assert torch.equal(model(IDS).logits, must)
        expect.assert_at_rest(handle)


class TestDevice:
    """``model.device`` while the first parameter is in host memory."""

    @torch.no_grad()
    def test_class_keeps_its_name_and_comes_back(
        self, model: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from torch_offload import wrapping
        from torch_offload.execution_device import answer_device

        plain, inner = type(model), type(model.model)
        # On the host device the answer is right anyway: as if the model ran elsewhere.
        elsewhere = torch.device("meta")
        monkeypatch.setattr(
            wrapping, "answer_device", lambda module, _: answer_device(module, elsewhere)
        )
        with torch_offload.offload(model, HOST, gpu_budget=least_of(model)):
            for module, was in ((model, plain), (model.model, inner)):
                assert module.device == elsewhere
                assert type(module) is not was
                assert isinstance(module, was)
                for name in ("__name__", "__qualname__", "__module__", "__doc__"):
                    assert getattr(type(module), name) == getattr(was, name)
            assert model.model.layers[0].self_attn.q_proj.weight.device == HOST
        assert type(model) is plain
        assert type(model.model) is inner
        assert model.device == HOST
        assert type(pickle.loads(pickle.dumps(model))) is plain
        assert type(copy.deepcopy(model)) is plain

    def test_models_without_the_property_keep_their_class(self) -> None:
        from torch_offload.execution_device import answer_device, give_class_back

        module = nn.Linear(2, 2)
        assert not answer_device(module, torch.device("meta"))
        give_class_back(module)
        assert type(module) is nn.Linear


class TestFindOutsiders:
    """What counts as a head or a table."""

    def test_small_vocabulary_is_nothing_large(self) -> None:
        model = tiny_llama(vocab_size=8, hidden_size=64, intermediate_size=512)
        found = find_outsiders(model, find_units(model))
        assert found.heads == ()
        assert found.tables == ()

    def test_what_is_named_resident_stays(self) -> None:
        model = wordy_llama()
        found = find_outsiders(model, find_units(model), ["lm_head", "model.embed_tokens"])
        assert found.heads == ()
        assert found.tables == ()

    def test_table_that_others_read_stays(self) -> None:
        model = wordy_llama()
        model.other = nn.Linear(32, VOCAB, bias=False)
        model.other.weight = model.model.embed_tokens.weight
        found = find_outsiders(model, find_units(model))
        assert found.tables == ()
        assert [head.name for head in found.heads] == ["lm_head"]

    @pytest.mark.parametrize("change", [{"max_norm": 1.0}, {"sparse": True}])
    def test_embedding_that_does_more_than_a_lookup_stays(self, change: dict[str, Any]) -> None:
        model = wordy_llama()
        for name, value in change.items():
            setattr(model.model.embed_tokens, name, value)
        assert find_outsiders(model, find_units(model)).tables == ()

    def test_weights_that_share_bytes_stay(self) -> None:
        model = wordy_llama()
        model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach())
        found = find_outsiders(model, find_units(model))
        assert found.heads == ()
        assert found.tables == ()

    def test_head_of_another_class_stays(self) -> None:
        model = wordy_llama()

        class Head(nn.Linear):
            pass

        model.lm_head = Head(32, VOCAB, bias=False)
        assert find_outsiders(model, find_units(model)).heads == ()

    def test_models_that_do_not_say_have_none(self) -> None:
        model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)))
        found = find_outsiders(model, find_units(model))
        assert found.heads == ()
        assert found.tables == ()
