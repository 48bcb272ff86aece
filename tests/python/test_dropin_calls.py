"""Ways of calling: gradient modes, autocast, parts of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import torch_offload
from tests.python import expect
from tests.python.dropin import (
    assert_equal,
    assert_streams_like_plain,
    plain_on,
    raising,
    rows,
    streamed,
    tiny_llama,
    tiny_stack,
    tokens,
)

_GRAD_WARNING = "ignore:torch_offload. this forward runs in grad mode:UserWarning"


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("streams", ["shared", "split"])
def test_forward_without_gradients_equals_plain(
    device: torch.device, context: Callable[[], Any], streams: str
) -> None:
    model = tiny_llama()
    plain = plain_on(model, device)
    ids = tokens(device)
    with streamed(model, device, streams=streams) as handle:
        with context():
            must = plain(ids)
            with expect.watch(handle) as calls:
                for _ in range(3):
                    assert_equal(model(ids).logits, must.logits)
        expect.assert_streams_exactly(calls, exact_passes=3)
        for parameter in model.parameters():
            assert not parameter.is_inference()


def test_offload_inside_inference_mode_works_outside(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    with torch.inference_mode():
        handle = torch_offload.offload(model, device, depth=0)
        assert torch.equal(model(x), plain(x))
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        model.blocks[0].attn.weight.add_(1.0)
        plain.blocks[0].attn.weight.add_(1.0)
        assert torch.equal(model(x), plain(x))
    assert handle.stats.onloads >= 3 * len(handle.units)
    with torch.inference_mode():
        handle.remove()
    assert not any(parameter.is_inference() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cache", [True, False])
def test_autocast_equals_plain_and_keeps_no_copies(
    device: torch.device, dtype: torch.dtype, cache: bool
) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    seen: list[bool] = []
    with streamed(model, device) as handle, torch.no_grad():
        inside = model.blocks[1].mlp.up.register_forward_pre_hook(
            lambda *_: seen.append(torch.is_autocast_cache_enabled())
        )
        outside = model.blocks[2].register_forward_pre_hook(
            lambda *_: seen.append(torch.is_autocast_cache_enabled())
        )
        with torch.autocast(device.type, dtype=dtype, cache_enabled=cache):
            must = plain(x)
            with expect.watch(handle) as calls:
                for _ in range(3):
                    assert_equal(model(x), must)
                # An edit between two forwards of one autocast region is seen.
                model.blocks[0].attn.weight.mul_(2.0)
                plain.blocks[0].attn.weight.mul_(2.0)
            assert torch.is_autocast_cache_enabled() == cache
        expect.assert_streams_exactly(calls, exact_passes=3)
        inside.remove()
        outside.remove()
        assert seen == [False, cache] * 3
        with torch.autocast(device.type, dtype=dtype, cache_enabled=cache):
            assert_equal(model(x), plain(x))
        assert not any(parameter.dtype != torch.float32 for parameter in model.parameters())


@pytest.mark.needs_cuda
def test_autocast_device_memory_stays_flat(device: torch.device) -> None:
    model = tiny_stack(num_blocks=8, width=512)
    x = rows(device, width=512)
    with streamed(model, device), torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        model(x)
        before = torch.cuda.memory_allocated(device)
        for _ in range(3):
            model(x)
        assert torch.cuda.memory_allocated(device) <= before + 64 * 2**10


def test_autocast_exception_restores_the_cache(device: torch.device) -> None:
    model = tiny_stack()
    x = rows(device)
    with streamed(model, device), torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        model.blocks[2].mlp.down.register_forward_pre_hook(raising(ZeroDivisionError()))
        with pytest.raises(ZeroDivisionError):
            model(x)
        assert torch.is_autocast_cache_enabled()


def test_forward_called_directly_equals_plain(device: torch.device) -> None:
    model, llama = tiny_stack(), tiny_llama()
    plain, plain_llama = plain_on(model, device), plain_on(llama, device)
    x, ids = rows(device), tokens(device)
    with streamed(llama, device) as handle:
        # Llama's own forward calls the wrapped `model.model`: the pass begins there.
        assert_streams_like_plain(llama, plain_llama, handle, lambda m: m.forward(ids).logits)
        assert handle.stats.misses == 1
    with streamed(model, device) as handle:
        # Here every block is a pass of its own, and who follows whom is learned.
        run = lambda m: m.forward(x)  # noqa: E731  (the two runs are one)
        assert_streams_like_plain(model, plain, handle, run, forwards=3)
        before = handle.stats
        assert_streams_like_plain(model, plain, handle, run, forwards=3)
        assert handle.stats.misses == before.misses
        assert handle.stats.onloads - before.onloads == 3 * len(handle.units)


def test_submodule_alone_equals_plain(device: torch.device) -> None:
    model = tiny_llama()
    plain = plain_on(model, device)
    ids = tokens(device)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).to(device)
    with streamed(model, device) as handle:
        assert_streams_like_plain(model, plain, handle, lambda m: m.model(ids).last_hidden_state)
        assert_streams_like_plain(model, plain, handle, lambda m: m.model.layers[1].mlp(x))
        assert_streams_like_plain(model, plain, handle, lambda m: m(ids).logits)


@pytest.mark.parametrize("granularity", ["sublayer", "module"])
def test_module_inside_a_unit_called_alone_is_right_or_raises(
    device: torch.device, granularity: str
) -> None:
    """No code of ours runs there: the unit around it is what to call, or it is a unit itself."""
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device, granularity=granularity) as handle, torch.no_grad():
        is_unit = granularity == "module"
        if is_unit:
            model(x)  # traced, then cut
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))
        before = handle.stats
        assert is_unit == any(unit.name == "blocks.1.mlp.up" for unit in handle.units)
        if is_unit or device.type == "cpu":
            assert torch.equal(model.blocks[1].mlp.up(x), plain.blocks[1].mlp.up(x))
        else:
            with pytest.raises(RuntimeError, match="same device"):
                model.blocks[1].mlp.up(x)
        # As a unit it is a pass of its own.
        assert handle.stats.forwards - before.forwards == int(is_unit)
        expect.assert_at_rest(handle)
        assert_streams_like_plain(model, plain, handle, lambda m: m.blocks[1].mlp(x))
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))
