"""``granularity="module"``: sublayers in the first pass, proven leaves afterwards."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python import expect
from tests.python.dropin import IDLE_WARNING, assert_equal, plain_on, rows, tiny_stack
from tests.python.leaf_oracle import (
    assert_cut_streams,
    checked,
    inputs_of,
    leaf_cut_of,
    leaf_names,
    observed_uncut,
    offloaded,
    settle,
    stack_pair,
)
from tests.python.models import CASES
from torch_offload.selfcheck.subjects import Mlp


class TestCut:
    """From sublayers to leaves, in the same window."""

    @pytest.mark.parametrize("mode", ["sync", "streams", "events", "pipeline"])
    def test_first_pass_streams_sublayers_and_second_streams_leaves(
        self, device: torch.device, mode: str
    ) -> None:
        model, forward = stack_pair(device)
        with offloaded(model, device, mode=mode) as handle:
            window_bytes, host_bytes = handle.stats.window_bytes, handle.stats.host_bytes
            assert leaf_names(handle) == {
                f"blocks.{i}.{half}" for i in range(4) for half in ("attn", "mlp")
            }
            with observed_uncut(handle) as called:
                forward()
            assert called == list(range(8))
            assert leaf_names(handle) == {
                f"blocks.{i}.{leaf}" for i in range(4) for leaf in ("attn", "mlp.up", "mlp.down")
            }
            assert assert_cut_streams(handle, forward).units == list(range(12))
            with expect.watch(handle) as calls:
                forward()
                forward()
            expect.assert_streams_exactly(calls, exact_passes=2)
            assert calls.passes[-1].onloads >= 12 - 3  # depth 0: no more than a few stay whole
            assert handle.stats.window_bytes == window_bytes
            assert handle.stats.host_bytes == host_bytes

    @pytest.mark.parametrize("name", ["llama", "vit"])
    def test_window_is_smaller_than_that_of_sublayers(
        self, device: torch.device, name: str
    ) -> None:
        windows = {}
        for granularity in ("sublayer", "module"):
            model = torch_offload.align(CASES[name].build())
            with torch_offload.offload(model, device, granularity=granularity) as handle:
                windows[granularity] = handle.stats.window_bytes
                if granularity == "module":
                    with torch.no_grad():
                        model(**inputs_of(name, device))
                    assert handle.stats.window_bytes == windows[granularity]
                largest = max(unit.size_bytes for unit in handle.units)
                assert largest <= windows[granularity]
        assert windows["module"] < windows["sublayer"]

    def test_counts_go_on_over_the_cut(self, device: torch.device) -> None:
        model, forward = stack_pair(device)
        with offloaded(model, device) as handle:
            before = handle.stats
            for forwards in range(1, 4):
                forward()
                after = handle.stats
                assert after.forwards == forwards
                assert after.onloads > before.onloads
                for field in fields(after):
                    assert getattr(after, field.name) >= getattr(before, field.name), field.name
                before = after

    def test_cut_model_is_given_back_and_can_be_offloaded_again(self, device: torch.device) -> None:
        model, forward = stack_pair(device)
        for _ in range(2):
            with offloaded(model, device) as handle:
                settle(handle, forward)
                assert "blocks.0.mlp.up" in leaf_names(handle)
        model.to(device)
        forward()

    def test_model_removed_before_its_first_pass_is_plain(self, device: torch.device) -> None:
        model, forward = stack_pair(device)
        with offloaded(model, device) as handle:
            assert not leaf_cut_of(handle).is_settled
        model.to(device)
        forward()

    def test_biases_that_join_no_leaf_become_resident(self, device: torch.device) -> None:
        case = CASES["qwen3"]
        model = torch_offload.align(case.build())
        forward = checked(model, plain_on(model, device), **inputs_of("qwen3", device))
        with offloaded(model, device) as handle:
            streamed = {name for unit in handle.units for name in unit.parameters}
            resident = handle.stats.bytes_resident
            settle(handle, forward)
            left = streamed - {name for unit in handle.units for name in unit.parameters}
            assert left
            assert all("norm" in name for name in left)
            sizes = [model.get_parameter(name).nbytes for name in left]
            assert handle.stats.bytes_resident == resident + sum(sizes)
            assert {model.get_parameter(name).device for name in left} == {device}


WHOLE = {
    "mamba": (".mixer", 5),  # its conv1d is read without a call
    "weight_norm": (".mlp", 4),  # the parametrised projection is closed
    "mixtral": (".mlp", 5),  # fused experts are no leaves of torch's
    "transformer": ("layers.", 8),  # nn.MultiheadAttention, in layers that are closed themselves
    "functional_mixer": (".mixer", 5),
}


@pytest.mark.parametrize("name", list(WHOLE))
def test_half_that_cannot_be_cut_stays_whole(device: torch.device, name: str) -> None:
    part, count = WHOLE[name]
    model = torch_offload.align(CASES[name].build())
    must = plain_on(model, device)
    inputs = inputs_of(name, device)
    # A Mamba's cache is an object that compares by identity: its last hidden state says enough.
    take = (lambda out: out) if not hasattr(must, "config") else (lambda out: out.logits)
    with torch.no_grad():
        expected = take(must(**inputs))

    def forward() -> None:
        assert_equal(take(model(**inputs)), expected)

    with offloaded(model, device) as handle:
        whole = {unit for unit in leaf_names(handle) if part in unit}
        assert len(whole) == count
        settle(handle, forward)
        assert whole <= leaf_names(handle)


class OwnAttention(nn.Module):
    """nn.MultiheadAttention beside a projection, as users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = Mlp(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.mlp(x)


def test_multihead_attention_stays_whole_beside_leaves(device: torch.device) -> None:
    model = torch_offload.align(nn.Sequential(*(OwnAttention() for _ in range(3))).eval())
    x = rows(device, batch=6).reshape(2, 3, 16)
    forward = checked(model, plain_on(model, device), x)
    with offloaded(model, device) as handle:
        settle(handle, forward)
        names = leaf_names(handle)
        assert {"1.attention", "1.mlp.up", "1.mlp.down"} <= names
        assert not any("out_proj" in name for name in names)


class TestPartialPasses:
    """A cut waits until every sublayer was seen, but not for ever."""

    def test_encoder_alone_does_not_cut(self, device: torch.device) -> None:
        model = torch_offload.align(CASES["t5"].build())
        plain = plain_on(model, device)
        inputs = inputs_of("t5", device)
        encode = checked(model.get_encoder(), plain.get_encoder(), inputs["input_ids"])
        with offloaded(model, device) as handle:
            before = leaf_names(handle)
            with observed_uncut(handle) as called:
                encode()
            assert 0 < len(called) < len(before)
            assert not leaf_cut_of(handle)._is_cut
            assert leaf_names(handle) == before
            with observed_uncut(handle):
                assert_equal(model(**inputs).logits, plain(**inputs).logits)
            assert leaf_cut_of(handle).is_settled
            assert leaf_names(handle) != before

    @pytest.mark.parametrize("name", ["t5", "bart"])
    def test_generate_from_the_first_call_on_equals_plain(
        self, device: torch.device, name: str
    ) -> None:
        case = CASES[name]
        model = torch_offload.align(case.build())
        ids = inputs_of(name, device)["input_ids"]
        with torch.no_grad():
            must = plain_on(model, device).generate(ids, **case.generate)
        with offloaded(model, device) as handle:
            before = leaf_names(handle)
            assert torch.equal(model.generate(ids, **case.generate), must)
            assert leaf_cut_of(handle).is_settled  # the encoder's pass, then a decoder's
            assert leaf_names(handle) != before
            handle.refresh()
            assert torch.equal(model.generate(ids, **case.generate), must)
            streamed = [unit for unit in handle.units if unit.place]
            assert all(unit.acquired and unit.onloads for unit in streamed)

    @pytest.mark.filterwarnings(f"ignore:{IDLE_WARNING}:UserWarning")
    def test_part_that_never_runs_is_cut_out_of_patience(self, device: torch.device) -> None:
        model, _ = stack_pair(device)
        model.sequence = [0, 1, 3]
        forward = checked(model, plain_on(model, device), rows(device))
        with offloaded(model, device) as handle:
            for _ in range(3):
                forward()
                assert not leaf_cut_of(handle)._is_cut
            forward()
            assert leaf_cut_of(handle).is_settled
            assert {"blocks.2.mlp", "blocks.1.mlp.up"} <= leaf_names(handle)
            forward()
            model.sequence[:] = [0, 1, 2, 3]  # what was never seen still streams, as a sublayer
            checked(model, plain_stack(device), rows(device))()


def plain_stack(device: torch.device) -> Any:
    return tiny_stack().to(device)
