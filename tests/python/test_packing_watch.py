"""Edited units that lose their packing: told once, explained, and packed again by replan()."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from tests.python.dropin import assert_equal, plain_on, tiny_llama, tokens
from torch_offload import Handle, offload
from torch_offload.packing_watch import PackingWatch

HOST = torch.device("cpu")
SIZES = {"hidden_size": 256, "intermediate_size": 512}
MASTERS = pytest.mark.parametrize("masters", ["plain", "packed"])
_TOLD = r"travel raw from now on.*handle\.replan\(\)"


def llama() -> Any:
    return tiny_llama(**SIZES).bfloat16()


def of_one_exponent() -> Any:
    """A model whose weights pack a hundredth better than those that are loaded later."""
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.uniform_(0.03125, 0.0624)
    return model


def run(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens(HOST)).logits


def ways(handle: Handle) -> set[str]:
    return {unit.transport for unit in handle.units if unit.place is not None}


def edit_beyond_room(weight: torch.Tensor) -> None:
    with torch.no_grad():  # more exponents than before, and still worth packing
        weight.mul_(torch.exp2(torch.randint(-6, 6, weight.shape)))


@MASTERS
@pytest.mark.parametrize("transport", ["packed", "packed_resident"])
def test_weights_that_are_loaded_later_are_packed_again_by_replan(
    transport: Any, masters: Any
) -> None:
    model, trained = of_one_exponent(), llama()
    expected = run(plain_on(trained, HOST))
    with offload(model, HOST, transport=transport, masters=masters) as handle:
        run(model)
        assert ways(handle) == {transport}
        model.load_state_dict(trained.state_dict())
        with pytest.warns(UserWarning, match=_TOLD) as told:
            assert_equal(run(model), expected)
        assert len(told) == 1
        assert told[0].filename == __file__
        assert "raw" in ways(handle)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_equal(run(model), expected)
            handle.replan(gpu_budget=None)
            assert ways(handle) == {transport}
            assert_equal(run(model), expected)
        edit_beyond_room(model.model.layers[1].mlp.up_proj.weight)
        with pytest.warns(UserWarning, match=_TOLD):  # another one, after another plan
            run(model)
        handle.replan()
        assert ways(handle) == {transport}


@MASTERS
def test_explanation_names_what_is_no_longer_packed_and_counts_host_memory(masters: Any) -> None:
    model = llama()
    with offload(model, HOST, transport="packed", masters=masters) as handle:
        run(model)
        assert handle.explain().no_longer_packed == ()
        assert "no longer packed" not in str(handle.explain())
        edit_beyond_room(model.model.layers[1].mlp.up_proj.weight)
        with pytest.warns(UserWarning, match=_TOLD):
            run(model)
        found = handle.explain()
        assert found.no_longer_packed == ("model.layers.1.mlp",)
        assert found.host_bytes == handle.stats.host_bytes
        document = found.to_json()
        assert document["host_bytes"] == handle.stats.host_bytes
        assert document["no_longer_packed"] == ["model.layers.1.mlp"]
        assert "no longer packed" in str(found)
        handle.replan()
        assert handle.explain().no_longer_packed == ()


def test_raw_transport_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(PackingWatch, "_look", lambda self: asked.append(self) or ())
    model = llama()
    for transport, number in (("raw", 0), ("packed", 2)):
        with offload(model, HOST, transport=transport):
            run(model)
            run(model)
        assert len(asked) == number
