"""The trace of reads itself: a trace that sees nothing would pass most tests of units."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from tests.python.models import CASES
from tests.python.zoo.case import noise
from tests.python.zoo.plain import WIDTH, Block, FunctionalMixer, Mlp, Stack
from torch_offload.reads import trace_reads


class TestTrace:
    """The trace itself: a trace that sees nothing would pass most tests above."""

    def test_functional_reads_are_seen_with_their_reader(self) -> None:
        model = Stack([FunctionalMixer()])
        with trace_reads(model) as trace:
            model(noise(2, 6, WIDTH))
        mixer = model.blocks[0]
        outside = trace.outside(
            {
                "blocks.0.conv.weight": mixer.conv,
                "blocks.0.conv.bias": mixer.conv,
                "blocks.0.out_proj.weight": mixer.out_proj,
                "blocks.0.in_proj.weight": mixer.in_proj,
            }
        )
        assert outside == {
            "blocks.0.conv.weight": "blocks.0",
            "blocks.0.conv.bias": "blocks.0",
            "blocks.0.out_proj.weight": "blocks.0",
        }
        proven = trace.proven_leaves()
        assert "blocks.0.in_proj" in proven
        assert not {"blocks.0.conv", "blocks.0.out_proj"} & proven

    def test_view_used_after_its_module_returned_is_seen(self) -> None:
        class Lends(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.weight.t()

        class Borrows(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lender = Lends(WIDTH, WIDTH)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x @ self.lender(x)

        model = Borrows()
        with torch.no_grad(), trace_reads(model) as trace:
            model(noise(2, WIDTH))
        assert trace.outside({"lender.weight": model.lender}) == {"lender.weight": ""}

    def test_shape_and_dtype_are_no_reads(self) -> None:
        class Asks(Mlp):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                assert x.shape[-1] == self.up.weight.shape[1]
                return super().forward(x.to(self.up.weight.dtype))

        model = Stack([Asks()])
        with trace_reads(model) as trace:
            model(noise(2, 6, WIDTH))
        assert "blocks.0.up" in trace.proven_leaves()

    def test_instances_are_as_before_afterwards_also_after_an_error(self) -> None:
        model = Stack([Block() for _ in range(2)])
        wrapped = model.blocks[0]
        plain_call = wrapped._call_impl
        calls = []

        def counting(*args: object, **kwargs: object) -> object:
            calls.append(1)
            return plain_call(*args, **kwargs)

        wrapped._call_impl = counting
        before = [dict(vars(module)) for module in model.modules()]
        with trace_reads(model) as trace:
            model(noise(2, 6, WIDTH))
        with pytest.raises(RuntimeError), trace_reads(model):
            model(noise(2, 6, 3))
        assert [dict(vars(module)) for module in model.modules()] == before
        assert len(calls) == 1
        assert trace.calls["blocks.0"] == 1

    def test_wrappers_that_came_and_went_meanwhile_stay(self) -> None:
        """As those of a plan that changes at the end of the traced pass."""
        model = Stack([Block() for _ in range(3)])

        def wrapper(*args: object, **kwargs: object) -> None: ...

        for index in (0, 1):
            vars(model.blocks[index])["_call_impl"] = wrapper
        kept = vars(model.blocks[0])["_call_impl"]

        def newer(*args: object, **kwargs: object) -> None: ...

        with trace_reads(model):
            del vars(model.blocks[1])["_call_impl"]
            vars(model.blocks[2])["_call_impl"] = newer
        assert vars(model.blocks[0])["_call_impl"] is kept
        assert "_call_impl" not in vars(model.blocks[1])
        assert vars(model.blocks[2])["_call_impl"] is newer
        assert not any("_call_impl" in vars(module) for module in model.blocks[1].children())

    def test_calls_of_another_thread_are_not_noted(self) -> None:
        model = Stack([Block() for _ in range(2)])
        others = []

        def call_elsewhere(*args: object) -> None:
            hook.remove()
            thread = threading.Thread(target=lambda: others.append(model(noise(2, 6, WIDTH))))
            thread.start()
            thread.join()

        hook = model.blocks[1].register_forward_pre_hook(call_elsewhere)
        with trace_reads(model) as trace:
            model(noise(2, 6, WIDTH))
        assert len(others) == 1
        assert trace.calls["blocks.0"] == trace.calls["blocks.1"] == 1

    def test_outputs_are_those_without_a_trace(self) -> None:
        case = CASES["transformer"]
        model = case.build()
        with torch.no_grad():
            plain = model(**case.inputs())
            with trace_reads(model):
                traced = model(**case.inputs())
        assert torch.equal(plain, traced)
