"""Threads, processes and several models: who may call what, and when."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.python import expect
from tests.python.dropin import (
    assert_streams_like_plain,
    packable_llama,
    plain_on,
    rows,
    streamed,
    tiny_llama,
    tiny_stack,
    tokens,
)
from torch_offload import StateError, offload


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


def test_handle_is_printed_without_counts_while_another_thread_runs_a_forward(
    device: torch.device,
) -> None:
    model = tiny_stack()
    texts: list[str] = []
    with streamed(model, device) as handle, torch.no_grad():

        def in_the_middle(*args: Any) -> None:
            thread = threading.Thread(target=lambda: texts.append(repr(handle)))
            thread.start()
            thread.join()

        hook = model.blocks[1].register_forward_pre_hook(in_the_middle)
        model(rows(device))
        hook.remove()
        assert texts == [f"<torch_offload.Handle of Stack on {device}: mode='pipeline'>"]
        assert "8 units" in repr(handle)


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


def test_two_models_in_two_threads_at_once_equal_plain(device: torch.device) -> None:
    models = [tiny_stack(3), tiny_stack(5)]
    plains = [plain_on(model, device) for model in models]
    x = rows(device)
    both_are_inside = threading.Barrier(2, timeout=60)
    results: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def meet(*args: Any) -> None:
        both_are_inside.wait()  # each in the middle of a unit

    @torch.no_grad()
    def work(index: int) -> None:
        for _ in range(20):
            results[index].append(models[index](x.clone()))

    with streamed(models[0], device) as handle, streamed(models[1], device) as other:
        for model in models:
            model.blocks[1].mlp.down.register_forward_pre_hook(meet)
        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one in (handle, other):
            expect.assert_at_rest(one)
            assert one.stats.forwards == 20
            assert one.stats.misses == 1
    with torch.no_grad():
        for index, plain in enumerate(plains):
            must = plain(x)
            assert len(results[index]) == 20
            assert all(torch.equal(one, must) for one in results[index])


def test_forward_in_the_middle_of_a_change_is_refused_and_the_change_is_made(
    device: torch.device,
) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    stop = threading.Event()
    outputs: list[torch.Tensor] = []
    others: list[Exception] = []

    @torch.no_grad()
    def call() -> None:
        while not stop.is_set():
            try:
                outputs.append(model(x.clone()))
            except StateError:
                time.sleep(1e-4)
            except Exception as error:
                others.append(error)

    size = sum(parameter.nbytes for parameter in model.parameters())
    with streamed(model, device) as handle:
        thread = threading.Thread(target=call)
        thread.start()
        made = 0
        deadline = time.monotonic() + 30
        while made < 100 and time.monotonic() < deadline:
            try:
                handle.replan(gpu_budget=int((0.6 if made % 2 else 0.9) * size))
            except StateError:  # during a forward
                time.sleep(1e-4)
            else:
                made += 1
        stop.set()
        thread.join()
    assert not others
    assert made == 100
    with torch.no_grad():
        must = plain(x)
    assert all(torch.equal(one, must) for one in outputs)


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    "options",
    [{}, {"transport": "packed"}, {"transport": "packed", "masters": "packed"}],
    ids=["raw", "packed", "packed masters"],
)
def test_model_that_dies_in_a_forked_child_waits_for_nothing(
    device: torch.device, options: dict[str, Any]
) -> None:
    model = packable_llama()
    handle = offload(model, device, **options)
    with torch.inference_mode():
        model(tokens(device))
    model_reference = weakref.ref(model)
    child = os.fork()
    if child == 0:
        try:
            del model, handle
            gc.collect()
            is_dead = model_reference() is None
        except BaseException:
            is_dead = False
        os._exit(7 if is_dead else 8)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child waits for ever")
    assert os.waitstatus_to_exitcode(ended[1]) == 7
    handle.remove()


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
