"""Models of one's own, built without weights and filled from a checkpoint folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import torch_offload
from tests.python.checkpoints import assert_streams_the_same, bytes_in_files, streamed_bytes
from tests.python.dropin import plain_on, rows, tiny_stack
from torch_offload import CheckpointError

WIDTH = 64


class _Runs(nn.Module):
    """Lets the stack be called by keyword, as the common checks call models."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.stack = tiny_stack(num_blocks=4, width=WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("scale", torch.tensor([0.5, 2.0]))
        if tied:
            self.out.weight = self.head.weight

    def forward(self, x: torch.Tensor) -> Any:
        return self.out(self.head(self.stack(x)) * self.scale.sum())


def _save(model: nn.Module, folder: Path, **changes: torch.Tensor) -> None:
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()} | changes
    save_file(weights, folder / "model.safetensors")


def _on_meta(**options: Any) -> _Runs:
    with torch.device("meta"):
        model = _Runs(**options)
    return model.to("meta").eval()


def _inputs(device: torch.device) -> dict[str, Any]:
    return {"x": rows(device, width=WIDTH)}


@pytest.mark.parametrize("streams", ["shared", "split"])
def test_pages_are_unlocked_behind_all_copies_from_them(tmp_path: Path, streams: str) -> None:
    source = tiny_stack(num_blocks=16, width=200)
    _save(source, tmp_path)
    with torch.device("meta"):
        model = tiny_stack(num_blocks=16, width=200)
    host = torch.device("cpu")
    options: dict[str, Any] = {"streams": streams, "gpu_budget": None, "masters": "mmap"}
    handle = torch_offload.offload_from_checkpoint(
        model, tmp_path, host, host_budget="6MiB", **options
    )
    x = rows(host, width=200)
    with torch.no_grad():
        must = source(x)
        model(x)
        with handle.record():
            for _ in range(3):
                assert torch.equal(model(x), must)
    assert handle.stats.file_bytes_locked > 3 * 6 * 2**20, "no pages took turns"
    assert handle.check() == []


def test_model_on_meta_gets_its_weights_from_the_files(
    tmp_path: Path, device: torch.device
) -> None:
    source = _Runs().eval()
    _save(source, tmp_path)
    model = _on_meta()
    handle = torch_offload.offload_from_checkpoint(model, tmp_path, device)
    assert bytes_in_files(handle) == streamed_bytes(handle) > 0
    assert_streams_the_same(model, plain_on(source, device), _inputs(device))
    handle.remove()
    assert all(
        torch.equal(got, expected)
        for got, expected in zip(model.parameters(), source.parameters(), strict=True)
    )


def test_arena_holds_all_if_asked_for(tmp_path: Path, device: torch.device) -> None:
    source = _Runs().eval()
    _save(source, tmp_path)
    model = _on_meta()
    handle = torch_offload.offload_from_checkpoint(model, tmp_path, device, masters="arena")
    assert bytes_in_files(handle) == 0
    assert_streams_the_same(model, plain_on(source, device), _inputs(device))


def test_weights_of_another_dtype_are_cast(tmp_path: Path, device: torch.device) -> None:
    source = _Runs().eval()
    _save(source, tmp_path)
    model = _on_meta().to(torch.float64)
    handle = torch_offload.offload_from_checkpoint(model, tmp_path, device)
    assert bytes_in_files(handle) == 0
    plain = plain_on(source.double(), device)
    assert_streams_the_same(model, plain, {"x": rows(device, width=WIDTH).double()})


def test_tied_weights_stored_once_fill_both(tmp_path: Path, device: torch.device) -> None:
    source = _Runs(tied=True).eval()
    weights = {name: t.contiguous() for name, t in source.state_dict().items()}
    del weights["out.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    model = _on_meta(tied=True)
    model.out.weight = model.head.weight
    torch_offload.offload_from_checkpoint(model, tmp_path, device)
    assert model.out.weight is model.head.weight
    assert_streams_the_same(model, plain_on(source, device), _inputs(device))


class _Again(nn.Module):
    """Runs its first block once more, by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = tiny_stack(num_blocks=4, width=WIDTH)
        self.again = self.stack.blocks[0]

    def forward(self, x: torch.Tensor) -> Any:
        return self.again(self.stack(x))


@pytest.mark.parametrize("name", ["again.", "stack.blocks.0."])
def test_module_of_two_names_is_filled_by_either(
    tmp_path: Path, device: torch.device, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = _Again().eval()
    other = {"again.": "stack.blocks.0.", "stack.blocks.0.": "again."}[name]
    # As safetensors.torch.save_model writes it: shared tensors once, by one of their names.
    weights = {key: value for key, value in source.state_dict().items() if other not in key}
    save_file(weights, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = _Again()
    model.to("meta").eval()
    with caplog.at_level(logging.WARNING, logger="torch_offload"):
        handle = torch_offload.offload_from_checkpoint(model, tmp_path, device)
    assert not caplog.records
    assert model.again is model.stack.blocks[0]
    assert bytes_in_files(handle) == streamed_bytes(handle) > 0
    assert_streams_the_same(model, plain_on(source, device), _inputs(device))


def test_module_of_two_names_that_is_missing_is_named_once(tmp_path: Path) -> None:
    source = _Again().eval()
    weights = {
        key: value
        for key, value in source.state_dict().items()
        if not key.startswith(("again.", "stack.blocks.0."))
    }
    save_file(weights, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = _Again()
    before = list(model.parameters())
    with pytest.raises(CheckpointError, match=r"none for 'stack\.blocks\.0\.") as caught:
        torch_offload.offload_from_checkpoint(model.to("meta"), tmp_path, "cpu")
    assert "again" not in str(caught.value)
    assert all(one is other for one, other in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("masters", ["auto", "arena"])
def test_model_filled_in_inference_mode_is_an_ordinary_one(
    tmp_path: Path, device: torch.device, masters: Any
) -> None:
    source = _Runs().eval()
    _save(source, tmp_path)
    model = _on_meta()
    with torch.inference_mode():
        handle = torch_offload.offload_from_checkpoint(model, tmp_path, device, masters=masters)
        assert torch.is_inference_mode_enabled()
    assert_streams_the_same(model, plain_on(source, device), _inputs(device))
    handle.remove()
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))


def test_surplus_weights_are_logged(
    tmp_path: Path, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    _save(_Runs().eval(), tmp_path, surplus=torch.ones(2))
    with caplog.at_level(logging.WARNING, logger="torch_offload"):
        torch_offload.offload_from_checkpoint(_on_meta(), tmp_path, device)
    assert "holds weights that the model has not: 'surplus'" in caplog.text


@pytest.mark.parametrize(
    ("changes", "drops", "message"),
    [
        ({}, "head.weight", r"got none for 'head.weight'; buffers that no checkpoint holds"),
        ({"head.weight": torch.ones(3, 3)}, None, r"'head.weight' of shape \(64, 64\)"),
    ],
)
def test_weights_that_do_not_fit_fail_and_leave_the_model_as_it_was(
    tmp_path: Path, device: torch.device, changes: Any, drops: str | None, message: str
) -> None:
    source = _Runs().eval()
    weights = {name: t.contiguous() for name, t in source.state_dict().items()} | changes
    if drops:
        del weights[drops]
    save_file(weights, tmp_path / "model.safetensors")
    model = _on_meta()
    before = dict(model.named_parameters())
    with pytest.raises(CheckpointError, match=message):
        torch_offload.offload_from_checkpoint(model, tmp_path, device)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert torch_offload.handle_of(model) is None
    _save(source, tmp_path)
    torch_offload.offload_from_checkpoint(model, tmp_path, device)
    assert_streams_the_same(model, plain_on(source, device), _inputs(device))


def test_interrupt_while_moving_leaves_the_model_as_it_was(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_offload import _C

    _save(_Runs().eval(), tmp_path)
    model = _on_meta()
    before = dict(model.named_parameters())
    move_in = _C.Engine.move_in

    def interrupted(engine: _C.Engine, unit: int) -> None:
        if unit == 2:
            raise KeyboardInterrupt
        move_in(engine, unit)

    monkeypatch.setattr(_C.Engine, "move_in", interrupted)
    with pytest.raises(KeyboardInterrupt):
        torch_offload.offload_from_checkpoint(model, tmp_path, device)
    assert all(model.get_parameter(name) is former for name, former in before.items())
    assert torch_offload.handle_of(model) is None
