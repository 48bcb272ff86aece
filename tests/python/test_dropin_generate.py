"""`generate` in all its forms: the plain model's tokens, and exactly the copies they need."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from tests.python import expect
from tests.python.dropin import assert_equal, plain_on, streamed, tiny_llama, tokens

# A part of torch that transformers imports for static caches.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated:DeprecationWarning")

_SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}


def _assert_generates_like_plain(
    device: torch.device, settings: dict[str, Any], **options: Any
) -> None:
    model = tiny_llama()
    plain = plain_on(model, device)
    ids = tokens(device)
    must = plain.generate(ids, **_SETTINGS, **settings)
    with streamed(model, device, **options) as handle:
        with expect.watch(handle) as calls:
            got = model.generate(ids, **_SETTINGS, **settings)
        assert_equal(got, must)
        assert len(calls.passes) >= 6
        expect.assert_streams_exactly(calls, exact_passes=len(calls.passes))
        expect.assert_at_rest(handle)


@pytest.mark.parametrize("mode", ["sync", "streams", "events", "pipeline"])
def test_generate_each_mode_equals_plain(device: torch.device, mode: str) -> None:
    _assert_generates_like_plain(device, {}, mode=mode)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"use_cache": False}, id="no-cache"),
        pytest.param({"cache_implementation": "dynamic"}, id="dynamic"),
        pytest.param({"cache_implementation": "static"}, id="static"),
        pytest.param({"num_beams": 3}, id="beams"),
        pytest.param({"num_beams": 2, "num_return_sequences": 2}, id="beams-returned"),
        pytest.param(
            {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
            id="scores",
        ),
    ],
)
def test_generate_each_cache_equals_plain(device: torch.device, settings: dict[str, Any]) -> None:
    _assert_generates_like_plain(device, settings)


@pytest.mark.needs_cuda
def test_generate_offloaded_cache_equals_plain(device: torch.device) -> None:
    _assert_generates_like_plain(device, {"cache_implementation": "offloaded"})


@pytest.mark.skipif(
    importlib.util.find_spec("optimum") is None and importlib.util.find_spec("hqq") is None,
    reason="a quantized cache needs optimum-quanto or hqq",
)
def test_generate_quantized_cache_equals_plain(device: torch.device) -> None:
    backend = "quanto" if importlib.util.find_spec("optimum") else "hqq"
    _assert_generates_like_plain(
        device, {"cache_implementation": "quantized", "cache_config": {"backend": backend}}
    )


def test_generate_sampled_with_a_seed_equals_plain(device: torch.device) -> None:
    model = tiny_llama()
    plain = plain_on(model, device)
    ids = tokens(device)
    settings = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.3, "min_new_tokens": 8}
    torch.manual_seed(5)
    must = plain.generate(ids, **settings)
    with streamed(model, device) as handle:
        torch.manual_seed(5)
        with expect.watch(handle) as calls:
            got = model.generate(ids, **settings)
        assert_equal(got, must)
        expect.assert_streams_exactly(calls, exact_passes=8)


def test_generate_never_compiles_a_static_cache_by_itself(device: torch.device) -> None:
    model = tiny_llama()
    with streamed(model, device):
        assert model._valid_auto_compile_criteria({}, None) is False
    assert "_valid_auto_compile_criteria" not in vars(model)


def test_generate_with_an_assistant_equals_plain(device: torch.device) -> None:
    model, assistant = tiny_llama(), tiny_llama(num_hidden_layers=2)
    plain, plain_assistant = plain_on(model, device), plain_on(assistant, device)
    ids = tokens(device, batch=1)
    must = plain.generate(ids, assistant_model=plain_assistant, **_SETTINGS)
    with streamed(model, device) as handle, streamed(assistant, device) as other:
        with expect.watch(handle) as calls, expect.watch(other) as other_calls:
            got = model.generate(ids, assistant_model=assistant, **_SETTINGS)
        assert_equal(got, must)
        expect.assert_streams_exactly(calls, exact_passes=len(calls.passes))
        expect.assert_streams_exactly(other_calls, exact_passes=len(other_calls.passes))


def test_generate_continued_from_a_cache_equals_plain(device: torch.device) -> None:
    model = tiny_llama()
    plain = plain_on(model, device)
    ids = tokens(device, length=8)

    @torch.no_grad()
    def in_two_steps(one: Any) -> torch.Tensor:
        first = one(ids[:, :5], use_cache=True)
        second = one(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
        return torch.cat([first.logits, second.logits], dim=1)

    must = in_two_steps(plain)
    with streamed(model, device) as handle:
        with expect.watch(handle) as calls:
            got = in_two_steps(model)
        assert_equal(got, must)
        expect.assert_streams_exactly(calls, exact_passes=2)


def test_generate_in_a_transformers_pipeline_equals_plain(device: torch.device) -> None:
    from transformers import pipeline

    model = tiny_llama()
    plain = plain_on(model, device)
    ids = tokens(device)
    must = plain.generate(ids, **_SETTINGS)
    with streamed(model, device) as handle:
        task = pipeline("text-generation", model=model, tokenizer=_tokenizer(), device=device)
        assert task.device == device
        assert task.model is model
        with expect.watch(handle) as calls:
            got = task.model.generate(ids, **_SETTINGS)
            texts = task("a b c", max_new_tokens=3, do_sample=False, return_full_text=False)
        assert_equal(got, must)
        assert isinstance(texts[0]["generated_text"], str)
        expect.assert_streams_exactly(calls, exact_passes=len(calls.passes))
    plain_task = pipeline("text-generation", model=plain, tokenizer=_tokenizer(), device=device)
    assert texts == plain_task("a b c", max_new_tokens=3, do_sample=False, return_full_text=False)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {
        chr(ord("a") + index): 3 + index for index in range(26)
    }
    words |= {f"w{index}": index for index in range(len(words), 64)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
