"""The k-th call of a device, operator or hook fails, for every k: afterwards all is as it must be.

Of `offload`, of a forward, of a forward behind edits, and of `remove`. After each failure: an error
of the right type that says what failed, the model at rest, two right forwards, the plain model back
at the end, and nothing left of bytes, registrations, streams, events, threads and open files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn

import torch_offload
from tests.lanes.failures import DeviceCall, Failure, failures
from tests.lanes.fault_trials import CASES, LEFT_BY_OFFLOAD, Case, Trial
from torch_offload import _C
from torch_offload.calls import unwrap
from torch_offload.selfcheck.lane import Effort, Lane, Tally, all_caught
from torch_offload.selfcheck.subjects import Stack

_MOST_CALLS = 2000
PHASES = ("offload", "forward", "edited forward", "replan", "remove")
#: What a slice tries, of one case.
_QUICK = ("device call, runtime", "operator, KeyboardInterrupt", "hook, RuntimeError")
# The guard of the Python tests takes the product's own reading of a replaced weight, which an
# interrupt in the middle of it repeats, for a layer's.
_NOT_QUICK = (("edited forward", "operator, KeyboardInterrupt"),)
#: In these something of every kind is done wherever units stream.
_ALWAYS_STRUCK = ("offload", "forward", "edited forward")


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
