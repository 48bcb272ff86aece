"""Embeddings whose rows are gathered on the host: never changed, never silently wrong."""

from __future__ import annotations

import copy
import gc
import importlib
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python import expect
from tests.python.dropin import tiny_llama
from torch_offload import StateError
from torch_offload.config import Config
from torch_offload.gathering import gather_rows, hands_indices_on, stop_gathering
from torch_offload.planning import cut_model, least_budget

HOST = torch.device("cpu")
VOCAB, WIDTH = 512, 32
IDS = torch.tensor([[3, 511, 7, 3], [0, 1, 2, 500]])
_GRAD_WARNING = "ignore:torch_offload. this forward runs in grad mode:UserWarning"


@contextmanager
def gathering(model: Any) -> Iterator[Any]:
    """A model within its least budget; yields its embedding."""
    least = least_budget(cut_model(model, Config())[0])
    with torch_offload.offload(model, HOST, gpu_budget=least) as handle:
        assert list(handle.explain().gathered) == ["model.embed_tokens.weight"]
        yield model.get_input_embeddings()


def of_transformers(name: str) -> Any:
    """A class by the name of its module and its own."""
    module, _, kind = name.rpartition(".")
    package = f"transformers.models.{module}.modeling_{module}"
    return getattr(importlib.import_module(package), kind)


def test_many_threads_may_call_the_embedding() -> None:
    model = tiny_llama(vocab_size=VOCAB)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randint(3, VOCAB, (1, length), generator=generator) for length in (3, 17, 40)]
    expected = [model.get_input_embeddings()(ids).detach() for ids in inputs]
    found: list[str] = []

    def call(embedding: Any, index: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(300):
                    if not torch.equal(embedding(inputs[index]), expected[index]):
                        found.append(f"wrong rows of {index}")
        except Exception as error:
            found.append(repr(error))

    interval = sys.getswitchinterval()
    with gathering(model) as embedding:
        weight, padding = embedding.weight, embedding.padding_idx
        threads = [threading.Thread(target=call, args=(embedding, index)) for index in (0, 1, 2)]
        sys.setswitchinterval(1e-5)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert embedding.weight is weight
        assert embedding.padding_idx == padding
    assert not found


@torch.no_grad()
def test_hooks_see_the_module_and_what_it_was_called_with() -> None:
    model = tiny_llama(vocab_size=VOCAB)
    seen: list[tuple[Any, Any]] = []
    embedding = model.get_input_embeddings()
    weight = embedding.weight
    embedding.register_forward_pre_hook(lambda module, args: seen.append((module, args[0])))
    embedding.register_forward_hook(
        lambda module, args, output: seen.append((module, module.weight))
    )
    with gathering(model):
        model(IDS)
    assert seen[0][0] is seen[1][0] is embedding
    assert torch.equal(seen[0][1], IDS)
    assert seen[1][1] is weight


@torch.no_grad()
def test_indices_that_a_hook_changes_are_gathered() -> None:
    model = tiny_llama(vocab_size=VOCAB)
    must = model.get_input_embeddings()(IDS.flip(1))
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: args[0].flip(1))
    with gathering(model) as embedding:
        assert torch.equal(embedding(IDS), must)
        assert torch.equal(embedding.forward(IDS.flip(1)), must)


class TestBackward:
    """A gradient of the table that would be left out is an error."""

    def test_backward_to_the_table_raises_and_names_the_cure(self) -> None:
        model = tiny_llama(vocab_size=VOCAB)
        plain = copy.deepcopy(model)
        with gathering(model) as embedding:
            rows = embedding(IDS)
            with pytest.raises(StateError, match=r"resident=\['model.embed_tokens.weight'\]"):
                rows.sum().backward()
            assert embedding.weight.grad is None
        cure = ["model.embed_tokens.weight"]
        with torch_offload.offload(model, HOST, gpu_budget=10**6, resident=cure):
            for one in (model, plain):
                one.get_input_embeddings()(IDS).sum().backward()
            got = model.get_input_embeddings().weight.grad
        assert torch.equal(got, plain.get_input_embeddings().weight.grad)

    @pytest.mark.filterwarnings(_GRAD_WARNING)
    def test_backward_through_the_model_raises(self) -> None:
        model = tiny_llama(vocab_size=VOCAB)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("embed_tokens" in name or name == "model.norm.weight")
        with gathering(model), pytest.raises(RuntimeError):
            model.model(IDS).last_hidden_state.sum().backward()

    def test_gradients_that_do_not_reach_the_table_are_right(self) -> None:
        model = tiny_llama(vocab_size=VOCAB)
        scale = torch.tensor(2.0, requires_grad=True)
        with gathering(model) as embedding:
            rows = embedding(IDS)
            (got,) = torch.autograd.grad((rows * scale).sum(), scale)
            assert torch.equal(got, rows.sum())
            embedding.weight.requires_grad_(False)
            assert not embedding(IDS).requires_grad
            (embedding(IDS) * scale).sum().backward()
            assert torch.equal(scale.grad, rows.sum())
            with torch.no_grad():
                embedding.weight.requires_grad_(True)
                assert not embedding(IDS).requires_grad


class _Doubled(nn.Embedding):
    """Of no known form."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + super().forward(input)


class _Named(nn.Embedding):
    """With nothing of its own."""


class TestForms:
    """Whose forward may be given other indices of the same rows."""

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("gemma3.Gemma3TextScaledWordEmbedding", {"embed_scale": 3.0}),
            ("bart.BartScaledWordEmbedding", {"embed_scale": 3.0}),
            ("muse_spark.MuseSparkTextNormedEmbedding", {}),
        ],
    )
    @torch.no_grad()
    def test_scaled_or_normed_embedding_is_gathered(
        self, name: str, options: dict[str, Any]
    ) -> None:
        model = tiny_llama(vocab_size=VOCAB)
        embedding = of_transformers(name)(VOCAB, WIDTH, 0, **options)
        embedding.weight = model.get_input_embeddings().weight
        model.set_input_embeddings(embedding)
        assert hands_indices_on(embedding)
        must = model(IDS).logits
        with gathering(model):
            assert torch.equal(model(IDS).logits, must)
            assert torch.equal(embedding(input_ids=IDS), embedding(IDS))

    @torch.no_grad()
    def test_embedding_that_looks_at_its_indices_stays_on_the_device(self) -> None:
        model = tiny_llama(vocab_size=VOCAB)
        kind = of_transformers("idefics.IdeficsDecoupledEmbedding")
        embedding = kind(VOCAB, 2, WIDTH, partially_freeze=False)
        nn.init.normal_(embedding.weight)
        nn.init.normal_(embedding.additional_embedding.weight)
        model.set_input_embeddings(embedding)
        torch_offload.align(model)
        ids = torch.tensor([[5, 9, VOCAB, 7]])
        must = model(ids).logits
        least = least_budget(cut_model(model, Config())[0])
        assert least > model.lm_head.weight.nbytes + embedding.weight.nbytes
        with torch_offload.offload(model, HOST, gpu_budget=least) as handle:
            assert not handle.explain().gathered
            assert handle.stats.bytes_resident >= embedding.weight.nbytes
            assert torch.equal(model(ids).logits, must)

    def test_only_known_forms_count(self) -> None:
        scaled = of_transformers("gemma3.Gemma3TextScaledWordEmbedding")
        visual = of_transformers("ovis2.Ovis2VisualEmbeddingTable")
        replaced = nn.Embedding(4, 2)
        replaced.forward = lambda input: input  # type: ignore[method-assign]

        class Rescaled(scaled):  # type: ignore[misc]  # a class that is looked up
            def forward(self, input_ids: torch.Tensor) -> Any:
                return super().forward(input_ids) * (input_ids > 1).unsqueeze(-1)

        class Renamed(scaled):  # type: ignore[misc]  # likewise
            pass

        assert hands_indices_on(nn.Embedding(4, 2))
        assert hands_indices_on(_Named(4, 2))
        assert hands_indices_on(Renamed(4, 2, 0))
        for embedding in (_Doubled(4, 2), visual(4, 2), replaced, Rescaled(4, 2, 0)):
            assert not hands_indices_on(embedding), type(embedding).__name__


class TestForwardsOfOthers:
    """A forward that somebody puts on an embedding while it is gathered."""

    @torch.no_grad()
    def test_it_goes_on_through_other_plans_and_stays_behind(self) -> None:
        model = tiny_llama(vocab_size=VOCAB)
        must = model.get_input_embeddings()(IDS) * 2
        with gathering(model) as embedding:
            ours = embedding.forward

            def twice(input: torch.Tensor) -> Any:
                return ours(input) * 2

            embedding.forward = twice
            handle = torch_offload.handle_of(model)
            assert handle is not None
            least = handle.explain().device_bytes
            for budget in (10**6, least):
                assert torch.equal(embedding(IDS), must)
                handle.replan(gpu_budget=budget)
                assert torch.equal(embedding(IDS), must)
        assert embedding.forward is twice
        assert torch.equal(embedding(IDS), must)

    def test_embedding_is_what_it_was_and_nothing_keeps_it(self) -> None:
        embedding = nn.Embedding(8, 4)
        before = expect.snapshot(embedding)
        gather_rows(embedding, "weight", HOST)
        embedding(torch.tensor([1, 2]))
        stop_gathering(embedding)
        stop_gathering(embedding)
        expect.assert_unchanged(embedding, before)
        gather_rows(embedding, "weight", HOST)
        gone = weakref.ref(embedding)
        gc.disable()
        try:
            del embedding, before
            assert gone() is None
        finally:
            gc.enable()
