"""Bad input: a typed error that says what was expected, and a model that is what it was."""

from __future__ import annotations

import resource
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python.dropin import (
    Stack,
    assert_streams_like_plain,
    plain_on,
    refused,
    rows,
    streamed,
    tiny_stack,
)
from torch_offload import _C, StateError

HOST = torch.device("cpu")

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
        ({"depth": "9" * 400 + "GiB"}, ValueError, r"depth of at most 40 digits, got 400"),
        ({"depth": 2**63}, ValueError, r"depth of at most \d+ bytes"),
        ({"depth": True}, TypeError, r"depth.*bool"),
        ({"gpu_budget": "10 apples"}, ValueError, r"gpu_budget.*'10 apples'"),
        ({"gpu_budget": -5}, ValueError, r"gpu_budget >= 0"),
        ({"gpu_budget": "100TiB"}, ValueError, r"gpu_budget of at most .* memory of this machine"),
        ({"units": "blocks.*"}, TypeError, r"units=\[\.\.\.\]"),
        ({"units": ["nothing.*"]}, ValueError, r"nothing\.\*"),
        ({"units": ["blocks.0.attn", "blocks.0.att*"]}, ValueError, r"twice"),
        ({"units": ["blocks.0", "blocks.0.mlp"]}, ValueError, r"blocks\.0\.mlp"),
        ({"units": ["attn"]}, ValueError, r"attn"),
        ({"units": [3]}, TypeError, r"units.*int"),
        ({"units": 7}, TypeError, r"expected units as a list of names.*got int; write units=\["),
        pytest.param(
            {"units": iter(["*.mlp"])},
            TypeError,
            r"expected units as a list.*got list_iterator",
            id="units that can be read once",
        ),
        ({"units": {"*.mlp": 1}}, TypeError, r"expected units as a list.*got dict"),
        ({"resident": float("inf")}, TypeError, r"expected resident as a list.*got float"),
        ({"resident": b"embed"}, TypeError, r"expected resident as a list.*got bytes"),
        ({"resident": None}, TypeError, r"expected resident as a list.*got NoneType"),
        ({"debug": "*"}, TypeError, r"expected debug to be True or False, got '\*'; write debug="),
        ({"debug": None}, TypeError, r"expected debug to be True or False, got None"),
        ({"debug": 1}, TypeError, r"expected debug to be True or False, got 1"),
        ({"nvtx": "x"}, TypeError, r"expected nvtx to be True or False, got 'x'"),
        ({"units": [nn.Linear(2, 2)]}, ValueError, r"Linear"),
        ({"resident": ["nope"]}, ValueError, r"nope"),
        ({"resident": "embed"}, TypeError, r"resident=\[\.\.\.\]"),
        ({"resident": ["*"]}, ValueError, r"nothing is left to stream"),
        (
            {"resident": ["blocks.*"]},
            ValueError,
            r"resident=\['blocks\.\*'\] names every parameter of the units found "
            r"\('blocks\.0\.attn'.*; name fewer in resident=$",
        ),
        (
            {"units": ["embed.weight"], "resident": ["embed"]},
            ValueError,
            r"'embed\.weight' matches nothing",
        ),
        (
            {"units": []},
            ValueError,
            r"expected units as a list.*got an empty one; name what to stream, or leave units out",
        ),
        ({"units": [""]}, ValueError, r"expected names.*in units=, got an empty.*units=\[model\]"),
        ({"resident": [""]}, ValueError, r"expected names.*in resident=, got an empty string"),
    ],
    ids=str,
)
def test_option_that_cannot_be_fails(
    options: dict[str, Any], kind: type[Exception], match: str
) -> None:
    model = tiny_stack()
    with refused(model, kind, match):
        torch_offload.offload(model, HOST, **options)


def test_deepest_depth_can_be_profiled(device: torch.device) -> None:
    """It is not to be doubled in search of better options."""
    model = tiny_stack()
    with torch.no_grad(), torch_offload.offload(model, device, depth=2**62) as handle:
        model(rows(device))
        with handle.profile() as profiler:
            model(rows(device))
    assert "bound by" in profiler.sentence


_SAYS_DEVICES = r"; write device='cuda', .* device='cpu' to try the host device"


@pytest.mark.parametrize(
    ("where", "kind", "match"),
    [
        ("cuda:63", ValueError, r"'cuda:63'|below"),
        (99, ValueError, r"'cuda:99'|below"),
        ("meta", ValueError, r"'cuda' or 'cpu' device, got 'meta'" + _SAYS_DEVICES),
        ("mps", ValueError, r"'cuda' or 'cpu' device, got 'mps'" + _SAYS_DEVICES),
        ("gpu", ValueError, r"'cuda' or 'cpu' device, got 'gpu'" + _SAYS_DEVICES),
        ("", ValueError, r"'cuda' or 'cpu' device, got ''" + _SAYS_DEVICES),
        ("cuda:x", ValueError, r"'cuda' or 'cpu' device, got 'cuda:x'" + _SAYS_DEVICES),
        (-1, ValueError, r"'cuda' or 'cpu' device, got -1" + _SAYS_DEVICES),
        (1.5, TypeError, r"device as a torch\.device.*got 1\.5 \(float\)" + _SAYS_DEVICES),
        (True, TypeError, r"device as a torch\.device.*got True \(bool\)" + _SAYS_DEVICES),
        (b"cuda", TypeError, r"device as a torch\.device.*got b'cuda' \(bytes\)" + _SAYS_DEVICES),
        ([0], TypeError, r"device as a torch\.device.*got \[0\] \(list\)" + _SAYS_DEVICES),
    ],
    ids=str,
)
def test_device_that_cannot_be_fails(where: Any, kind: type[Exception], match: str) -> None:
    model = tiny_stack()
    with refused(model, kind, match):
        torch_offload.offload(model, where)


@torch.no_grad()
def test_replan_with_a_budget_above_the_machine_fails() -> None:
    model = tiny_stack()
    plain = plain_on(model, HOST)
    with streamed(model, HOST) as handle:
        with pytest.raises(ValueError, match=r"gpu_budget of at most .* memory of this machine"):
            handle.replan(gpu_budget="100TiB")
        assert_streams_like_plain(model, plain, handle, lambda m: m(rows(HOST)))


def test_everything_resident_or_unfit_names_both_reasons() -> None:
    model = tiny_stack()
    for block in model.blocks:
        block.attn.weight = model.blocks[0].attn.weight
    options = {"units": ["*.attn"], "resident": ["*.attn.bias"]}
    with refused(
        model, ValueError, r"named by resident=\['\*\.attn\.bias'\], shared, not one dense"
    ):
        torch_offload.offload(model, HOST, **options)  # type: ignore[arg-type]


def test_device_unnamed_without_a_gpu_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="no CUDA device found") as caught:
        handle = torch_offload.offload(tiny_stack())
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert handle.device == HOST


def test_budget_below_the_least_names_the_least() -> None:
    model = tiny_stack()
    with refused(model, ValueError, r"gpu_budget of at least (\d+) bytes"):
        torch_offload.offload(model, HOST, gpu_budget=100)
    with pytest.raises(ValueError, match="gpu_budget") as caught:
        torch_offload.offload(model, HOST, gpu_budget=100)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    with refused(model, ValueError, "gpu_budget of at least"):
        torch_offload.offload(model, HOST, gpu_budget=least - 1)
    plain = plain_on(model, HOST)
    with streamed(model, HOST, gpu_budget=least) as handle:
        assert_streams_like_plain(model, plain, handle, lambda m: m(rows(HOST)))


@pytest.mark.needs_cuda
@pytest.mark.knows_memory
def test_budget_above_the_device_fails(device: torch.device) -> None:
    model = tiny_stack()
    with refused(model, ValueError, r"gpu_budget of at most"):
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
        with refused(model, ValueError, "floating-point weights"):
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
    with refused(model, ValueError, r"outside inference mode, got 'embed\.weight'"):
        torch_offload.offload(model, HOST)


def test_second_offload_fails() -> None:
    model = tiny_stack()
    x = rows(HOST)
    with streamed(model, HOST) as handle, torch.no_grad():
        must = model(x)
        for again in (
            model,
            nn.Sequential(model),
            model.blocks[0],
            model.blocks[1].mlp,
            model.embed,
        ):
            with pytest.raises(StateError, match="offloaded already"):
                torch_offload.offload(again, HOST)
        assert torch_offload.handle_of(model) is handle
        assert torch.equal(model(x), must)


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


class _Cache(UserDict[str, Any]):
    """A mapping that brings weights when they are asked for, as compressed-tensors has."""


def _parameters_elsewhere(model: Stack) -> None:
    model.blocks[1].attn._parameters = _Cache(model.blocks[1].attn._parameters)


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
        (_parameters_elsewhere, r"'blocks\.1\.attn' of it holds them in a _Cache"),
        (_torch_compile, "OptimizedModule"),
        (_data_parallel, "DataParallel"),
        (_scripted, "ScriptModule"),
    ],
)
def test_other_tool_on_the_model_fails(install: Callable[[Stack], None], match: str) -> None:
    model = tiny_stack()
    install(model)
    with refused(model, StateError, match):
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
    with refused(model, MemoryError, "host memory"):
        torch_offload.offload(model, HOST)
    assert len(asked) == 1


def test_host_memory_check_quotes_asked_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryError) as caught:
        _C.check_host_memory(2**60, 2**28)
    text = str(caught.value)
    assert "1073741824.00 GiB" in text or str(2**60) in text
    assert "TORCH_OFFLOAD_HOST_MEMORY_CHECK=0" in text
    for limit in ("host memory: ", "control group: ", "locked-memory limit (ulimit -l): "):
        assert limit in text
    monkeypatch.setenv("TORCH_OFFLOAD_HOST_MEMORY_CHECK", "0")
    _C.check_host_memory(2**60, 2**28)


def test_host_memory_that_the_system_refuses_fails_with_asked_and_limits() -> None:
    if torch.cuda.is_initialized():
        pytest.skip("CUDA takes addresses of its own, which the limit would refuse as well")
    model = tiny_stack(num_blocks=8, width=512)  # 42 MB to stream
    plain = plain_on(model, HOST)
    former = resource.getrlimit(resource.RLIMIT_AS)
    with refused(model, MemoryError, r"expected 4\d\.\d+ MiB of host .*raise the limit"):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 32 * 2**20
        try:
            resource.setrlimit(resource.RLIMIT_AS, (limit, former[1]))
            torch_offload.offload(model, HOST)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, former)
    with streamed(model, HOST) as handle:
        assert_streams_like_plain(model, plain, handle, lambda m: m(rows(HOST, width=512)))


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
    with refused(model, MemoryError, "host"):
        torch_offload.offload(model, device)
