"""Published and tried faults that live above the devices: each planted, each with its clean twin.

The others are calls of a device: csrc/check/published_races.cpp. A plant returns whether our
checks see something wrong: they must where it is planted, and must not in the twin.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_offload._C import StateError
from torch_offload.calls import unwrap
from torch_offload.handle import Handle
from torch_offload.offload import offload
from torch_offload.selfcheck.failing_operator import FailingOperator
from torch_offload.selfcheck.subjects import Stack
from torch_offload.storage import align

_WIDTH = 16


@dataclass(frozen=True)
class Plant:
    """One fault.

    Attributes:
        id: As in `_C.published_races`.
        run: Plants it, or else runs its twin, on a device. Returns whether something is seen.
    """

    id: str
    run: Callable[[torch.device, bool], bool]


def _stack(num_blocks: int = 3) -> Stack:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12)
        model = Stack(num_blocks, _WIDTH).eval()
    align(model)
    return model


def _rows(device: torch.device) -> torch.Tensor:
    return torch.randn(4, _WIDTH, generator=torch.Generator().manual_seed(4)).to(device)


@contextmanager
def _streamed(model: nn.Module, device: torch.device, **options: Any) -> Iterator[Handle]:
    with offload(model, device, **({"depth": 0, "gpu_budget": None} | options)) as handle:
        yield handle


# --- H4: buffers not restored on one of two paths -------------------------------------------------


class _Normed(nn.Module):
    """A unit with buffers: it normalizes by statistics that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(_WIDTH)
        self.up = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.up(self.norm(x))
        return output


def _restore_on_one_path(unit: _Normed) -> None:
    lay = unit.norm.running_mean

    def onload(module: Any, args: Any) -> None:
        assert lay is not None
        module.norm.running_mean = lay.clone()

    def bring_back(module: Any, args: Any, output: Any) -> None:  # not after an exception
        module.norm.running_mean = lay

    unit.register_forward_pre_hook(onload)
    unit.register_forward_hook(bring_back)


class _LayerError(RuntimeError):
    pass


def _fail(*args: Any) -> None:
    raise _LayerError


@torch.no_grad()
def buffers_not_restored(device: torch.device, planted: bool) -> bool:
    """H4, https://github.com/huggingface/diffusers/issues/13238."""
    model: Any = _stack()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for block in model.blocks:
            block.mlp = _Normed().eval()
    align(model)
    if planted:
        _restore_on_one_path(model.to(device).blocks[1].mlp)
        return _moves_buffers(model, device)
    with _streamed(model, device):
        return _moves_buffers(model, device)


def _moves_buffers(model: Any, device: torch.device) -> bool:
    """Whether buffers lie elsewhere after a forward, or after one that fails inside a unit."""
    x = _rows(device)

    def places() -> list[tuple[torch.device, int]]:
        return [(buffer.device, buffer.data_ptr()) for buffer in model.buffers()]

    before, must = places(), model(x)
    after_one = places()
    hook = model.blocks[1].mlp.up.register_forward_hook(_fail)
    with suppress(_LayerError):
        model(x)
    hook.remove()
    return after_one != before or places() != before or not torch.equal(model(x), must)


# --- H11, H12: nothing installed, or nothing asked ------------------------------------------------


@torch.no_grad()
def never_installed(device: torch.device, planted: bool) -> bool:
    """H11, https://github.com/vllm-project/vllm/issues/51462: only counts tell it."""
    model = _stack()
    with _streamed(model, device) as handle:
        model(_rows(device))
        if planted:
            for unit in handle.units:
                unwrap(model.get_submodule(unit.name))
        before = handle.stats
        try:
            model(_rows(device))
        except RuntimeError:  # on a GPU the weights are not even there
            return True
        copied = handle.stats.bytes_onloaded - before.bytes_onloaded
        return copied < sum(unit.size_bytes for unit in handle.units)


@torch.no_grad()
def used_without_its_module(device: torch.device, planted: bool) -> bool:
    """H12, https://github.com/huggingface/transformers/issues/46978: at rest it is its master."""
    model = _stack()
    weight: Any = model.get_parameter("blocks.0.attn.weight")
    truth, x = weight.clone(), _rows(torch.device("cpu"))
    with _streamed(model, device):
        model(_rows(device))
        if planted:  # what offloaders leave behind that keep nothing at rest
            weight.data = torch.zeros_like(truth)
        seen = not torch.equal(nn.functional.linear(x, weight), nn.functional.linear(x, truth))
        if planted:
            weight.data = truth
    return seen


# --- H19: a wrapper subclass ----------------------------------------------------------------------


class _Wrapper(torch.Tensor):
    """A tensor whose bytes are those of another one: setting its data changes nothing."""

    wrapped: torch.Tensor

    @staticmethod
    def around(wrapped: torch.Tensor) -> _Wrapper:
        wrapper: _Wrapper = torch.Tensor._make_wrapper_subclass(
            _Wrapper, wrapped.shape, dtype=wrapped.dtype
        )
        wrapper.wrapped = wrapped
        return wrapper

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def bare(value: Any) -> Any:
            return value.wrapped if isinstance(value, _Wrapper) else value

        result = func(*map(bare, args), **(kwargs or {}))
        return cls.around(result) if func is torch.ops.aten.detach.default else result


@torch.no_grad()
def data_set_in_vain(device: torch.device, planted: bool) -> bool:
    """H19: such parameters are refused by name."""
    model: Any = _stack()
    if planted:
        attn = model.blocks[1].attn
        attn.weight = nn.Parameter(_Wrapper.around(attn.weight.detach()), requires_grad=False)
    try:
        with _streamed(model, device):
            return False
    except ValueError as error:
        return "_Wrapper" in str(error)


# --- H20: backward over places that were overwritten ----------------------------------------------


def backward_over_places(device: torch.device, planted: bool) -> bool:
    """H20: the versions of places tell it, so backward raises."""
    model = _stack()
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        with _streamed(model, device, resident=() if planted else ("blocks.2",)):
            x = _rows(device)
            # The twin goes back through the last block only, which lies still.
            output = model(x) if planted else model.blocks[2](model(x).detach())
            try:
                output.sum().backward()
            except RuntimeError as error:
                return "modified by an inplace operation" in str(error)
    return False


# --- H21: an edit that moves neither version nor pointer ------------------------------------------


@torch.no_grad()
def edit_through_data(device: torch.device, planted: bool) -> bool:
    """H21: returns whether the edit was seen, and the new bytes used."""
    model = _stack()
    x = _rows(device)
    with _streamed(model, device, depth=2**20) as handle:  # so roomy that nothing is copied twice
        for _ in range(2):
            before_edit = model(x)
        weight = model.get_parameter("blocks.0.attn.weight")
        if planted:
            weight.data += 0.5
        copied = handle.stats.onloads
        output = model(x)
        return handle.stats.onloads > copied and not torch.equal(output, before_edit)


# --- H22: an interrupt between swap and restore ---------------------------------------------------


@torch.no_grad()
def interrupt_between_swap_and_restore(device: torch.device, planted: bool) -> bool:
    """H22: after an interrupt at each operator in turn, every parameter is its master again."""
    model: Any = _stack()
    if planted:
        _swap_by_hooks(model.to(device).blocks[1].attn)
        return _is_left_behind(model, device)
    with _streamed(model, device):
        return _is_left_behind(model, device)


def _is_left_behind(model: nn.Module, device: torch.device) -> bool:
    x = _rows(device)
    at_rest = [parameter.data_ptr() for parameter in model.parameters()]
    for k in range(1, 1000):
        try:
            with FailingOperator(k):
                model(x)
            return False
        except KeyboardInterrupt:
            if [parameter.data_ptr() for parameter in model.parameters()] != at_rest:
                return True
    raise AssertionError("a forward of three blocks with a thousand operators")


def _swap_by_hooks(module: Any) -> None:
    """As offloaders do that have hooks instead of a wrapper: none runs on an interrupt."""
    master = module.weight.data
    place = master.clone()
    module.register_forward_pre_hook(lambda *_: setattr(module.weight, "data", place))
    module.register_forward_hook(lambda *_: setattr(module.weight, "data", master))


# --- H23: two threads through one unit ------------------------------------------------------------


def two_threads(device: torch.device, planted: bool) -> bool:
    """H23: the second one is refused, and the first one's result is right."""
    model: Any = _stack()
    x = _rows(device)
    errors: list[BaseException] = []

    def second(*args: Any) -> None:
        def call() -> None:
            try:
                with torch.no_grad():
                    # The copy gives this thread its context before a kernel library asks for it.
                    model(x.clone())
            except StateError as error:
                errors.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    with torch.no_grad(), _streamed(model, device):
        must = model(x)
        if planted:
            hook = model.blocks[1].mlp.down.register_forward_pre_hook(second)
            output = model(x)
            hook.remove()
            if not torch.equal(output, must):
                raise AssertionError("the first thread's output is wrong")
        else:
            second()
    return bool(errors)


# --- H24: autocast keeps what was cast ------------------------------------------------------------


@torch.no_grad()
def cached_casts(device: torch.device, planted: bool) -> bool:
    """H24: returns whether an edit inside an autocast region goes unseen, as in plain PyTorch."""
    model: Any = _stack()
    if planted:
        return _misses_an_edit(model.to(device), device)
    with _streamed(model, device):
        return _misses_an_edit(model, device)


def _misses_an_edit(model: Any, device: torch.device) -> bool:
    x = _rows(device)
    with torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=True):
        model(x)
        model.blocks[1].attn.weight.mul_(3.0)
        output = model(x)
    with torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=True):
        must = model(x)
    return not torch.equal(output, must)


PLANTS = (
    Plant("H4", buffers_not_restored),
    Plant("H11", never_installed),
    Plant("H12", used_without_its_module),
    Plant("H19", data_set_in_vain),
    Plant("H20", backward_over_places),
    Plant("H21", edit_through_data),
    Plant("H22", interrupt_between_swap_and_restore),
    Plant("H23", two_threads),
    Plant("H24", cached_casts),
)
