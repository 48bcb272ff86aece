"""What an offloaded model refuses; afterwards it is offloaded as before, and streams as before."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import torch_offload
from tests.python import expect
from tests.python.dropin import (
    assert_streams_like_plain,
    plain_on,
    rows,
    streamed,
    tiny_llama,
    tiny_stack,
    tokens,
)
from torch_offload import StateError

HOST = torch.device("cpu")


def _save(model: nn.Module, folder: Path) -> None:
    torch.save(model, folder / "model.pt")


_CONVERSIONS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "to-dtype": lambda m, _: m.to(torch.float64),
    "to-meta": lambda m, _: m.to("meta"),
    "half": lambda m, _: m.half(),
    "double": lambda m, _: m.double(),
    "bfloat16": lambda m, _: m.bfloat16(),
    "to_empty": lambda m, _: m.to_empty(device="cpu"),
    "share_memory": lambda m, _: m.share_memory(),
    "deepcopy": lambda m, _: copy.deepcopy(m),
    "deepcopy-in-a-list": lambda m, _: copy.deepcopy([m]),
    "copy": lambda m, _: copy.copy(m),
    "pickle": lambda m, _: pickle.dumps(m),
    "torch.save": _save,
    "torch.save-inside": lambda m, _: torch.save({"model": m}, io.BytesIO()),
    "compile": lambda m, _: m.compile(backend="eager"),
    "torch.compile": lambda m, _: torch.compile(m, backend="eager"),
    "torch.compile-around": lambda m, _: torch.compile(nn.Sequential(m), backend="eager"),
    "jit.script": lambda m, _: torch.jit.script(m),
    "DataParallel": lambda m, _: nn.DataParallel(m),
    "replicate": lambda m, _: m._replicate_for_data_parallel(),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("what", _CONVERSIONS)
@pytest.mark.parametrize("where", ["", "blocks", "blocks.1", "blocks.2.mlp", "blocks.2.mlp.up"])
def test_conversion_of_an_offloaded_model_fails(
    device: torch.device, what: str, where: str, tmp_path: Path
) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device) as handle:
        before = expect.snapshot(model)
        with pytest.raises(StateError, match=r"handle\.remove\(\)"):
            _CONVERSIONS[what](model.get_submodule(where), tmp_path)
        expect.assert_unchanged(model, before)
        assert torch_offload.handle_of(model) is handle
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))


_OF_ANY_MODULE = sorted(
    what
    for what in _CONVERSIONS
    if what.startswith(("to", "half", "double", "bfloat16", "share_memory", "pickle"))
    and "compile" not in what
)


@pytest.mark.parametrize("what", _OF_ANY_MODULE)
def test_conversion_of_a_module_that_stays_fails(
    device: torch.device, what: str, tmp_path: Path
) -> None:
    model = tiny_llama()
    plain = plain_on(model, device)
    ids = tokens(device)
    parts = {
        name: model.get_submodule(name)
        for name in (
            "model.embed_tokens",
            "model.layers.1.input_layernorm",
            "model.rotary_emb",
            "model.norm",
        )
    }
    with streamed(model, device) as handle:
        assert not parts.keys() & {unit.name for unit in handle.units}
        for _ in range(2):
            before = expect.snapshot(model)
            for part in parts.values():
                with pytest.raises(StateError, match=r"handle\.remove\(\)"):
                    _CONVERSIONS[what](part, tmp_path)
            expect.assert_unchanged(model, before)
            handle.replan(gpu_budget=None)  # wraps and guards anew
        assert_streams_like_plain(model, plain, handle, lambda m: m(ids).logits)
        # Where it is already, as it is already.
        assert all(part.to(device) is part for part in parts.values())
    assert all(part.half() is part for part in parts.values())


def test_copy_of_a_module_that_stays_is_a_plain_one(device: torch.device) -> None:
    model = tiny_stack()
    x = rows(device)
    with streamed(model, device), torch.no_grad():
        must = model(x)
        copied, (again,) = copy.deepcopy(model.embed), copy.deepcopy([model.embed])
        for one in (copied, again):
            assert vars(one).keys() == vars(nn.Linear(1, 1)).keys()
            assert torch.equal(one(x), model.embed(x))
            assert one.double() is one
            assert one.weight.dtype == torch.float64
            pickle.loads(pickle.dumps(one))
        with pytest.raises(StateError, match=r"handle\.remove\(\)"):
            model.embed.double()
        assert torch.equal(model(x), must)


@pytest.mark.parametrize(
    "convert", [nn.Module.half, lambda m: m.to("meta"), lambda m: m.to_empty(device="cpu")]
)
def test_conversion_from_outside_says_what_has_been_converted(
    device: torch.device, convert: Callable[[nn.Module], Any]
) -> None:
    """The part of an outer module that comes before the model is no part of the model."""
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device) as handle:
        before = expect.snapshot(model)
        first, last = nn.Linear(2, 2), nn.Linear(2, 2)
        weights = [first.weight.data, last.weight.data]
        with pytest.raises(
            StateError,
            match=r"before it.*has been converted by now; call handle.*of the Stack inside",
        ):
            convert(nn.Sequential(first, model, last))
        assert first.weight.data_ptr() != weights[0].data_ptr()
        assert last.weight.data_ptr() == weights[1].data_ptr()
        expect.assert_unchanged(model, before)
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))
        with pytest.raises(StateError, match=r"no single place to convert; call handle"):
            model.half()


def test_handle_is_found_from_a_module_around_the_model(device: torch.device) -> None:
    model, other = tiny_stack(), tiny_stack()
    around = nn.ModuleDict({"first": nn.Sequential(model), "second": other, "again": model})
    assert torch_offload.handle_of(around) is None
    with streamed(model, device) as handle:
        for module in (model, around, around.first):
            assert torch_offload.handle_of(module) is handle
        for module in (other, model.blocks, model.blocks[1].mlp):
            assert torch_offload.handle_of(module) is None
        with streamed(other, device) as second:
            with pytest.raises(ValueError, match=r"ModuleDict, got 2: 'first\.0', 'second'; ask"):
                torch_offload.handle_of(around)
            assert torch_offload.handle_of(around.second) is second
            assert torch_offload.handle_of(around.first) is handle
        with pytest.raises(StateError, match=r"'first\.0' of it is offloaded already"):
            torch_offload.offload(around, device)
        with pytest.raises(StateError, match=r"which torch_offload\.handle_of\(\) finds"):
            around.half()
        found = torch_offload.handle_of(around)
        assert found is not None
        found.remove()
        assert torch_offload.handle_of(around) is None
        around.half()


class _Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


@pytest.mark.parametrize("where", ["blocks.1.mlp", "blocks.2.attn"])
def test_parametrization_after_offload_fails_by_name(device: torch.device, where: str) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device) as handle, torch.no_grad():
        module = model.get_submodule(where)
        module.register_parameter("scale", nn.Parameter(torch.ones(1)))
        parametrize.register_parametrization(module, "scale", _Doubled())
        with pytest.raises(
            StateError, match=r"a parametrization .*parametrize before offload"
        ) as caught:
            model(x)
        assert "FSDP" not in str(caught.value)
        handle.remove()
        assert torch.equal(model(x.cpu()), plain.cpu()(x.cpu()))


def test_saving_a_whole_model_says_what_became_of_the_file(tmp_path: Path) -> None:
    model = tiny_stack()
    with streamed(model, HOST):
        with pytest.raises(
            StateError, match=r"state_dict\(\).*save_pretrained.*been emptied by now"
        ):
            torch.save(model, tmp_path / "model.pt")
        torch.save(model.state_dict(), tmp_path / "model.pt")
    model.load_state_dict(torch.load(tmp_path / "model.pt"))


class _ConvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(self.conv1(x))


def _convolutions(memory_format: torch.memory_format) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = nn.Sequential(*(_ConvBlock() for _ in range(4)))
    return torch_offload.align(model.eval().to(memory_format=memory_format))


@pytest.mark.parametrize("there", [torch.contiguous_format, torch.channels_last])
def test_conversion_to_another_memory_format_fails(
    device: torch.device, there: torch.memory_format
) -> None:
    other = ({torch.contiguous_format, torch.channels_last} - {there}).pop()
    model = _convolutions(there)
    plain = plain_on(model, device)
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1)).to(device)
    with streamed(model, device) as handle:
        before = expect.snapshot(model)
        for part in (model, model[1], model[1].conv1):
            with pytest.raises(StateError, match=r"handle\.remove\(\)"):
                part.to(memory_format=other)
        expect.assert_unchanged(model, before)
        # Format by format as it is: nothing to convert.
        assert model[1].conv1.to(memory_format=there) is model[1].conv1
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))


def test_conversion_that_would_change_a_buffer_alone_fails(device: torch.device) -> None:
    model = tiny_stack().bfloat16()
    model.blocks[1].register_buffer("table", torch.ones(3))
    with streamed(model, device):
        assert model.blocks[0].to(torch.bfloat16) is model.blocks[0]
        for part in (model, model.blocks[1]):
            with pytest.raises(StateError, match=r"handle\.remove\(\)"):
                part.to(torch.bfloat16)
        assert model.blocks[1].table.dtype == torch.float32


@pytest.mark.needs_cuda
@pytest.mark.parametrize("where", ["", "blocks.1"])
def test_move_of_a_model_offloaded_to_the_gpu_fails(device: torch.device, where: str) -> None:
    model = tiny_stack()
    with streamed(model, device):
        before = expect.snapshot(model)
        for move in (lambda m: m.cpu(), lambda m: m.to("cpu")):
            with pytest.raises(StateError, match=r"handle\.remove\(\)"):
                move(model.get_submodule(where))
        assert model.get_submodule(where).cuda() is model.get_submodule(where)
        expect.assert_unchanged(model, before)


_TRACERS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "compiled-caller": lambda m, x: torch.compile(lambda y: m(y) + 1, backend="eager")(x),
    "compiled-forward": lambda m, x: torch.compile(m.forward, backend="eager")(x),
    "jit.trace": lambda m, x: torch.jit.trace(m, (x,)),
    "jit.trace-unit": lambda m, x: torch.jit.trace(m.blocks[1].mlp, (x,)),
    "export": lambda m, x: torch.export.export(m, (x,)),
    "export-unit": lambda m, x: torch.export.export(m.blocks[1].mlp, (x,)),
    "fx": lambda m, x: torch.fx.symbolic_trace(m),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("what", _TRACERS)
def test_tracing_an_offloaded_model_fails(device: torch.device, what: str) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    torch._dynamo.reset()
    with streamed(model, device) as handle, torch.no_grad():
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))
        before = expect.snapshot(model)
        with pytest.raises(StateError, match=r"weights are streamed.*handle\.remove\(\)"):
            _TRACERS[what](model, x)
        expect.assert_unchanged(model, before)
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))


_WHOLE_GRAPHS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "export": lambda m, x: torch.export.export(m, (x,), strict=True),
    "fullgraph": lambda m, x: torch.compile(lambda y: m(y), backend="eager", fullgraph=True)(x),
}


@pytest.mark.parametrize("what", _WHOLE_GRAPHS)
def test_tracer_that_makes_its_own_error_shows_ours(device: torch.device, what: str) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    torch._dynamo.reset()
    with streamed(model, device) as handle, torch.no_grad():
        before = expect.snapshot(model)
        # Dynamo makes an error of its own of whatever a forward raises while it is traced.
        kinds = (StateError, torch._dynamo.exc.Unsupported)
        with pytest.raises(kinds, match=r"weights are streamed.*call handle\.remove\(\)"):
            _WHOLE_GRAPHS[what](model, x)
        expect.assert_unchanged(model, before)
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))


def test_compiled_function_may_call_through_compiler_disable(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    torch._dynamo.reset()
    with streamed(model, device) as handle, torch.no_grad():
        call = torch.compiler.disable(lambda y: model(y))

        @torch.compile(backend="eager")
        def around(y: torch.Tensor) -> torch.Tensor:
            return call(y * 2) + 1

        with expect.watch(handle) as calls:
            got = around(x)
        assert torch.equal(got, plain(x * 2) + 1)
        expect.assert_streams_exactly(calls, exact_passes=1)


def test_wrapped_before_offload_is_noticed_at_the_call(device: torch.device) -> None:
    model = tiny_stack()
    x = rows(device)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with streamed(model, device), torch.no_grad():
        with pytest.raises(StateError, match=r"torch\.compile"):
            compiled(x)
        model(x)


def test_wrapping_a_plain_model_stays_allowed() -> None:
    model, other = tiny_stack(), tiny_stack()
    with streamed(model, HOST):
        nn.DataParallel(tiny_stack())
        torch.compile(other, backend="eager")
        assert torch.equal(nn.Sequential(other)(rows(HOST)), other(rows(HOST)))


def test_save_pretrained_and_state_dict_stay_allowed(tmp_path: Path) -> None:
    model = tiny_llama()
    with streamed(model, HOST), torch.no_grad():
        model(tokens(HOST))
        model.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "state.pt")
        copied = copy.deepcopy(model.state_dict())
    assert copied.keys() == model.state_dict().keys()
