"""One failure in the life of a streamed model, and everything that must hold after it."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import torch_offload
from tests.lanes.failures import DeviceCall, Failure
from tests.lanes.leftovers import Devices, Held, Process
from tests.python import expect
from torch_offload import _C
from torch_offload.devices import devices_made_by
from torch_offload.selfcheck.subjects import Stack

HOST = torch.device("cpu")
# Lets one of the units stay on the device.
_REPLANNED_BYTES = 4096
#: Calls that give something back: what fails there is told on standard error, and stays.
_GIVING_BACK = ("free", "unregister_host")
LEFT_BY_OFFLOAD = "left on the device by an offload that failed"
#: How a failure ended: by an error, by a word of memory that is left, or by another way.
Outcome = Literal["raised", "told", "mended"]


@dataclass(frozen=True)
class Case:
    """One way to stream."""

    mode: Any = "pipeline"
    streams: Any = "shared"
    granularity: Any = "sublayer"
    debug: bool = False
    times: bool = False
    transport: Any = "raw"
    masters: Any = "plain"
    #: Of the weights; None streams, or keeps packed, all units.
    budget_share: float | None = None
    #: A folder for packed units: "new" is empty, "filled" has all of them.
    cache: Literal["none", "new", "filled"] = "none"

    @property
    def width(self) -> int:
        """Of the model: enough that packing pays, where it is packed."""
        return 8 if self.transport == "raw" else 128

    def model(self) -> nn.Module:
        """Not aligned yet."""
        model = Stack(2, self.width).eval()
        return model if self.transport == "raw" else model.bfloat16()

    @property
    def replanned_bytes(self) -> int:
        """A budget that lets one of the units stay on the device; with packing, all of them."""
        if self.transport == "raw":
            return _REPLANNED_BYTES
        return int(1.3 * self._weight_bytes)

    @property
    def _weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.model().parameters())

    @property
    def budget_bytes(self) -> int | None:
        """For `offload`."""
        return None if self.budget_share is None else int(self.budget_share * self._weight_bytes)

    def options(self, cache_folder: Path) -> dict[str, Any]:
        """For `offload`."""
        return {
            "mode": self.mode,
            "streams": self.streams,
            "granularity": self.granularity,
            "transport": self.transport,
            "masters": self.masters,
            "packed_cache": None if self.cache == "none" else cache_folder,
            "debug": self.debug,
            "depth": 0,
            "gpu_budget": self.budget_bytes,
            "on_oom": "raise",
        }


#: Units travel in several ways within one plan.
MIXED = (
    Case(transport="auto", budget_share=0.95),
    Case(transport="packed", masters="packed", budget_share=0.95),
)
CASES = (
    Case(),
    Case(streams="split"),
    Case(mode="events"),
    Case(mode="events", streams="split"),
    Case(mode="streams"),
    Case(mode="streams", streams="split"),
    Case(mode="sync"),
    Case(granularity="module"),
    Case(debug=True),
    Case(times=True),
    Case(transport="packed"),
    Case(transport="packed_resident"),
    Case(transport="packed_resident", mode="events", streams="split"),
    Case(transport="packed", masters="packed"),
    Case(transport="packed_resident", masters="packed"),
    Case(transport="packed", masters="packed", mode="events", streams="split"),
    *MIXED,
    Case(transport="packed", cache="new"),
    Case(transport="packed", cache="filled"),
    Case(transport="packed_resident", masters="packed", cache="filled"),
)


class Trial:
    """One failure in one phase of a streamed model's life, and everything that must hold after."""

    def __init__(self, case: Case, phase: str, failure: Failure) -> None:
        self._case = case
        self._phase = phase
        self._options: dict[str, Any] = {}
        self._failure = failure
        armed = failure.failure if isinstance(failure, DeviceCall) else _C.DeviceFailure("runtime")
        self.devices = Devices(lambda device: _C.failing_device(device, armed))
        self.model = self.build()
        generator = torch.Generator().manual_seed(4)
        dtype = next(self.model.parameters()).dtype
        self._x = torch.randn(3, case.width, generator=generator).to(dtype)
        self.outcome: Outcome | None = None

    def build(self) -> nn.Module:
        """A model with the same weights each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(12)
            model = self._case.model()
        return torch_offload.align(model)  # type: ignore[return-value]

    def run(self) -> None:
        """Tries it. Raises AssertionError with what does not hold."""
        with tempfile.TemporaryDirectory() as folder:
            self._options = self._case.options(Path(folder))
            if self._case.cache == "filled":
                torch_offload.offload(self.build(), HOST, **self._options).remove()
            self._run()

    def _run(self) -> None:
        process = Process.now()
        before = expect.snapshot(self.model)
        plain = copy.deepcopy(self.model)
        with _standard_error() as said, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            handle = self._offload(before)
            if handle is not None:
                self._forward(handle, plain)
                self._replan(handle, plain)
                before = self._remove(handle, before, plain)
        text = said()
        memory = self.devices.held().memory if self.devices.last is not None else (0, 0, 0)
        if self.outcome == "told":
            assert any(memory), "the memory that could not be given back is not counted"
            assert "planted failure" in text or "bad_alloc" in text, "nobody was told"
        else:
            assert memory == (0, 0, 0), f"left on the device: {memory}"
        expect.assert_unchanged(self.model, before, same_memory=False)
        assert torch_offload.handle_of(self.model) is None
        self.devices.last = None  # the handle is kept on purpose: it must hold no streams
        if gained := process.gained():
            raise AssertionError(f"left in the process: {gained}")

    def _attempt(self, phase: str, call: Callable[[], Any]) -> tuple[bool, Any]:
        """Calls. In the phase that is to fail, returns whether it has, with the right error."""
        if phase != self._phase:
            return False, call()
        try:
            with self._failure.context(self.model):
                result = call()
        except self._failure.error as error:
            self._check_error(error)
            self.outcome = "raised"
            return True, None
        if self._failure.struck:
            self.outcome = self._outcome_without_error(phase, self._failure.struck)
        return False, result

    def _outcome_without_error(self, phase: str, struck: str) -> Outcome:
        if struck in _GIVING_BACK:
            return "told"
        # Leaves are left uncut where memory is missing, which a warning says.
        leaves_uncut = (
            self._case.granularity == "module" and self._failure.error is torch.OutOfMemoryError
        )
        # Draining at the end is tried again.
        is_mended = leaves_uncut or (phase, struck) == ("remove", "synchronize")
        assert is_mended, f"the failure of {struck} was swallowed"
        return "mended"

    def _check_error(self, error: BaseException) -> None:
        assert self._failure.struck, f"an error out of nothing: {error!r}"
        assert "planted failure" in str(error) or "bad_alloc" in str(error), repr(error)

    def _offload(self, before: dict[str, Any]) -> torch_offload.Handle | None:
        with devices_made_by(self.devices):
            failed, handle = self._attempt(
                "offload", lambda: torch_offload.offload(self.model, HOST, **self._options)
            )
        if not failed:
            if self._case.budget_share is not None:
                ways = {(unit.transport, unit.place is None) for unit in handle.units}
                assert len(ways) > 1, f"all units travel alike: {ways}"
            return handle  # type: ignore[no-any-return]
        if self.devices.last is not None and self._failure.struck not in _GIVING_BACK:
            memory = self.devices.held().memory
            assert memory == (0, 0, 0), f"{LEFT_BY_OFFLOAD}: {memory}"
        expect.assert_unchanged(self.model, before, same_memory=False)
        with devices_made_by(self.devices):
            return torch_offload.offload(self.model, HOST, **self._options)

    @torch.no_grad()
    def _forward(self, handle: torch_offload.Handle, plain: nn.Module) -> None:
        must = plain(self._x)
        if self._case.granularity != "module" or self._phase != "forward":
            assert torch.equal(self.model(self._x), must)
        if self._phase == "edited forward":
            for module in (self.model, plain):
                weight = torch.full_like(module.blocks[0].attn.weight, 0.25)
                module.blocks[0].attn.weight = nn.Parameter(weight.detach())
                module.blocks[1].mlp.up.weight.mul_(0.5)
            torch_offload.align(plain)
            must = plain(self._x)
        held = self.devices.held()
        recording = handle.record(times=True) if self._case.times else nullcontext()
        failed, output = self._attempt(
            "forward" if self._phase == "forward" else "edited forward",
            lambda: self._recorded(recording),
        )
        expect.assert_at_rest(handle)
        assert failed or torch.equal(output, must)
        for _ in range(2):
            assert torch.equal(self.model(self._x), must), "a later forward is wrong"
        expect.assert_at_rest(handle)
        if self._case.granularity != "module":  # which cuts the units anew
            self._check_held(held)

    def _check_held(self, held: Held) -> None:
        now = self.devices.held()
        if self.outcome == "told":  # and what could not be given back is still counted
            assert now.registrations == held.registrations + 1, f"{now}, was {held}"
            assert now.registered_bytes > held.registered_bytes, f"{now}, was {held}"
            held = replace(
                held, registrations=now.registrations, registered_bytes=now.registered_bytes
            )
        assert now == held, f"{now}, was {held}"

    def _recorded(self, recording: AbstractContextManager[Any]) -> torch.Tensor:
        with recording:
            return self.model(self._x)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _replan(self, handle: torch_offload.Handle, plain: nn.Module) -> None:
        if self._phase != "replan":
            return
        budget = self._case.replanned_bytes
        failed, _ = self._attempt("replan", lambda: handle.replan(gpu_budget=budget))
        must = plain(self._x)
        for _ in range(2):
            assert torch.equal(self.model(self._x), must), "wrong behind replan()"
        expect.assert_at_rest(handle)
        if failed:
            handle.replan(gpu_budget=budget)
            assert torch.equal(self.model(self._x), must), "wrong behind a second replan()"

    @torch.no_grad()
    def _remove(
        self, handle: torch_offload.Handle, before: dict[str, Any], plain: nn.Module
    ) -> dict[str, Any]:
        failed, _ = self._attempt("remove", handle.remove)
        if failed and not handle.is_removed:
            expect.assert_at_rest(handle)
            assert torch.equal(self.model(self._x), plain(self._x)), "wrong after a failed remove"
            handle.remove()
        handle.remove()
        assert torch.equal(self.model(self._x), plain(self._x)), "the plain model is wrong"
        if self._phase != "edited forward":
            return before
        for (name, now), was in zip(self.model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(now, was), f"{name} has other values"
        return expect.snapshot(self.model)


@contextmanager
def _standard_error() -> Iterator[Callable[[], str]]:
    """Catches what C++ says."""
    with tempfile.TemporaryFile() as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        text = ""
        try:
            yield lambda: text
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            text = file.read().decode(errors="replace")
