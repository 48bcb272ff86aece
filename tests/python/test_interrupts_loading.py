"""Ctrl-C at any moment while weights are moved or a model is loaded: all is as it was."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python import expect
from tests.python.checkpoints import load, load_plain
from tests.python.dropin import assert_streams_like_plain, plain_on, rows, tiny_llama, tiny_stack
from tests.python.interrupts import interrupt_often, needs_timer
from torch_offload import _C
from torch_offload.devices import devices_made_by

IDS = torch.tensor([[3, 60, 7, 3]])
COUNT = 30

pytestmark = [
    needs_timer,
    # It may strike between the opening of a file and the `with` that closes it, in pathlib too.
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]


@pytest.fixture(autouse=True)
def quick_collections() -> Iterator[None]:
    """What is there already need not be looked at again by every collection.

    Nor is anybody told of one: Python would swallow an interrupt that strikes there.
    """
    gc.collect()
    gc.freeze()
    callbacks = gc.callbacks[:]
    gc.callbacks.clear()
    yield
    gc.callbacks[:] = callbacks
    gc.unfreeze()


@contextmanager
def watched_devices() -> Iterator[list[_C.Device]]:
    """The devices that are made meanwhile, to ask what is still page-locked."""
    made: list[_C.Device] = []

    def kept(device: torch.device) -> _C.Device:
        made.append(_C.Device(device))
        return made[-1]

    with devices_made_by(kept):
        yield made


def assert_nothing_is_locked(devices: list[_C.Device]) -> None:
    gc.collect()
    assert [device.counters.registered_bytes for device in devices] == [0] * len(devices)
    assert [device.counters.allocated_bytes for device in devices] == [0] * len(devices)
    devices.clear()


def mapped(folder: Path) -> list[str]:
    """What of a folder this process still maps, once transformers' own threads have ended."""
    deadline = time.monotonic() + 20
    while True:
        gc.collect()
        lines = Path("/proc/self/maps").read_text().splitlines()
        found = [line for line in lines if str(folder) in line]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.01)


@pytest.mark.parametrize(
    "options",
    [{}, {"gpu_budget": 40_000}, {"streams": "split"}, {"transport": "packed"}],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
def test_interrupted_offload_leaves_the_model_as_it_was(options: dict[str, Any]) -> None:
    device = torch.device("cpu")
    model = tiny_stack(6, 32)
    if options.get("transport") == "packed":
        model.bfloat16()
    before = expect.snapshot(model)
    with watched_devices() as devices:

        def check() -> None:
            assert torch_offload.handle_of(model) is None
            expect.assert_unchanged(model, before, same_memory=False)
            assert_nothing_is_locked(devices)

        interrupt_often(
            1,
            lambda: torch_offload.offload(model, device, **options),
            lambda: torch_offload.handle_of(model).remove(),  # type: ignore[union-attr]
            check,
            COUNT,
        )
    plain = plain_on(model, device)
    if options.get("transport") != "packed":
        with torch_offload.offload(model, device, **options) as handle, torch.no_grad():
            assert_streams_like_plain(model, plain, handle, lambda m: m(rows(device, width=32)))


def test_interrupted_offload_from_checkpoint_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    source = tiny_llama()
    source.save_pretrained(tmp_path)
    with torch.device("meta"):
        model: Any = type(source)(source.config).eval()
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with watched_devices() as devices:

        def check() -> None:
            now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            assert now.keys() == tensors.keys()
            assert all(now[name] is tensor for name, tensor in tensors.items())
            assert all(parameter.is_meta for parameter in model.parameters())
            assert torch_offload.handle_of(model) is None
            assert_at_class_methods(model)
            assert_nothing_is_locked(devices)
            assert mapped(tmp_path) == []

        def offload() -> None:
            torch_offload.offload_from_checkpoint(model, tmp_path, "cpu")

        def undo() -> None:
            handle = torch_offload.handle_of(model)
            assert handle is not None
            handle.remove()
            for slots, name, tensor in places:
                slots[name] = tensor

        places = [
            (slots, name, tensor)
            for module in model.modules()
            for slots in (module._parameters, module._buffers)
            for name, tensor in slots.items()
        ]
        interrupt_often(2, offload, undo, check, COUNT)
    torch_offload.offload_from_checkpoint(model, tmp_path, "cpu")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, source(IDS).logits)


def assert_at_class_methods(model: nn.Module) -> None:
    """No wrapper and no guard is left on any module."""
    for name, module in model.named_modules():
        ours = {"_call_impl", "forward", "_apply", "__deepcopy__"} & vars(module).keys()
        assert not ours, f"{name} keeps {ours}"


def test_interrupted_from_pretrained_leaves_nothing_behind(tmp_path: Path) -> None:
    from transformers import modeling_utils

    source = tiny_llama()
    source.save_pretrained(tmp_path)
    names = ("safe_open", "convert_and_load_state_dict_in_model")
    theirs = [getattr(modeling_utils, name) for name in names]
    with watched_devices() as devices:
        loaded: list[Any] = []

        def check() -> None:
            loaded.clear()
            assert [getattr(modeling_utils, name) for name in names] == theirs
            assert_nothing_is_locked(devices)
            assert mapped(tmp_path) == []

        interrupt_often(
            3,
            lambda: loaded.append(load(type(source), tmp_path, torch.device("cpu"))),
            loaded.clear,
            check,
            COUNT,
        )
    model = load(type(source), tmp_path, torch.device("cpu"))
    plain = load_plain(type(source), tmp_path, torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("from_files", [False, True], ids=["arena", "files"])
def test_interrupted_replan_leaves_one_of_both_plans(tmp_path: Path, from_files: bool) -> None:
    source = tiny_llama(vocab_size=256)
    source.save_pretrained(tmp_path)
    device = torch.device("cpu")
    plain = load_plain(type(source), tmp_path, device)
    if from_files:
        model = load(type(source), tmp_path, device, gpu_budget=None)
    else:
        model = load_plain(type(source), tmp_path, device)
        torch_offload.offload(model, device, gpu_budget=None)
    handle = torch_offload.handle_of(model)
    assert handle is not None
    whole = 2 * sum(parameter.nbytes for parameter in plain.parameters())

    def replan() -> None:
        for budget in (whole // 3, whole, None):
            handle.replan(gpu_budget=budget)

    def check() -> None:
        expect.assert_at_rest(handle)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, plain(IDS).logits)

    interrupt_often(4, replan, lambda: None, check, 4 * COUNT)
    handle.remove()
    assert_at_class_methods(model)
    assert not model._state_dict_pre_hooks, "saving would still ask us"
    for (name, parameter), expected in zip(
        model.named_parameters(), plain.parameters(), strict=True
    ):
        assert torch.equal(parameter, expected), name
