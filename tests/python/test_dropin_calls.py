"""Ways of calling: gradient modes, autocast, threads, processes, parts of a model, other orders."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python import expect
from tests.python.dropin import (
    Stack,
    assert_equal,
    assert_streams_like_plain,
    plain_on,
    rows,
    streamed,
    tiny_llama,
    tiny_stack,
    tokens,
)
from tests.python.streamed_master_guard import StreamedMasterGuard
from torch_offload import StateError

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
        model.blocks[2].mlp.down.register_forward_pre_hook(_raise(ZeroDivisionError()))
        with pytest.raises(ZeroDivisionError):
            model(x)
        assert torch.is_autocast_cache_enabled()


def _raise(error: BaseException) -> Callable[..., None]:
    def hook(*args: Any) -> None:
        raise error

    return hook


def test_submodule_alone_equals_plain(device: torch.device) -> None:
    model = tiny_llama()
    plain = plain_on(model, device)
    ids = tokens(device)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).to(device)
    with streamed(model, device) as handle:
        assert_streams_like_plain(model, plain, handle, lambda m: m.model(ids).last_hidden_state)
        assert_streams_like_plain(model, plain, handle, lambda m: m.model.layers[1].mlp(x))
        assert_streams_like_plain(model, plain, handle, lambda m: m(ids).logits)


@pytest.mark.parametrize(
    "sequence",
    [
        pytest.param([0, 1], id="early-exit"),
        pytest.param([0, 2, 3], id="skipped"),
        pytest.param([0, 1, 1, 2, 1, 3], id="repeated"),
        pytest.param([3, 2, 1, 0], id="reversed"),
        pytest.param([2], id="one"),
    ],
)
@pytest.mark.parametrize("mode", ["sync", "streams", "events", "pipeline"])
def test_other_sequences_equal_plain_and_are_learned(
    device: torch.device, sequence: list[int], mode: str
) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device, mode=mode) as handle:
        model.sequence = plain.sequence = sequence
        assert_streams_like_plain(model, plain, handle, lambda m: m(x), forwards=4)
        model.sequence = plain.sequence = [0, 1, 2, 3]
        assert_streams_like_plain(model, plain, handle, lambda m: m(x), forwards=3)


def test_sequence_that_changes_every_time_is_right(device: torch.device) -> None:
    model = tiny_stack(5)
    plain = plain_on(model, device)
    x = rows(device)
    generator = torch.Generator().manual_seed(6)
    with streamed(model, device) as handle, torch.no_grad():
        with expect.watch(handle) as calls:
            for _ in range(40):
                length = int(torch.randint(1, 8, (), generator=generator))
                sequence = torch.randint(0, 5, (length,), generator=generator).tolist()
                model.sequence = plain.sequence = sequence
                assert torch.equal(model(x), plain(x))
        assert len(calls.passes) == 40
        for one, expected in zip(calls.passes, calls.expected, strict=True):
            if expected.is_exact:
                assert one.onloads == expected.onloads
            else:
                assert one.onloads >= expected.onloads


@pytest.mark.parametrize("k", range(10))
@pytest.mark.parametrize("streams", ["shared", "split"])
def test_exception_in_any_layer_leaves_the_model_at_rest(
    device: torch.device, k: int, streams: str
) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    modules = [model.embed]
    for block in model.blocks:
        modules += [block.attn, block.mlp.down]
    modules.append(model)
    with streamed(model, device, streams=streams) as handle, torch.no_grad():
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))
        hook = modules[k].register_forward_hook(_raise(ValueError("planted")))
        with expect.watch(handle) as calls:
            for _ in range(2):
                with pytest.raises(ValueError, match="planted"):
                    model(x)
                expect.assert_at_rest(handle)
        assert not any(one.completed for one in calls.passes)
        hook.remove()
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))


def test_forward_from_another_thread_equals_plain(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)

    @torch.no_grad()
    def in_thread(results: list[torch.Tensor]) -> None:
        # A thread whose first kernel is a matrix product gets a warning of torch's own.
        results.append(model(x.clone()))

    with streamed(model, device) as handle, torch.no_grad():
        must = plain(x)
        with expect.watch(handle) as calls:
            for _ in range(3):
                assert torch.equal(model(x), must)
                results: list[torch.Tensor] = []
                thread = threading.Thread(target=in_thread, args=(results,))
                thread.start()
                thread.join()
                assert torch.equal(results[0], must)
        expect.assert_streams_exactly(calls, exact_passes=6)


def test_second_thread_is_refused_and_the_first_unharmed(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    errors: list[BaseException] = []

    @torch.no_grad()
    def second(call: Callable[[], Any]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    def in_the_middle(*args: Any) -> None:
        calls = (lambda: model(x), lambda: model.blocks[1](x), lambda: model.blocks[1].mlp(x))
        for call in calls:
            thread = threading.Thread(target=second, args=(call,))
            thread.start()
            thread.join()

    with streamed(model, device) as handle, torch.no_grad():
        # Inside a unit that is held, and between two of them.
        for module in (model.blocks[1].mlp.down, model.blocks[2]):
            hook = module.register_forward_pre_hook(in_the_middle)
            assert_streams_like_plain(model, plain, handle, lambda m: m(x))
            hook.remove()
        assert len(errors) == 12
        for error in errors:
            assert isinstance(error, StateError)
            assert "one forward at a time" in str(error)
        assert handle.stats.forwards == 4


def test_two_models_in_turn_and_interleaved_equal_plain(device: torch.device) -> None:
    first, second = tiny_stack(3), tiny_llama()
    plain_first, plain_second = plain_on(first, device), plain_on(second, device)
    x, ids = rows(device), tokens(device)
    with streamed(first, device) as handle, streamed(second, device) as other, torch.no_grad():
        must, other_must = plain_first(x), plain_second(ids).logits
        with expect.watch(handle) as calls, expect.watch(other) as other_calls:
            for _ in range(3):
                assert torch.equal(first(x), must)
                assert torch.equal(second(ids).logits, other_must)
        expect.assert_streams_exactly(calls, exact_passes=3)
        expect.assert_streams_exactly(other_calls, exact_passes=3)
        # One inside the other: a pass of each is running.
        nested: list[torch.Tensor] = []
        hook = first.blocks[1].mlp.down.register_forward_pre_hook(
            lambda *_: nested.append(second(ids).logits)
        )
        assert torch.equal(first(x), must)
        hook.remove()
        assert torch.equal(nested[0], other_must)
        expect.assert_at_rest(handle)
        expect.assert_at_rest(other)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_child_forward_raises_and_exit_is_clean(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x, x_host = rows(device), rows(torch.device("cpu"))
    with streamed(model, device) as handle, torch.no_grad():
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))
        read, write = os.pipe()
        child = os.fork()
        if child == 0:  # every way out is os._exit: nothing of pytest may run twice
            try:
                try:
                    model(x_host)
                    answer = b"no error"
                except StateError as error:
                    answer = str(error).encode()
                del model, handle  # destructors join no thread
                os.write(write, answer)
            finally:
                os._exit(7)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            answer = pipe.read()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert b"forked child" in answer
        assert b"spawn" in answer
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))


class _CallsModel(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, model: nn.Module | None) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    @torch.no_grad()
    def __getitem__(self, index: int) -> torch.Tensor:
        x = rows(torch.device("cpu"), seed=index)
        return x if self.model is None else self.model(x)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_data_loader_workers_beside_and_with_the_model(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    with streamed(model, device) as handle, torch.no_grad():
        with expect.watch(handle) as calls:
            loader = torch.utils.data.DataLoader(_CallsModel(None), num_workers=1, timeout=60)
            for batch in loader:
                assert torch.equal(model(batch[0].to(device)), plain(batch[0].to(device)))
        expect.assert_streams_exactly(calls, exact_passes=4)
        with pytest.raises(StateError, match="forked child"):
            next(iter(torch.utils.data.DataLoader(_CallsModel(model), num_workers=1, timeout=60)))


class _EditsItself(nn.Module):
    """An EMA code book, or RWKV: a forward that writes into its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(64, 16)
        self.how: Callable[[nn.Module], None] = lambda module: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(self.up(x))
        self.how(self)
        return x


def _in_place(module: Any) -> None:
    module.up.weight.mul_(0.5)


def _by_data(module: Any) -> None:
    module.up.weight.data = module.up.weight.data * 0.5


@pytest.mark.parametrize("edit", [_in_place, _by_data])
def test_forward_that_edits_its_own_weight_raises(
    device: torch.device, edit: Callable[[Any], None]
) -> None:
    model: Any = nn.Sequential(nn.Linear(16, 16), *(_EditsItself() for _ in range(3)))
    torch_offload.align(model)
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device, units=["1", "2", "3"]) as handle, torch.no_grad():
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model[2].how = edit
        with pytest.raises(StateError, match=r"resident=\['2\.up\.weight'\]"):
            model(x)
        expect.assert_at_rest(handle)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), f"{name} was changed"
        model[2].how = lambda module: None
        assert torch.equal(model(x), plain(x))
    with streamed(model, device, units=["1", "2", "3"], resident=["2.up.weight"]):
        model[2].how = plain[2].how = edit
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(model(x), plain(x))


class _ReturnsWeight(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))
        self.kind = kind

    def forward(self, x: torch.Tensor) -> Any:
        x = x @ self.weight
        if self.kind is tuple:
            return x, self.weight[0]
        if self.kind is list:
            return [x, self.weight.view(4, 64)]
        return {"x": x, "row": self.weight.t()[1]}


class _HoldsReturners(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.layers = nn.ModuleList(_ReturnsWeight(kind) for _ in range(4))

    def forward(self, x: torch.Tensor) -> list[Any]:
        x = self.first(x)
        outputs = []
        for layer in self.layers:
            outputs.append(layer(x))
            last = outputs[-1]
            x = last["x"] if isinstance(last, dict) else last[0]
        return outputs


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_output_that_lies_in_the_window_is_cloned(device: torch.device, kind: type) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = torch_offload.align(_HoldsReturners(kind))
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device, units=["layers.*"]) as handle, torch.no_grad():
        begin, end = handle._engine.window
        must = plain(x)
        with expect.watch(handle) as calls:
            outputs = model(x)
            model(x)  # overwrites every place
        assert_equal(outputs, must)
        expect.assert_streams_exactly(calls, exact_passes=2)
        for output in outputs:
            for tensor in output.values() if isinstance(output, dict) else output:
                assert not begin <= tensor.data_ptr() < end


def test_user_hooks_see_weights_on_the_device(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    sums: list[torch.Tensor] = []
    with streamed(model, device) as handle, torch.no_grad():
        begin, end = handle._engine.window

        def hook(module: Any, args: Any, output: Any = None) -> None:
            assert begin <= module.weight.data_ptr() < end
            sums.append(module.weight.sum())

        model.blocks[2].attn.register_forward_pre_hook(hook)
        model.blocks[2].attn.register_forward_hook(hook)
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))
        assert len(sums) == 4
        assert all(torch.equal(one, plain.blocks[2].attn.weight.sum()) for one in sums)


class _ReadsOutside(Stack):
    """gemma3n, gpt_neox_japanese: a weight is read by another module than its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.blocks[1].mlp.down.weight.sum(1)


class _CallsForward(Stack):
    """SqueezeBERT: ``layer.forward(...)`` instead of a call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block.mlp.forward(x)  # type: ignore[operator]
        return x


@pytest.mark.parametrize("kind", [_ReadsOutside, _CallsForward])
def test_weight_read_outside_its_call_is_never_silent(
    device: torch.device, kind: type[Stack], master_guard: StreamedMasterGuard
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12)
        model = kind()
    torch_offload.align(model)
    plain = plain_on(model, device)
    x = rows(device)
    with torch.no_grad():
        with streamed(model, device) as handle:
            if device.type == "cpu":
                with master_guard.expect_reads() as reads, pytest.raises(AssertionError):
                    model(x)
                assert len(reads) == 1
            else:
                with pytest.raises(RuntimeError, match=r"resident=\["):
                    model(x)
            expect.assert_at_rest(handle)
        cure = ["blocks.1.mlp.down.weight"] if kind is _ReadsOutside else ["blocks.*.mlp"]
        with streamed(model, device, resident=cure) as handle:
            run = (lambda m: m(x)) if kind is _ReadsOutside else (lambda m: m.blocks[0].attn(m(x)))
            assert_streams_like_plain(model, plain, handle, run)
