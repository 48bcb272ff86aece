"""Edits of weights streamed from a checkpoint file: none is lost, and none reaches the file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import torch_offload
from tests.python.checkpoints import bytes_in_files, handle_of, load, load_plain, save_llama
from tests.python.dropin import assert_equal, tokens

NAME = "model.layers.1.mlp.up_proj.weight"


def _in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(1.5)


def _one_element(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight[3, 5] += 1


def _data(weight: nn.Parameter) -> None:
    weight.data += 0.25


def _numpy(weight: nn.Parameter) -> None:
    weight.detach().numpy()[...] *= 3


def _new_data(weight: nn.Parameter) -> None:
    weight.data = torch.full_like(weight, 0.125)


def _hidden_element(weight: nn.Parameter) -> None:
    weight.data[7, 9] += 1  # moves no counter, and none of the sampled words


def _hidden_numpy_element(weight: nn.Parameter) -> None:
    weight.detach().numpy()[11, 3] = 2


NOTICED = [_in_place, _one_element, _data, _numpy, _new_data]
HIDDEN = [_hidden_element, _hidden_numpy_element]


class _Pair:
    """An offloaded model and the plain one, edited alike."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        source = save_llama(folder)
        self.file = folder / "model.safetensors"
        self.digest = hashlib.sha256(self.file.read_bytes()).digest()
        self.model = load(type(source), folder, device)
        self.plain = load_plain(type(source), folder, device)
        self.handle = handle_of(self.model)
        self.inputs = {"input_ids": tokens(device)}

    def edit(self, change: Callable[[Any], None]) -> None:
        change(self.model.get_parameter(NAME))
        plain = nn.Parameter(self.plain.get_parameter(NAME).detach().cpu())
        change(plain)
        with torch.no_grad():
            self.plain.get_parameter(NAME).copy_(plain)

    def assert_equal(self, passes: int = 3) -> None:
        with torch.inference_mode():
            expected = self.plain(**self.inputs)
            for _ in range(passes):
                assert_equal(self.model(**self.inputs), expected)
        assert hashlib.sha256(self.file.read_bytes()).digest() == self.digest


@pytest.fixture
def pair(tmp_path: Path, device: torch.device) -> _Pair:
    return _Pair(tmp_path, device)


def _assert_one_left(pair: _Pair, before: int) -> None:
    weight = pair.model.get_parameter(NAME)
    assert bytes_in_files(pair.handle) == before - weight.nbytes


@pytest.mark.parametrize("change", NOTICED)
@pytest.mark.parametrize("forwards", [0, 1, 2])
def test_edit_is_noticed_and_takes_one_parameter_out_of_the_file(
    pair: _Pair, change: Callable[[Any], None], forwards: int
) -> None:
    before = bytes_in_files(pair.handle)
    pair.assert_equal(passes=forwards)
    pair.edit(change)
    pair.assert_equal()
    _assert_one_left(pair, before)


@pytest.mark.parametrize("change", NOTICED + HIDDEN)
def test_refresh_finds_every_edit(pair: _Pair, change: Callable[[Any], None]) -> None:
    before = bytes_in_files(pair.handle)
    pair.assert_equal(passes=1)
    pair.edit(change)
    pair.handle.refresh()
    pair.assert_equal()
    _assert_one_left(pair, before)


@pytest.mark.parametrize("change", HIDDEN)
def test_saving_finds_and_saves_every_edit(
    pair: _Pair, tmp_path: Path, change: Callable[[Any], None]
) -> None:
    pair.assert_equal(passes=1)
    pair.edit(change)
    pair.model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert torch.equal(saved[NAME], pair.plain.get_parameter(NAME).cpu())
    pair.assert_equal()


@pytest.mark.parametrize("change", NOTICED + HIDDEN)
def test_remove_keeps_every_edit(pair: _Pair, change: Callable[[Any], None]) -> None:
    pair.assert_equal(passes=1)
    pair.edit(change)
    pair.handle.remove()
    for (name, got), expected in zip(
        pair.model.named_parameters(), pair.plain.parameters(), strict=True
    ):
        assert torch.equal(got.cpu(), expected.cpu()), name
    assert not pair.model._state_dict_pre_hooks


def test_edit_of_one_that_has_left_the_file_is_noticed_again(pair: _Pair) -> None:
    for _ in range(3):
        pair.edit(_data)
        pair.assert_equal(passes=2)
        pair.edit(_one_element)
        pair.assert_equal(passes=2)


def test_tensor_kept_of_a_weight_still_is_the_weight_after_it_left_the_file(pair: _Pair) -> None:
    kept = pair.model.get_parameter(NAME).detach().numpy()
    pair.edit(_in_place)
    pair.assert_equal()
    kept[...] = 0.5
    with torch.no_grad():
        pair.plain.get_parameter(NAME).fill_(0.5)
    pair.assert_equal()


def test_state_dict_of_another_model_is_loaded(pair: _Pair) -> None:
    other = {name: tensor + 0.01 for name, tensor in pair.plain.state_dict().items()}
    pair.model.load_state_dict({name: tensor.cpu() for name, tensor in other.items()})
    pair.plain.load_state_dict(other)
    pair.assert_equal()
    assert bytes_in_files(pair.handle) == 0


def test_replaced_parameter_is_adopted(pair: _Pair) -> None:
    replacement = torch.linspace(-1, 1, 256 * 128).reshape(256, 128)
    layer = pair.model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(replacement)
    with torch.no_grad():
        pair.plain.get_parameter(NAME).copy_(replacement)
    pair.assert_equal()


def test_equal_value_written_is_no_edit(pair: _Pair) -> None:
    before = bytes_in_files(pair.handle)
    pair.edit(lambda weight: weight.data.copy_(weight.data.clone()))
    pair.assert_equal()
    pair.handle.refresh()
    assert bytes_in_files(pair.handle) == before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora_is_merged_and_unmerged(tmp_path: Path, device: torch.device) -> None:
    peft = pytest.importorskip("peft")
    source = save_llama(tmp_path)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    inputs = {"input_ids": tokens(device)}
    model = load(type(source), tmp_path, device, masters="arena")
    handle_of(model).remove()
    plain = torch_offload.align(peft.get_peft_model(model, config)).to(device)
    files = load(type(source), tmp_path, device)
    handle_of(files).remove()  # its weights still are the file's own pages, copied on write
    wrapped = peft.get_peft_model(files, config)
    wrapped.load_state_dict({name: t.cpu() for name, t in plain.state_dict().items()})
    with torch_offload.offload(wrapped, device), torch.inference_mode():
        assert_equal(wrapped(**inputs), plain(**inputs))
        wrapped.merge_adapter()
        plain.merge_adapter()
        assert_equal(wrapped(**inputs), plain(**inputs))
        wrapped.unmerge_adapter()
        plain.unmerge_adapter()
        assert_equal(wrapped(**inputs), plain(**inputs))


def test_units_move_to_the_device_and_back_to_the_file(pair: _Pair) -> None:
    before = bytes_in_files(pair.handle)
    for _ in range(2):
        pair.handle.replan(gpu_budget=2**24)
        assert bytes_in_files(pair.handle) == 0
        pair.assert_equal(passes=1)
        pair.handle.replan(gpu_budget=None)
        assert bytes_in_files(pair.handle) == before
        pair.assert_equal(passes=2)


def test_edit_made_on_the_device_is_kept_on_the_way_back(pair: _Pair) -> None:
    before = bytes_in_files(pair.handle)
    pair.handle.replan(gpu_budget=2**24)
    with torch.no_grad():
        pair.model.get_parameter(NAME).mul_(2)
        pair.plain.get_parameter(NAME).mul_(2)
    pair.assert_equal(passes=1)
    pair.handle.replan(gpu_budget=None)
    pair.assert_equal()
    _assert_one_left(pair, before)
