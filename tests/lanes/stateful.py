"""Drawn by hypothesis: models, orders, edits, exceptions and threads, against a plain reference.

Each example is a life of one offloaded model. Every forward must give the plain model's bits, and
copy exactly what `tests.python.expect` derives from the calls that were made.
"""

from __future__ import annotations

import copy
import itertools
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import StopTest
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from torch import nn

import torch_offload
from tests.lanes.edits import EditedPasses
from tests.lanes.leftovers import Devices
from tests.python import expect
from torch_offload.devices import devices_made_by
from torch_offload.selfcheck.lane import Effort, Lane, Tally
from torch_offload.selfcheck.subjects import Stack

HOST = torch.device("cpu")
# Narrower ones are not worth packing.
_WIDTH, _PACKED_WIDTH = 8, 128
_STEPS = 6

_MODES = [
    {"mode": mode, "streams": streams}
    for mode in ("pipeline", "events", "streams", "sync")
    for streams in ("shared", "split")
    if (mode, streams) != ("sync", "split")
]
_PACKED = [
    {"transport": transport, "masters": masters}
    for transport in ("packed", "packed_resident")
    for masters in ("plain", "packed")
]
_WAYS = st.sampled_from(_MODES) | st.sampled_from(
    [mode | packed for mode in _MODES for packed in _PACKED]
)


class PlantedError(Exception):
    """What a layer raises."""


class Life(RuleBasedStateMachine):
    """One model from `offload` to `remove`."""

    tally: Tally
    forgets_stale = False
    num_unseen = 0

    @initialize(
        num_blocks=st.integers(2, 4),
        way=_WAYS,
        granularity=st.sampled_from(["sublayer", "layer"]),
        depth=st.sampled_from([0, 1024, None]),
    )
    def begin(
        self, num_blocks: int, way: dict[str, Any], granularity: str, depth: int | None
    ) -> None:
        """Offloads a model of some shape in some way."""
        self.devices = Devices()
        self.stack = ExitStack()
        self.stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "torch_offload: the first forward called")
        torch.manual_seed(num_blocks)
        is_packed = "transport" in way
        self.width = _PACKED_WIDTH if is_packed else _WIDTH
        self.dtype = torch.bfloat16 if is_packed else torch.float32
        stack = Stack(num_blocks, self.width).eval().to(self.dtype)
        self.model: Any = torch_offload.align(stack)
        self.plain: Any = torch_offload.align(copy.deepcopy(self.model))
        config = torch_offload.Config(**way, granularity=granularity, depth=depth, gpu_budget=None)
        with devices_made_by(self.devices):
            self.handle = torch_offload.offload_with(self.model, HOST, config)
        # As it is outside `watch`, for a second thread, which must not be counted.
        self.entrance: Callable[..., Any] = vars(self.model)["_call_impl"]
        self.passes = EditedPasses(self.handle)
        self._count("packed lives", int(is_packed))

    def _rows(self, rows: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(rows)
        return torch.randn(rows, self.width, generator=generator).to(self.dtype)

    def _count(self, figure: str, by: int = 1) -> None:
        self.tally.figures[figure] = self.tally.figures.get(figure, 0) + by

    def _watched(self, call: Callable[[], None]) -> None:
        if self.forgets_stale:
            self.passes.forget()
        with torch.no_grad(), self.passes.watched() as calls:
            call()
        self._count("passes", len(calls.passes))
        self._count("passes counted exactly", len(calls.exact))
        self._count("onloads", sum(one.onloads for one in calls.passes))

    @rule(rows=st.integers(1, 5), times=st.integers(1, 3))
    def forward(self, rows: int, times: int) -> None:
        """The plain model's bits."""
        x = self._rows(rows)

        def call() -> None:
            must = self.plain(x)
            for _ in range(times):
                assert torch.equal(self.model(x), must), "the outputs differ"

        self._watched(call)

    @rule(data=st.data())
    def other_order(self, data: st.DataObject) -> None:
        """Blocks are skipped, repeated, called in another order from here on."""
        blocks = len(self.model.blocks)
        sequence = data.draw(st.lists(st.integers(0, blocks - 1), min_size=0, max_size=5))
        self.model.sequence = self.plain.sequence = sequence

    @rule(block=st.integers(0, 1), part=st.sampled_from(["attn", "mlp.up", "mlp.down"]))
    def edited(self, block: int, part: str) -> None:
        """In place, as an optimizer does."""
        name = f"blocks.{block}.{part}.weight"
        with torch.no_grad():
            for model in (self.model, self.plain):
                model.get_parameter(name).mul_(0.75)
        self.passes.edited([name])
        self._count("edits")

    @rule(block=st.integers(0, 1), part=st.sampled_from(["attn", "mlp.up", "mlp.down"]))
    def edited_unseen(self, block: int, part: str) -> None:
        """One element, by a way that no counter shows; `refresh` tells of it.

        Another value each time: packed masters are compared whole, and the same would cost nothing.
        """
        name = f"blocks.{block}.{part}.weight"
        self.num_unseen += 1
        for model in (self.model, self.plain):
            model.get_parameter(name).data.view(-1)[3] = 0.125 + self.num_unseen
        self.handle.refresh()
        self.passes.refreshed([name])
        self._count("edits")

    @rule(block=st.integers(0, 1))
    def replaced_parameter(self, block: int) -> None:
        """Another Parameter object in its place."""
        name = f"blocks.{block}.attn.weight"
        for model in (self.model, self.plain):
            model.blocks[block].attn.weight = nn.Parameter(
                torch.full((self.width, self.width), 0.0625, dtype=self.dtype)
            )
        torch_offload.align(self.plain)
        self.passes.replaced([name])
        self._count("edits")

    @rule(block=st.integers(0, 1), before=st.booleans())
    def exception(self, block: int, before: bool) -> None:
        """In the middle of a forward; the next one is right."""

        def fail(*_: Any) -> None:
            raise PlantedError

        module = self.model.blocks[block].mlp
        register = module.register_forward_pre_hook if before else module.register_forward_hook
        hook = register(fail)

        def call() -> None:
            try:
                self.model(self._rows(1))
            except PlantedError:
                self._count("exceptions")
            else:
                assert block not in self.model.sequence, "the exception was swallowed"

        try:
            self._watched(call)
        finally:
            hook.remove()

    @rule()
    def forward_in_a_thread(self) -> None:
        """Of its own, one after the other."""
        x = self._rows(2)
        outputs: list[torch.Tensor] = []

        def in_thread() -> None:
            with torch.no_grad():
                outputs.append(self.model(x))

        def call() -> None:
            thread = threading.Thread(target=in_thread)
            thread.start()
            thread.join(60)
            assert outputs, "the thread did not come back"
            assert torch.equal(outputs[0], self.plain(x)), "the outputs differ"

        self._watched(call)
        self._count("threads")

    @rule()
    def second_thread(self) -> None:
        """In the middle of a forward: refused, and the first one is right."""
        refused: list[BaseException] = []

        def in_thread() -> None:
            try:
                self.entrance(self._rows(1))
            except torch_offload.StateError as error:
                refused.append(error)

        def intrude(*_: Any) -> None:
            thread = threading.Thread(target=in_thread)
            thread.start()
            thread.join(60)

        hook = self.model.blocks[0].attn.register_forward_pre_hook(intrude)
        x = self._rows(3)

        def call() -> None:
            assert torch.equal(self.model(x), self.plain(x)), "the outputs differ"

        try:
            self._watched(call)
        finally:
            hook.remove()
        assert len(refused) == self.model.sequence.count(0), "a second thread was let in"
        self._count("threads")

    @invariant()
    def at_rest(self) -> None:
        """Between two rules, whatever happened."""
        if hasattr(self, "handle"):
            expect.assert_at_rest(self.handle)

    def teardown(self) -> None:
        """The plain model is back, and nothing is left on the device."""
        if not hasattr(self, "handle"):
            return
        self.handle.remove()
        self.stack.close()
        for name, parameter in self.plain.named_parameters():
            assert torch.equal(self.model.get_parameter(name), parameter), f"{name} is another"
        assert self.devices.held().memory == (0, 0, 0), f"left {self.devices.held()}"
        # What draws more than an example may is broken off, and is no life.
        self.tally.count += not isinstance(sys.exception(), StopTest)


class Stateful(Lane):
    """So many examples."""

    name = "hypothesis"
    tried = "models, orders, edits, exceptions and threads as drawn: bits, and copies counted"
    counts = "completed examples"

    def control(self) -> Tally:
        """An oracle that is not told of edits must be found wrong."""
        tally = Tally()
        self._live(tally, 200, 7, forgets_stale=True)
        return tally

    def run(self, effort: Effort) -> Tally:
        """Quick: 60 examples; full: 5,000, broken off ones not counted."""
        tally = Tally()
        total = effort.pick(60, 5_000)
        for number in itertools.count():
            before = tally.count
            self._live(tally, min(250, total - before), number)
            effort.progress(min(tally.count, total), total)
            if tally.num_faults or tally.count >= total:
                break
            if tally.count == before:
                tally.add_fault("no example was completed")
        tally.note = (
            f"{tally.figures['passes']:,} passes, {tally.figures['passes counted exactly']:,} "
            f"counted exactly; {tally.figures['packed lives']:,} examples begun with packed units"
        )
        return tally

    @staticmethod
    def _live(tally: Tally, count: int, number: int, *, forgets_stale: bool = False) -> None:
        machine = type("Life", (Life,), {"tally": tally, "forgets_stale": forgets_stale})
        try:
            run_state_machine_as_test(
                seed(number)(machine),
                settings=settings(
                    max_examples=count,
                    stateful_step_count=_STEPS,
                    deadline=None,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                    print_blob=False,
                    report_multiple_bugs=False,
                    # A planted fault need not be made small.
                    phases=[Phase.generate] if forgets_stale else [Phase.generate, Phase.shrink],
                ),
            )
        except Exception as error:
            notes = " | ".join(getattr(error, "__notes__", ()))
            tally.add_fault(f"{type(error).__name__}: {error} {notes}")
