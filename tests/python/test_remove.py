"""``remove()`` of a model whose weights were given data that nothing has been told of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python.dropin import VOCAB, rows, streamed, tiny_llama, tiny_stack, tokens


def _reshaped(model: Any) -> list[str]:
    model.blocks[2].mlp.up.weight.data = torch.full((64, 16), 0.5)
    model.blocks[2].mlp.up.bias.data = torch.zeros(64)
    model.blocks[2].mlp.down.weight.data = torch.full((16, 64), 0.25)
    return ["blocks.2.mlp.up.weight", "blocks.2.mlp.up.bias", "blocks.2.mlp.down.weight"]


def _of_another_dtype(model: Any) -> list[str]:
    weight = model.blocks[1].attn.weight
    weight.data = weight.data.double() / 3
    return ["blocks.1.attn.weight"]


def _of_another_length(model: Any) -> list[str]:
    # One that could be broadcast to the former shape.
    model.blocks[1].mlp.up.weight.data = torch.full((1, 16), 2.0)
    return ["blocks.1.mlp.up.weight"]


@torch.no_grad()
@pytest.mark.parametrize("edit", [_reshaped, _of_another_dtype, _of_another_length])
@pytest.mark.parametrize("calls", [False, True])
@pytest.mark.parametrize("masters", ["plain", "resident"])
def test_remove_leaves_data_that_does_not_fit_alone(
    device: torch.device, edit: Any, calls: bool, masters: str
) -> None:
    model = tiny_stack()
    x = rows(device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with streamed(model, device) as handle:
        model(x)
        if masters == "resident":  # what was in a master once is on the device by now
            handle.replan(gpu_budget="1GiB")
        edited = edit(model)
        data = {name: model.get_parameter(name).detach().clone() for name in edited}
        addresses = {name: model.get_parameter(name).data_ptr() for name in edited}
        if calls and masters == "plain":
            with pytest.raises(torch_offload.StateError, match=r"handle\.remove\(\)"):
                model(x)
        handle.remove()
    for name, parameter in model.named_parameters():
        if name in edited:
            assert parameter.dtype == data[name].dtype
            assert torch.equal(parameter, data[name]), name
            assert parameter.data_ptr() == addresses[name]
        else:
            assert torch.equal(parameter, before[name]), name


@torch.no_grad()
def test_remove_leaves_a_former_object_with_data_of_its_own_alone(device: torch.device) -> None:
    model = tiny_stack()
    with streamed(model, device) as handle:
        old = model.blocks[1].attn.weight
        new = nn.Parameter(torch.ones(3, 16))
        old.data = torch.full((4, 4), 5.0)
        model.blocks[1].attn.weight = new
        handle.remove()
    assert model.blocks[1].attn.weight is new
    assert torch.equal(new, torch.ones(3, 16))
    assert torch.equal(old, torch.full((4, 4), 5.0))


@pytest.mark.filterwarnings("ignore:torch_offload. this forward runs in grad mode:UserWarning")
def test_remove_of_a_weight_that_shows_a_kept_view_leaves_it(device: torch.device) -> None:
    model = tiny_stack()
    kept: list[torch.Tensor] = []
    with streamed(model, device) as handle:
        attn = model.blocks[1].attn
        hook = attn.register_forward_hook(lambda module, *_: kept.append(module.weight.detach()))
        model(rows(device))
        hook.remove()
        attn.weight.data = kept[0]
        with pytest.raises(RuntimeError, match=r"a view of 'blocks\.1\.attn\.weight'"):
            model(rows(device))
        handle.remove()
    assert handle.is_removed
    with pytest.raises(RuntimeError, match=r"a view of 'blocks\.1\.attn\.weight'"):
        attn.weight.sum()


@torch.no_grad()
def test_remove_after_tied_embeddings_were_resized_keeps_their_new_rows(
    device: torch.device,
) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    ids = tokens(device)
    table = model.lm_head.weight.nbytes
    blocks = sum(parameter.nbytes for parameter in model.model.layers.parameters())
    with torch_offload.offload(model, device, gpu_budget=blocks // 2) as handle:
        model(ids)
        torch.manual_seed(0)
        model.resize_token_embeddings(VOCAB + 12, mean_resizing=False)
        rows_now = model.lm_head.weight.detach().clone()
        assert rows_now.nbytes > table
        handle.remove()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, rows_now)
    assert model.to(device)(ids).logits.shape[-1] == VOCAB + 12
