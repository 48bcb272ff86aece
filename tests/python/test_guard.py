"""The dispatch mode and the oracle themselves: planted faults are seen."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.python import expect
from tests.python.dropin import assert_streams_like_plain, plain_on, rows, streamed, tiny_stack
from tests.python.streamed_master_guard import StreamedMasterGuard, StreamedMasterReadError
from torch_offload.calls import unwrap

HOST = torch.device("cpu")


@pytest.mark.parametrize("granularity", ["sublayer", "module"])  # whose first pass is traced
@torch.no_grad()
def test_guard_unit_without_wrapper_is_seen(
    master_guard: StreamedMasterGuard, granularity: str
) -> None:
    model, x = tiny_stack(), rows(HOST)
    must = model(x)
    with streamed(model, HOST, granularity=granularity):
        unwrap(model.blocks[1].mlp)  # the planted fault: this unit is never acquired
        with (
            master_guard.expect_reads() as reads,
            pytest.raises(StreamedMasterReadError, match=r"mlp\.up"),
        ):
            model(x)
        assert [name.rpartition(".")[0] for name in reads] == ["blocks.1.mlp.up"]
    assert torch.equal(model(x), must)


@pytest.mark.parametrize("share", [0.6, 1.0])
@torch.no_grad()
def test_guard_unit_that_another_plan_streams_is_seen(
    master_guard: StreamedMasterGuard, share: float
) -> None:
    model, x = tiny_stack(), rows(HOST)
    must = model(x)
    budget = int(share * sum(parameter.nbytes for parameter in model.parameters()))
    with streamed(model, HOST, gpu_budget=budget) as handle:
        stayed = {unit.name for unit in handle.units if unit.place is None}
        handle.replan(gpu_budget=None, depth=0)
        newly = sorted(stayed & {unit.name for unit in handle.units if unit.place})
        assert newly
        for name in newly:
            module = model.get_submodule(name)
            wrapper = vars(module)["_call_impl"]
            unwrap(module)  # the planted fault
            with (
                master_guard.expect_reads() as reads,
                pytest.raises(StreamedMasterReadError, match=name.replace(".", r"\.")),
            ):
                model(x)
            assert len(reads) == 1
            vars(module)["_call_impl"] = wrapper
    assert torch.equal(model(x), must)


@torch.no_grad()
def test_guard_read_in_another_thread_is_seen(master_guard: StreamedMasterGuard) -> None:
    model, x = tiny_stack(), rows(HOST)
    caught: list[Exception] = []

    def forward() -> None:
        with torch.no_grad():
            try:
                model(x)
            except StreamedMasterReadError as error:
                caught.append(error)

    with streamed(model, HOST):
        wrapper = vars(model.blocks[1].mlp)["_call_impl"]
        unwrap(model.blocks[1].mlp)  # the planted fault
        with master_guard.expect_reads() as reads:
            thread = threading.Thread(target=forward)
            thread.start()
            thread.join()
            with ThreadPoolExecutor(1) as pool:
                pool.submit(forward).result()
        assert [name.rpartition(".")[0] for name in reads] == ["blocks.1.mlp.up"] * 2
        assert len(caught) == 2
        vars(model.blocks[1].mlp)["_call_impl"] = wrapper
        thread = threading.Thread(target=forward)  # whole again: nothing is seen
        thread.start()
        thread.join()
        assert len(caught) == 2


@torch.no_grad()
def test_guard_replaced_weight_is_seen(master_guard: StreamedMasterGuard) -> None:
    model, x = tiny_stack(), rows(HOST)
    with streamed(model, HOST):
        model(x)
        for parameter in model.blocks[1].mlp.up.parameters():
            parameter.data = parameter.data * 2
        unwrap(model.blocks[1].mlp)  # the planted fault
        with master_guard.expect_reads() as reads, pytest.raises(StreamedMasterReadError):
            model(x)
        assert [name.rpartition(".")[0] for name in reads] == ["blocks.1.mlp.up"]


@torch.no_grad()
def test_guard_swallowed_read_is_remembered(master_guard: StreamedMasterGuard) -> None:
    model = tiny_stack()
    with streamed(model, HOST):
        forward = model.forward

        def reads_outside(x: torch.Tensor) -> torch.Tensor:
            with contextlib.suppress(AssertionError):
                x = x + model.blocks[0].attn.weight.sum()
            return forward(x)

        model.forward = reads_outside  # type: ignore[method-assign]  # the planted fault
        with master_guard.expect_reads() as reads:
            model(rows(HOST))
        assert reads == ["blocks.0.attn.weight"]


@pytest.mark.parametrize("where", ["blocks.1", "blocks.2.mlp.down"])  # between units, and in one
@pytest.mark.parametrize(
    "options", [{}, {"transport": "packed", "masters": "packed"}, {"depth": "1GiB"}], ids=str
)
@pytest.mark.filterwarnings("ignore:torch_offload. this forward runs in grad mode:UserWarning")
def test_guard_read_of_a_released_place_is_seen(
    master_guard: StreamedMasterGuard, where: str, options: dict[str, Any]
) -> None:
    model = tiny_stack()
    kept: list[Any] = []  # arrays: torch's own views of a place are taken back
    with streamed(model, HOST, **options):
        model.blocks[0].attn.register_forward_hook(
            lambda module, *_: kept.append(module.weight.detach().numpy())
        )
        model(rows(HOST))  # kept, and not read: in grad mode a graph may do so
        assert len(kept) == 1
        hook = model.get_submodule(where).register_forward_pre_hook(
            lambda *_: torch.from_numpy(kept[-1]).sum() and None  # the planted fault
        )
        with (
            master_guard.expect_reads() as reads,
            pytest.raises(StreamedMasterReadError, match=r"place of .*attn.* after its release"),
        ):
            model(rows(HOST))
        assert len(reads) == 1
        hook.remove()
        model(rows(HOST))


@torch.no_grad()
def test_guard_reads_at_rest_are_allowed() -> None:
    model = tiny_stack()
    with streamed(model, HOST):
        model(rows(HOST))
        assert model.blocks[0].attn.weight.sum().isfinite()


@pytest.mark.parametrize("mode", ["sync", "streams", "events", "pipeline"])
@pytest.mark.parametrize("depth", [0, 4096, None])
def test_oracle_static_order_is_exact_from_the_first_pass(mode: str, depth: int | None) -> None:
    model = tiny_stack(5)
    plain = plain_on(model, HOST)
    x = rows(HOST)
    with streamed(model, HOST, mode=mode, depth=depth) as handle:
        assert_streams_like_plain(model, plain, handle, lambda m: m(x), forwards=3)
        assert handle.stats.onloads >= 3 * len(handle.units)


@torch.no_grad()
def test_oracle_wrong_counts_are_seen() -> None:
    model = tiny_stack()
    with streamed(model, HOST) as handle:
        with expect.watch(handle) as calls:
            model(rows(HOST))
        expect.assert_streams_exactly(calls)
        one = calls.passes[0]
        assert one.after is not None
        one.after = dataclasses.replace(one.after, onloads=one.after.onloads - 1)
        with pytest.raises(AssertionError, match="expected"):
            expect.assert_streams_exactly(calls)


@torch.no_grad()
def test_oracle_changed_sequence_is_only_bounded() -> None:
    model = tiny_stack()
    x = rows(HOST)
    with streamed(model, HOST) as handle:
        with expect.watch(handle) as calls:
            model(x)
            model.sequence = [0, 2, 1, 3]
            model(x)
            model(x)
        assert [expected.is_exact for expected in calls.expected] == [True, False, True]
        expect.assert_streams_exactly(calls)


def test_oracle_units_cut_anew_are_exact(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device, granularity="module") as handle, torch.no_grad():
        assert len(handle.units) == 8
        assert torch.equal(model(x), plain(x))
        assert [unit.name for unit in handle.units[:3]] == [
            "blocks.0.attn",
            "blocks.0.mlp.up",
            "blocks.0.mlp.down",
        ]
        assert_streams_like_plain(model, plain, handle, lambda m: m(x), forwards=3)
