"""The k-th call of a device, operator or hook fails, for every k: afterwards all is as it must be.

Of `offload`, of a forward, of a forward behind edits, and of `remove`. After each failure: an error
of the right type that says what failed, the model at rest, two right forwards, the plain model back
at the end, and nothing left of bytes, registrations, streams, events, threads and open files.
"""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import nn

import torch_offload
from tests.lanes.leftovers import Devices, Process
from tests.python import expect
from torch_offload import _C
from torch_offload.calls import unwrap
from torch_offload.devices import devices_made_by
from torch_offload.selfcheck.failing_operator import FailingOperator
from torch_offload.selfcheck.lane import Effort, Lane, Tally, all_caught
from torch_offload.selfcheck.subjects import Stack

HOST = torch.device("cpu")
_MOST_CALLS = 2000
# Lets one of the units stay on the device.
_REPLANNED_BYTES = 4096
_DEVICE_ERRORS: dict[str, type[BaseException]] = {
    "memory": MemoryError,
    "bad_alloc": MemoryError,
    "runtime": RuntimeError,
}
_LAYER_ERRORS: tuple[type[BaseException], ...] = (
    RuntimeError,
    KeyboardInterrupt,
    torch.OutOfMemoryError,
)
#: Calls that give something back: what fails there is told on standard error, and stays.
_GIVING_BACK = ("free", "unregister_host")


@dataclass(frozen=True)
class Case:
    """One way to stream."""

    mode: Any = "pipeline"
    streams: Any = "shared"
    granularity: Any = "sublayer"
    debug: bool = False
    times: bool = False
    transport: Any = "raw"

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
        return int(1.3 * sum(parameter.nbytes for parameter in self.model().parameters()))

    @property
    def options(self) -> dict[str, Any]:
        """For `offload`."""
        return {
            "mode": self.mode,
            "streams": self.streams,
            "granularity": self.granularity,
            "transport": self.transport,
            "debug": self.debug,
            "depth": 0,
            "gpu_budget": None,
            "on_oom": "raise",
        }


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
)


class Failure:
    """Lets one thing fail. `context` brackets what it may strike in."""

    def __init__(self, error: type[BaseException], at: int) -> None:
        self.error = error
        self.at = at

    @property
    def struck(self) -> str:
        """What has failed; empty if nothing has."""
        raise NotImplementedError

    def context(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Arms it within a block."""
        raise NotImplementedError


class DeviceCall(Failure):
    """The k-th call of the device: copies, records, waits, allocations, registrations, all."""

    def __init__(self, kind: str, at: int) -> None:
        super().__init__(_DEVICE_ERRORS[kind], at)
        self.failure = _C.DeviceFailure(kind)

    @property
    def struck(self) -> str:
        """The name of the call."""
        return self.failure.failed_call

    @contextmanager
    def context(self, model: nn.Module) -> Iterator[None]:
        """Counts calls from here on."""
        self.failure.calls_until_failure = self.at
        try:
            yield
        finally:
            self.failure.calls_until_failure = 0


class Operator(Failure):
    """The k-th operator of torch: in a layer, between layers, in a copy of a weight."""

    def __init__(self, error: type[BaseException], at: int) -> None:
        super().__init__(error, at)
        self.mode = FailingOperator(at, error)

    @property
    def struck(self) -> str:
        """Its name."""
        return self.mode.failed

    def context(self, model: nn.Module) -> AbstractContextManager[Any]:
        """A dispatch mode."""
        return self.mode


class Hook(Operator):
    """The k-th hook that a user has set: before and behind the forward of each module."""

    @contextmanager
    def context(self, model: nn.Module) -> Iterator[None]:
        """Sets them."""
        hooks = []
        for module in model.modules():
            name = type(module).__name__
            hooks.append(module.register_forward_pre_hook(self._hook(f"pre-hook of {name}")))
            hooks.append(module.register_forward_hook(self._hook(f"hook of {name}")))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        return lambda *_: self.mode.count(name)


def failures(phase: str) -> Iterator[tuple[str, Callable[[int], Failure]]]:
    """Everything that may fail in a phase, as a name and what makes it for the k-th time."""
    for kind in _DEVICE_ERRORS:
        yield f"device call, {kind}", lambda at, kind=kind: DeviceCall(kind, at)  # type: ignore[misc]
    for error in _LAYER_ERRORS:
        yield f"operator, {error.__name__}", lambda at, e=error: Operator(e, at)  # type: ignore[misc]
        if phase == "forward":
            yield f"hook, {error.__name__}", lambda at, e=error: Hook(e, at)  # type: ignore[misc]


#: What a slice tries, of one case.
_QUICK = ("device call, runtime", "operator, KeyboardInterrupt", "hook, RuntimeError")
# The guard of the Python tests takes the product's own reading of a replaced weight, which an
# interrupt in the middle of it repeats, for a layer's.
_NOT_QUICK = (("edited forward", "operator, KeyboardInterrupt"),)
#: In these something of every kind is done wherever units stream.
_ALWAYS_STRUCK = ("offload", "forward", "edited forward")
LEFT_BY_OFFLOAD = "left on the device by an offload that failed"
#: How a failure ended: by an error, by a word of memory that is left, or by another way.
Outcome = Literal["raised", "told", "mended"]
PHASES = ("offload", "forward", "edited forward", "replan", "remove")


class Trial:
    """One failure in one phase of a streamed model's life, and everything that must hold after."""

    def __init__(self, case: Case, phase: str, failure: Failure) -> None:
        self._case = case
        self._phase = phase
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
                "offload", lambda: torch_offload.offload(self.model, HOST, **self._case.options)
            )
        if not failed:
            return handle  # type: ignore[no-any-return]
        if self.devices.last is not None and self._failure.struck not in _GIVING_BACK:
            memory = self.devices.held().memory
            assert memory == (0, 0, 0), f"{LEFT_BY_OFFLOAD}: {memory}"
        expect.assert_unchanged(self.model, before, same_memory=False)
        with devices_made_by(self.devices):
            return torch_offload.offload(self.model, HOST, **self._case.options)

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
            assert self.devices.held() == held, f"{self.devices.held()}, was {held}"

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


class Silent(Stack):
    """Keeps failures to itself, and gives a wrong answer instead."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows to rows."""
        try:
            return super().forward(x)
        except RuntimeError:
            return x


class SilentTrial(Trial):
    """Of such a model."""

    def build(self) -> nn.Module:
        """As of any other."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(12)
            return torch_offload.align(Silent(2, 8).eval())  # type: ignore[return-value]


class UnwrappedTrial(Trial):
    """Of a model that nothing is installed in."""

    def _offload(self, before: dict[str, Any]) -> torch_offload.Handle | None:
        handle = super()._offload(before)
        assert handle is not None
        for unit in handle.units:
            unwrap(self.model.get_submodule(unit.name))
        return handle


class HoardingTrial(Trial):
    """Of an `offload` that keeps its memory when it fails."""

    def _attempt(self, phase: str, call: Callable[[], Any]) -> tuple[bool, Any]:
        kept: list[_C.Engine] = []

        def keep(engine: _C.Engine) -> None:
            kept.append(engine)

        if phase != self._phase:
            return super()._attempt(phase, call)
        with mock.patch.object(_C.Engine, "close", keep):
            failed, handle = super()._attempt(phase, call)
        self._kept = kept if failed else []
        return failed, handle


class FaultSweep(Lane):
    """Every k of every phase, in each case, for each kind of failure."""

    name = "faults"
    tried = "the k-th device call, operator or hook fails, for every k: offload, forward, remove"
    counts = "planted failures"

    def __init__(self, cases: tuple[Case, ...] = CASES) -> None:
        self._cases = cases

    def control(self) -> Tally:
        """Failures that are kept silent, a model that is not streamed, an offload that hoards."""
        hoarded = self._control(HoardingTrial, "offload")
        if not any(LEFT_BY_OFFLOAD in example for example in hoarded.examples):
            hoarded = Tally()  # other things that it leaves are no sign that devices are asked
        return all_caught(
            {
                "silent": self._control(SilentTrial, "forward"),
                "unwrapped": self._control(UnwrappedTrial, "forward"),
                "hoarding": hoarded,
            }
        )

    def _control(self, trial_type: type[Trial], phase: str) -> Tally:
        tally = Tally()
        self._sweep(tally, trial_type, Case(), phase, lambda at: DeviceCall("runtime", at))
        return tally

    def run(self, effort: Effort) -> Tally:
        """Quick: one case. Full: all."""
        cases = self._cases if effort.full else self._cases[:1]
        jobs = [
            (case, phase, name, make)
            for case in cases
            for phase in PHASES
            for name, make in failures(phase)
            if effort.full or (name in _QUICK and (phase, name) not in _NOT_QUICK)
        ]
        tally = Tally()
        struck: set[str] = set()
        for number, (case, phase, name, make) in enumerate(jobs, 1):
            count = tally.count
            struck |= self._sweep(tally, Trial, case, phase, make)
            figures = tally.figures.setdefault(phase, {})
            figures[name] = figures.get(name, 0) + tally.count - count
            effort.progress(number, len(jobs))
        tally.figures["cases"] = len(cases)
        tally.figures["failed_calls"] = sorted(struck)
        outcomes = tally.figures["outcomes"]
        tally.note = (
            f"{len(cases)} ways to stream, {len(struck)} calls failed; {outcomes['raised']:,} "
            f"raised, {outcomes.get('mended', 0):,} done in another way, {outcomes['told']:,} told "
            "of memory that is left"
        )
        return tally

    @staticmethod
    def _sweep(
        tally: Tally,
        trial_type: type[Trial],
        case: Case,
        phase: str,
        make: Callable[[int], Failure],
    ) -> set[str]:
        """Every k until nothing is left to strike. Returns what has failed."""
        struck = set()
        outcomes = tally.figures.setdefault("outcomes", {})
        for at in range(1, _MOST_CALLS):
            failure = make(at)
            trial = trial_type(case, phase, failure)
            try:
                trial.run()
            except Exception as error:
                what = f"{case}, {phase}, {failure.error.__name__} at {at} ({failure.struck})"
                tally.add_fault(f"{what}: {error}")
            if not failure.struck:  # nor counted: it was a life without a failure
                break
            tally.count += 1
            struck.add(failure.struck)
            if trial.outcome is not None:
                outcomes[trial.outcome] = outcomes.get(trial.outcome, 0) + 1
        else:
            tally.add_fault(f"{case}, {phase}: no end of calls")
        if phase in _ALWAYS_STRUCK and not struck:
            tally.add_fault(f"{case}, {phase}: nothing failed, so nothing was streamed")
        return struck
