"""Bad input: a typed error that says what was expected, and a model that is exactly what it was."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import torch_offload
from tests.python import expect
from tests.python.dropin import (
    Stack,
    assert_streams_like_plain,
    plain_on,
    rows,
    streamed,
    tiny_llama,
    tiny_stack,
    tokens,
)
from torch_offload import _C, StateError

HOST = torch.device("cpu")
_DYNAMO_WARNS = "ignore:Dynamo does not know how to trace the builtin:UserWarning"


@contextmanager
def _refused(
    model: nn.Module, kind: type[Exception], match: str, *, same_memory: bool = True
) -> Iterator[None]:
    before = expect.snapshot(model)
    with pytest.raises(kind, match=match) as caught:
        yield
    assert caught.type in (kind, *kind.__subclasses__())
    expect.assert_unchanged(model, before, same_memory=same_memory)
    assert torch_offload.handle_of(model) is None


# --- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"mode": "fast"}, ValueError, r"mode.*'pipeline'.*'fast'"),
        ({"granularity": "block"}, ValueError, r"granularity.*'sublayer'.*'block'"),
        ({"streams": "four"}, ValueError, r"streams.*'shared'.*'four'"),
        ({"mode": "sync", "streams": "split"}, ValueError, r"'sync' with streams='shared'"),
        ({"depth": -1}, ValueError, r"depth >= 0 bytes, got -1"),
        ({"depth": "-2GiB"}, ValueError, r"depth as a number of bytes"),
        ({"depth": 1.5}, TypeError, r"depth.*float"),
        ({"depth": True}, TypeError, r"depth.*bool"),
        ({"gpu_budget": "10 apples"}, ValueError, r"gpu_budget.*'10 apples'"),
        ({"gpu_budget": -5}, ValueError, r"gpu_budget >= 0"),
        ({"units": "blocks.*"}, TypeError, r"units=\[\.\.\.\]"),
        ({"units": ["nothing.*"]}, ValueError, r"nothing\.\*"),
        ({"units": ["blocks.0.attn", "blocks.0.att*"]}, ValueError, r"twice"),
        ({"units": ["blocks.0", "blocks.0.mlp"]}, ValueError, r"blocks\.0\.mlp"),
        ({"units": ["attn"]}, ValueError, r"attn"),
        ({"units": [3]}, TypeError, r"units.*int"),
        ({"units": [nn.Linear(2, 2)]}, ValueError, r"Linear"),
        ({"resident": ["nope"]}, ValueError, r"nope"),
        ({"resident": "embed"}, TypeError, r"resident=\[\.\.\.\]"),
        ({"resident": ["*"]}, ValueError, r"nothing is left to stream"),
    ],
    ids=str,
)
def test_option_that_cannot_be_fails(
    options: dict[str, Any], kind: type[Exception], match: str
) -> None:
    model = tiny_stack()
    with _refused(model, kind, match):
        torch_offload.offload(model, HOST, **options)


@pytest.mark.parametrize(
    ("where", "match"),
    [
        pytest.param("cuda:63", r"'cuda:63'|below", id="absent"),
        pytest.param("meta", r"'cuda' or 'cpu' device, got 'meta'", id="meta"),
    ],
)
def test_device_that_cannot_be_fails(where: str, match: str) -> None:
    model = tiny_stack()
    with _refused(model, ValueError, match):
        torch_offload.offload(model, where)


def test_device_unnamed_without_a_gpu_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="no CUDA device found") as caught:
        handle = torch_offload.offload(tiny_stack())
    assert len(caught) == 1
    assert handle.device == HOST


def test_budget_below_the_least_names_the_least() -> None:
    model = tiny_stack()
    with _refused(model, ValueError, r"gpu_budget of at least (\d+) bytes"):
        torch_offload.offload(model, HOST, gpu_budget=100)
    with pytest.raises(ValueError, match="gpu_budget") as caught:
        torch_offload.offload(model, HOST, gpu_budget=100)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    with _refused(model, ValueError, "gpu_budget of at least"):
        torch_offload.offload(model, HOST, gpu_budget=least - 1)
    plain = plain_on(model, HOST)
    with streamed(model, HOST, gpu_budget=least) as handle:
        assert_streams_like_plain(model, plain, handle, lambda m: m(rows(HOST)))


@pytest.mark.needs_cuda
def test_budget_above_the_device_fails(device: torch.device) -> None:
    model = tiny_stack()
    with _refused(model, ValueError, r"gpu_budget of at most"):
        torch_offload.offload(model, device, gpu_budget="100TiB")


# --- models ------------------------------------------------------------------------------------


def test_not_a_module_fails() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got SimpleNamespace.*transformer"):
        torch_offload.offload(SimpleNamespace(), HOST)  # type: ignore[arg-type]


def test_model_without_floating_point_weights_fails() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Module() for _ in range(2))
            for block in self.blocks:
                block.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), False)

    for model in (nn.Module(), Packed()):
        with _refused(model, ValueError, "floating-point weights"):
            torch_offload.offload(model, HOST)


def test_model_on_meta_fails() -> None:
    with torch.device("meta"):
        model = Stack()
    with pytest.raises(ValueError, match=r"'embed\.weight' on the meta device"):
        torch_offload.offload(model, HOST)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any("_call_impl" in vars(module) for module in model.modules())


def test_lazy_parameters_fail() -> None:
    model = tiny_stack()
    model.blocks[1].attn = nn.LazyLinear(16)
    with pytest.raises(ValueError, match="uninitialized"):
        torch_offload.offload(model, HOST)


def test_parameters_made_in_inference_mode_fail() -> None:
    with torch.inference_mode():
        model = Stack()
    with _refused(model, ValueError, r"outside inference mode, got 'embed\.weight'"):
        torch_offload.offload(model, HOST)


def test_second_offload_fails() -> None:
    model = tiny_stack()
    x = rows(HOST)
    with streamed(model, HOST) as handle, torch.no_grad():
        must = model(x)
        for again in (model, nn.Sequential(model), model.blocks[0], model.blocks[1].mlp):
            with pytest.raises(StateError, match="offloaded already"):
                torch_offload.offload(again, HOST)
        assert torch_offload.handle_of(model) is handle
        assert torch.equal(model(x), must)


class _Subclass(torch.Tensor):
    """A wrapper subclass, as torchao's quantized tensors are."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> _Subclass:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(str(func))


class Params4bit(nn.Parameter):
    """As bitsandbytes has: packed bytes, and a state beside the tensor."""


@pytest.mark.parametrize("unit", ["blocks", "embed"])
def test_wrapper_subclass_parameter_fails_by_name(unit: str) -> None:
    for kind in (_Subclass, Params4bit):
        model = tiny_stack()
        module = model.embed if unit == "embed" else model.blocks[2].attn
        inner = module.weight.detach()
        wrapped = (
            nn.Parameter(_Subclass(inner), False) if kind is _Subclass else Params4bit(inner, False)
        )
        module.weight = wrapped
        before = [dict(vars(one)) for one in model.modules()]
        with pytest.raises(ValueError, match=rf"{unit}.*of class {kind.__name__}"):
            torch_offload.offload(model, HOST)
        assert [dict(vars(one)) for one in model.modules()] == before
        assert module.weight is wrapped


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "torchao"])
def test_quantized_model_of_transformers_fails_by_name(method: str) -> None:
    model = tiny_llama()
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method=method))
    with _refused(model, ValueError, f"quantized by {method}"):
        torch_offload.offload(model, HOST)


class QuantLinear(nn.Module):
    """As GPTQ and AWQ have: packed integers in buffers."""

    def __init__(self, width: int, *, in_buffers: bool) -> None:
        super().__init__()
        packed = torch.zeros(width, width, dtype=torch.int32)
        if in_buffers:
            self.register_buffer("qweight", packed)
        else:
            self.qweight = packed
        self.scales = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scales + self.qweight.sum()


@pytest.mark.parametrize("in_buffers", [True, False])
def test_packed_weights_outside_parameters_fail_by_name(in_buffers: bool) -> None:
    model = tiny_stack()
    for block in model.blocks:
        block.attn = QuantLinear(64, in_buffers=in_buffers)
    with _refused(model, ValueError, r"packed integers.*QuantLinear"):
        torch_offload.offload(model, HOST)


def test_masks_and_indices_in_buffers_are_no_packed_weights() -> None:
    model = tiny_stack()
    model.embed.register_buffer("mask", torch.ones(256, 256, dtype=torch.bool))
    model.embed.register_buffer("index", torch.ones(256, 256, dtype=torch.int64))
    plain = plain_on(model, HOST)
    with streamed(model, HOST) as handle:
        assert_streams_like_plain(model, plain, handle, lambda m: m(rows(HOST)))


# --- other tools -------------------------------------------------------------------------------


def _accelerate(model: Stack) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(model.blocks[1], ModelHook())


def _diffusers(model: Stack) -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    hooks.HookRegistry.check_if_exists_or_initialize(model.blocks[1])


def _fsdp_marks(model: Stack) -> None:
    model.blocks[1]._is_fsdp_managed_module = True  # type: ignore[assignment]


def _deepspeed(model: Stack) -> None:
    model.blocks[1].attn.weight.ds_id = 7  # type: ignore[attr-defined]


def _compiled(model: Stack) -> None:
    model.blocks[1].compile(backend="eager")


def _call_impl(model: Stack) -> None:
    model.blocks[1]._call_impl = lambda *args: None  # type: ignore[method-assign]


def _torch_compile(model: Stack) -> None:
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")  # type: ignore[assignment]


def _data_parallel(model: Stack) -> None:
    model.blocks[1] = nn.DataParallel(model.blocks[1])


def _scripted(model: Stack) -> None:
    model.blocks[1].attn = torch.jit.trace(model.blocks[1].attn, (rows(HOST),))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("install", "match"),
    [
        (_accelerate, "accelerate"),
        (_diffusers, "diffusers"),
        (_fsdp_marks, "FSDP"),
        (_deepspeed, "DeepSpeed"),
        (_compiled, r"module\.compile\(\)"),
        (_call_impl, "'_call_impl'"),
        (_torch_compile, "OptimizedModule"),
        (_data_parallel, "DataParallel"),
        (_scripted, "ScriptModule"),
    ],
)
def test_other_tool_on_the_model_fails(install: Callable[[Stack], None], match: str) -> None:
    model = tiny_stack()
    install(model)
    with _refused(model, StateError, match):
        torch_offload.offload(model, HOST)


# --- memory ------------------------------------------------------------------------------------


def test_host_memory_too_small_fails_before_anything_is_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_stack()
    asked: list[int] = []

    def refuse(needed_bytes: int, reserve_bytes: int) -> None:
        asked.append(needed_bytes)
        raise MemoryError("expected 1 GiB of host memory, got 2 bytes available")

    monkeypatch.setattr(_C, "check_host_memory", refuse)
    with _refused(model, MemoryError, "host memory"):
        torch_offload.offload(model, HOST)
    assert len(asked) == 1


def test_host_memory_check_quotes_asked_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryError) as caught:
        _C.check_host_memory(2**60, 2**28)
    text = str(caught.value)
    assert "1073741824.00 GiB" in text or str(2**60) in text
    assert "TORCH_OFFLOAD_HOST_MEMORY_CHECK=0" in text
    monkeypatch.setenv("TORCH_OFFLOAD_HOST_MEMORY_CHECK", "0")
    _C.check_host_memory(2**60, 2**28)


@pytest.mark.needs_cuda
def test_weights_on_the_gpu_that_do_not_fit_the_host_fail(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_stack().to(device)
    streamable = sum(p.nbytes for name, p in model.named_parameters() if name.startswith("blocks"))
    check = _C.check_host_memory

    def check_less(needed_bytes: int, reserve_bytes: int) -> None:
        assert needed_bytes >= streamable  # unlike weights on the host, all of it is new
        check(needed_bytes + 2**60, reserve_bytes)

    monkeypatch.setattr(_C, "check_host_memory", check_less)
    with _refused(model, MemoryError, "host"):
        torch_offload.offload(model, device)


# --- failures in the middle of offload() ---------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("k", [0, 1, 4, 7])
def test_failure_while_moving_weights_is_undone(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], k: int
) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    before = expect.snapshot(model)
    move_in = _C.Engine.move_in

    def failing(engine: _C.Engine, unit: int) -> None:
        if unit == k:
            raise error("planted")
        move_in(engine, unit)

    monkeypatch.setattr(_C.Engine, "move_in", failing)
    with pytest.raises(error, match="planted"):
        torch_offload.offload(model, device)
    expect.assert_unchanged(model, before, same_memory=False)
    monkeypatch.undo()
    with streamed(model, device) as handle:
        assert_streams_like_plain(model, plain, handle, lambda m: m(rows(device)))


@pytest.mark.parametrize(
    "step", ["wrap_unit", "wrap_ancestor", "guard", "Handle", "_streamed", "probes_on"]
)
@pytest.mark.parametrize("k", [0, 1, 5])
@pytest.mark.parametrize("is_before", [True, False])
def test_failure_while_wrapping_is_undone(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, step: str, k: int, is_before: bool
) -> None:
    from torch_offload import installation

    model = tiny_stack()
    before = expect.snapshot(model)
    real = getattr(installation, step)
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if is_before and calls == k + 1:
            raise KeyboardInterrupt("planted")
        result = real(*args, **kwargs)
        if calls == k + 1:
            raise KeyboardInterrupt("planted")
        return result

    monkeypatch.setattr(installation, step, failing)
    with contextlib.suppress(KeyboardInterrupt):
        torch_offload.offload(model, device).remove()
        assert calls <= k, "the planted failure was swallowed"
    expect.assert_unchanged(model, before, same_memory=False)


class _FailAt(TorchDispatchMode):
    """Raises at the k-th operator."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self._left = k

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if self._left == -1:
            raise KeyboardInterrupt("planted")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_there", [False, True], ids=["from-host", "from-device"])
def test_failure_at_any_operator_of_offload_is_undone(device: torch.device, is_there: bool) -> None:
    model = tiny_stack(2)
    if is_there:
        model.to(device)
    before = expect.snapshot(model)
    for k in range(1000):
        try:
            with _FailAt(k):
                handle = torch_offload.offload(model, device)
            break
        except KeyboardInterrupt:
            expect.assert_unchanged(model, before, same_memory=False)
    assert k > 0
    handle.remove()
    expect.assert_unchanged(model, before, same_memory=False)


# --- what an offloaded model refuses -------------------------------------------------------------


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


@pytest.mark.filterwarnings(_DYNAMO_WARNS)
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


@pytest.mark.filterwarnings(_DYNAMO_WARNS)
def test_strict_export_of_an_offloaded_model_fails(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    torch._dynamo.reset()
    with streamed(model, device) as handle, torch.no_grad():
        before = expect.snapshot(model)
        with pytest.raises((StateError, torch._dynamo.exc.Unsupported)):
            torch.export.export(model, (x,), strict=True)
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


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ddp_around_an_offloaded_model_fails() -> None:
    model = tiny_stack()
    plain = plain_on(model, HOST)
    with streamed(model, HOST) as handle:
        before = expect.snapshot(model)
        with pytest.raises(StateError, match="DistributedDataParallel"):
            nn.parallel.DistributedDataParallel(model)
        expect.assert_unchanged(model, before)
        assert_streams_like_plain(model, plain, handle, lambda m: m(rows(HOST)))


@pytest.mark.usefixtures("process_group")
def test_fully_shard_of_an_offloaded_model_fails_at_the_next_call() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny_stack()
    handle = torch_offload.offload(model, HOST)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(StateError, match="fully_shard"):
        model(rows(HOST))
    del handle


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
