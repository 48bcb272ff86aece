"""`generate` in all its forms: the plain model's tokens, and exactly the copies they need."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer, cache_utils

import torch_offload
from tests.python import expect
from tests.python.dropin import (
    assert_equal,
    plain_on,
    streamed,
    tiny_llama,
    tiny_tokenizer,
    tokens,
)
from tests.python.models import CASES

# A part of torch that transformers imports for static caches.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated:DeprecationWarning")

_SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}


def _windowed() -> Any:
    """A Mistral whose attention looks back fewer tokens than the prompt has."""
    return torch_offload.align(CASES["mistral"].build())


def _assert_generates_like_plain(
    device: torch.device,
    settings: dict[str, Any],
    make: Callable[[], Any] = tiny_llama,
    **options: Any,
) -> None:
    model = make()
    plain = plain_on(model, device)
    ids = tokens(device, length=10)
    must = plain.generate(ids, **_SETTINGS, **settings)
    with streamed(model, device, **options) as handle:
        with expect.watch(handle) as calls:
            got = model.generate(ids, **_SETTINGS, **settings)
        assert_equal(got, must)
        assert len(calls.passes) >= 6
        expect.assert_streams_exactly(calls, exact_passes=len(calls.passes))
        expect.assert_at_rest(handle)
        # The first unit of all could not be foreseen, everything else was: a run of like passes.
        assert handle.config.mode != "pipeline" or handle.stats.misses == 1


@pytest.mark.parametrize("mode", ["sync", "streams", "events", "pipeline"])
def test_generate_each_mode_equals_plain(device: torch.device, mode: str) -> None:
    _assert_generates_like_plain(device, {}, mode=mode)


_WAYS = {
    "no-cache": {"use_cache": False},
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "beams-returned": {"num_beams": 2, "num_return_sequences": 2},
    "beams-static": {"num_beams": 2, "cache_implementation": "static"},
    "prompt-in-chunks": {"prefill_chunk_size": 4},
    "scores": {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_hidden_states": True,
    },
}


@pytest.mark.parametrize("way", _WAYS)
def test_generate_each_way_equals_plain(device: torch.device, way: str) -> None:
    _assert_generates_like_plain(device, _WAYS[way])


@pytest.mark.parametrize("way", ["no-cache", "dynamic", "static", "beams", "beams-static"])
def test_generate_with_a_sliding_window_equals_plain(device: torch.device, way: str) -> None:
    _assert_generates_like_plain(device, _WAYS[way], _windowed)


@pytest.mark.needs_cuda
@pytest.mark.parametrize(
    ("implementation", "make"),
    # transformers' own offloaded static cache fails where every layer has a sliding window.
    [("offloaded", tiny_llama), ("offloaded_static", tiny_llama), ("offloaded", _windowed)],
)
def test_generate_offloaded_cache_equals_plain(
    device: torch.device, implementation: str, make: Callable[[], Any]
) -> None:
    _assert_generates_like_plain(device, {"cache_implementation": implementation}, make)


# The backends of transformers: which library each needs, and settings that fit the tiny model.
_GROUPS = {"nbits": 4, "q_group_size": 16, "residual_length": 2}
_QUANTIZED = {
    "fp8": ("torch", {}),
    "quanto": ("optimum.quanto", _GROUPS),
    "hqq": ("hqq.core.quantize", _GROUPS),
}


@pytest.mark.parametrize("backend", _QUANTIZED)
@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_quantized_cache_equals_plain(
    device: torch.device, backend: str, num_beams: int
) -> None:
    library, settings = _QUANTIZED[backend]
    pytest.importorskip(library)
    if backend == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no fp8 cache")
    _assert_generates_like_plain(
        device,
        {
            "cache_implementation": "quantized",
            "cache_config": {"backend": backend, **settings},
            "num_beams": num_beams,
        },
    )


def test_generate_in_a_thread_with_a_streamer_equals_plain(device: torch.device) -> None:
    model = tiny_llama()
    plain = plain_on(model, device)
    ids = tokens(device, batch=1)
    must = plain.generate(ids, **_SETTINGS)
    with streamed(model, device) as handle:
        with expect.watch(handle) as calls:
            streamer = TextIteratorStreamer(tiny_tokenizer(), timeout=60)
            settings = {**_SETTINGS, "inputs": ids, "streamer": streamer}
            thread = threading.Thread(target=model.generate, kwargs=settings)
            thread.start()
            text = "".join(streamer)
            thread.join()
        assert text.split() == tiny_tokenizer().decode(must[0]).split()
        expect.assert_streams_exactly(calls, exact_passes=6)
        assert_equal(model.generate(ids, **_SETTINGS), must)


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
        task = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer(), device=device)
        assert task.device == device
        assert task.model is model
        with expect.watch(handle) as calls:
            got = task.model.generate(ids, **_SETTINGS)
            texts = task("a b c", max_new_tokens=3, do_sample=False, return_full_text=False)
        assert_equal(got, must)
        assert isinstance(texts[0]["generated_text"], str)
        expect.assert_streams_exactly(calls, exact_passes=len(calls.passes))
    plain_task = pipeline("text-generation", model=plain, tokenizer=tiny_tokenizer(), device=device)
    assert texts == plain_task("a b c", max_new_tokens=3, do_sample=False, return_full_text=False)
