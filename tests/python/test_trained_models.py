"""The two trained models: same bits, exact copies, and the plain model back, in every mode."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import torch_offload
from examples.real_models import RealModel
from tests.python import expect
from tests.python.dropin import assert_equal
from tests.python.leaf_oracle import settle
from tests.python.trained_models import gemma, minilm

__all__ = ["gemma", "minilm"]  # fixtures: used by name

SENTENCES = ["A kitten naps on the sill.", "Interest rates were raised, and then raised again."]
PROMPT = "The capital of France is"
NEW_TOKENS = 4
FORWARDS = 3

MODES_AND_STREAMS = [
    ("sync", "shared"),
    ("streams", "shared"),
    ("streams", "split"),
    ("events", "shared"),
    ("events", "split"),
    ("pipeline", "shared"),
    ("pipeline", "split"),
]
# With LEAVES, each mode, each layout and each granularity meets each of the others at least once.
PAIRS = [
    ("sync", "shared", "layer"),
    ("sync", "shared", "sublayer"),
    ("streams", "split", "sublayer"),
    ("streams", "shared", "layer"),
    ("events", "shared", "sublayer"),
    ("events", "split", "layer"),
    ("pipeline", "shared", "sublayer"),
    ("pipeline", "split", "layer"),
]
LEAVES = [
    ("sync", "shared"),
    ("streams", "shared"),
    ("events", "split"),
    ("pipeline", "shared"),
]


def test_pairs_of_options_are_all_there() -> None:
    rows = [*PAIRS, *((*row, "module") for row in LEAVES)]
    axes = (("sync", "streams", "events", "pipeline"), ("shared", "split"))
    axes = (*axes, ("sublayer", "layer", "module"))
    for one, other in itertools.combinations(range(3), 2):
        wanted = set(itertools.product(axes[one], axes[other])) - {("sync", "split")}
        assert {(row[one], row[other]) for row in rows} == wanted


def embed(loaded: RealModel, device: torch.device) -> torch.Tensor:
    """Of the sentences: (sentences, tokens, width) vectors, or the logits of a language model."""
    batch = loaded.tokenizer(SENTENCES, padding=True, return_tensors="pt").to(device)
    with torch.inference_mode():
        return loaded.model(**batch)[0]


def generate(loaded: RealModel, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens continued greedily, and the logits that they were chosen from."""
    inputs = loaded.tokenizer(PROMPT, return_tensors="pt").to(device)
    with torch.inference_mode():
        result = loaded.model.generate(
            **inputs,
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return result.sequences, torch.stack(result.logits)


def assert_everything_streamed(handle: torch_offload.Handle, layers: int, forwards: int) -> None:
    """By hand, beside the oracle: all layers are streamed units, each copied for each forward."""
    stats = handle.stats
    streamed = [unit for unit in handle.units if unit.place is not None]
    assert {unit.layer_index for unit in streamed} == set(range(layers))
    assert stats.forwards == forwards
    needed = forwards * len(streamed)
    mode = handle.config.mode
    if mode in ("sync", "streams"):
        assert (stats.onloads, stats.prefetched, stats.misses) == (needed, 0, needed)
        assert stats.bytes_onloaded == forwards * sum(unit.size_bytes for unit in streamed)
    else:
        assert stats.hits == 0
        # What lies ready for the next forward was copied as well.
        assert needed <= stats.onloads < needed + len(streamed)
        assert stats.prefetched + stats.misses == stats.onloads
    if mode == "pipeline":
        assert stats.misses == 1, "only the first unit of the first forward was not prefetched"
    assert stats.window_bytes < sum(unit.size_bytes for unit in streamed)


@pytest.mark.parametrize("granularity", ["sublayer", "layer"])
@pytest.mark.parametrize(("mode", "streams"), MODES_AND_STREAMS)
def test_minilm_streamed_is_bit_equal(
    minilm: RealModel, device: torch.device, mode: str, streams: str, granularity: str
) -> None:
    expected = embed(minilm, device)
    with torch_offload.offload(
        minilm.model, device, mode=mode, streams=streams, granularity=granularity
    ) as handle:
        with expect.watch(handle) as calls:
            for _ in range(FORWARDS):
                assert torch.equal(embed(minilm, device), expected)
        expect.assert_streams_exactly(calls)
        expect.assert_at_rest(handle)
        assert_everything_streamed(handle, layers=6, forwards=FORWARDS)
    assert torch.equal(embed(minilm, device), expected)


@pytest.mark.parametrize(("mode", "streams", "granularity"), PAIRS)
def test_gemma_streamed_writes_the_same_tokens(
    gemma: RealModel, device: torch.device, mode: str, streams: str, granularity: str
) -> None:
    expected_tokens, expected_logits = generate(gemma, device)
    with torch_offload.offload(
        gemma.model, device, mode=mode, streams=streams, granularity=granularity
    ) as handle:
        with expect.watch(handle) as calls:
            tokens, logits = generate(gemma, device)
        assert torch.equal(tokens, expected_tokens)
        assert torch.equal(logits, expected_logits)
        expect.assert_streams_exactly(calls)
        expect.assert_at_rest(handle)
        assert_everything_streamed(handle, layers=18, forwards=NEW_TOKENS)


def test_gemma_writes_sensible_text(gemma: RealModel, device: torch.device) -> None:
    with torch_offload.offload(gemma.model, device):
        tokens, _ = generate(gemma, device)
    assert gemma.tokenizer.decode(tokens[0], skip_special_tokens=True).startswith(
        f"{PROMPT} the capital of"
    )


def test_minilm_finds_what_is_alike(minilm: RealModel, device: torch.device) -> None:
    texts = ["The cat sleeps in the sun.", "Interest rates rose.", "A kitten naps on the sill."]
    batch = minilm.tokenizer(texts, padding=True, return_tensors="pt").to(device)
    with torch_offload.offload(minilm.model, device), torch.inference_mode():
        hidden = minilm.model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    cat, rates, kitten = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert cat @ kitten > 0.3 > cat @ rates


@pytest.mark.parametrize(("mode", "streams"), LEAVES)
@pytest.mark.parametrize("name", ["minilm", "gemma"])
def test_leaves_streamed_are_bit_equal(
    request: pytest.FixtureRequest, device: torch.device, name: str, mode: str, streams: str
) -> None:
    loaded = request.getfixturevalue(name)
    tokens = torch.arange(100, 108, device=device)[None]
    with torch.inference_mode():
        expected = loaded.model(tokens)[0]
        with torch_offload.offload(
            loaded.model, device, mode=mode, streams=streams, granularity="module"
        ) as handle:
            sublayers = {unit.name for unit in handle.units}
            settle(handle, lambda: assert_equal(loaded.model(tokens)[0], expected))
            before = handle.stats
            with expect.watch(handle) as calls:
                for _ in range(FORWARDS):
                    assert torch.equal(loaded.model(tokens)[0], expected)
            expect.assert_streams_exactly(calls, exact_passes=FORWARDS)
            after = handle.stats
            streamed = [unit for unit in handle.units if unit.place is not None]
            expect.assert_at_rest(handle)
    assert {unit.name for unit in streamed}.isdisjoint(sublayers), "the units were not cut anew"
    assert after.onloads - before.onloads == FORWARDS * len(streamed)
    assert after.bytes_onloaded - before.bytes_onloaded == FORWARDS * sum(
        unit.size_bytes for unit in streamed
    )
    if mode == "pipeline":
        assert after.misses == before.misses
    assert torch.equal(loaded.model(tokens)[0], expected)


@pytest.mark.parametrize(
    ("name", "mode"), [("minilm", "sync"), ("minilm", "pipeline"), ("gemma", "pipeline")]
)
def test_remove_after_forwards_gives_the_plain_model_back(
    request: pytest.FixtureRequest, device: torch.device, name: str, mode: str
) -> None:
    loaded = request.getfixturevalue(name)
    expected = embed(loaded, device)
    before = expect.snapshot(loaded.model)
    handle = torch_offload.offload(loaded.model, device, mode=mode)
    assert torch.equal(embed(loaded, device), expected)
    assert handle.stats.bytes_onloaded > 0
    handle.remove()
    assert torch_offload.handle_of(loaded.model) is None
    expect.assert_unchanged(loaded.model, before, same_memory=False)
    assert torch.equal(embed(loaded, device), expected)


@pytest.mark.parametrize("transport", ["packed", "packed_resident"])
@pytest.mark.parametrize(("name", "layers"), [("minilm", 6), ("gemma", 18)])
def test_packed_weights_in_bf16_are_bit_equal(
    request: pytest.FixtureRequest, device: torch.device, name: str, layers: int, transport: str
) -> None:
    loaded = request.getfixturevalue(name)
    model = torch_offload.align(copy.deepcopy(loaded.model).bfloat16())
    tokens = torch.arange(100, 108, device=device)[None]
    with torch.inference_mode():
        expected = model(tokens)[0]
        with torch_offload.offload(
            model, device, transport=transport, gpu_budget=None, depth=0
        ) as handle:
            with expect.watch(handle) as calls:
                for _ in range(FORWARDS):
                    assert torch.equal(model(tokens)[0], expected)
            expect.assert_streams_exactly(calls)
            expect.assert_at_rest(handle)
            stats, units = handle.stats, [unit for unit in handle.units if unit.place is not None]
            assert {unit.layer_index for unit in units} == set(range(layers))
            assert {unit.transport for unit in units} == {transport}
            assert stats.onloads >= FORWARDS * len(units)
            if transport == "packed":
                assert stats.bytes_copied == sum(u.copied_bytes * u.onloads for u in units)
                assert 0.65 < stats.bytes_copied / stats.bytes_onloaded < 0.72
            else:
                assert all(unit.copied_bytes == 0 for unit in units)
                assert 0.65 < stats.packed_bytes / sum(u.size_bytes for u in units) < 0.72
        assert torch.equal(model(tokens)[0], expected)
