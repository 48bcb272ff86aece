"""What is planted in the lanes of bad input: one thing for each judge, which it must find."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import torch_offload
from tests.lanes import bad_input
from tests.lanes.fuzzed_commands import fuzz_command_line, fuzz_processes
from tests.lanes.fuzzing import Fuzz, mutated_document
from torch_offload import cli
from torch_offload.calls import unwrap
from torch_offload.selfcheck.lane import Tally

_REAL_OFFLOAD = torch_offload.offload


def planted_in_bad_input(folder: Path) -> dict[str, Tally]:
    """A tally for each plant."""
    return {
        "a reader that trusts its file": _trusting_reader(),
        **{name: _attempted(call) for name, call in _CALLS.items()},
        **{name: _command_line(main, folder) for name, main in _MAINS.items()},
        "a process that dies": _process(folder, "raise RuntimeError", "exit status|a traceback"),
        **{name: _offloaded(spoil, fault, folder) for name, (spoil, fault) in _SPOILT.items()},
    }


def expecting(tally: Tally, fault: str) -> Tally:
    """A tally of the faults that tell of this: others do not show that its judge sees."""
    told = Tally()
    for example in tally.examples:
        if any(part in example for part in fault.split("|")):
            told.add_fault(example)
    return told


def _trusting_reader() -> Tally:
    tally = Tally()
    fuzz = Fuzz(tally, 5)
    document = bad_input.a_profile()
    for _ in range(200):
        changed = mutated_document(fuzz.choice, document)
        fuzz.attempt("profile", changed, lambda c=changed: c["units"][0]["times"].keys())  # type: ignore[misc]
    return expecting(tally, "KeyError|AttributeError")


def _silent() -> None:
    raise ValueError


def _accident() -> object:
    return iter(7)  # type: ignore[call-overload]


def _foreign() -> None:
    raise TypeError("incompatible constructor arguments")


def _hang() -> None:
    time.sleep(5)


_CALLS: dict[str, Callable[[], object]] = {
    "a silent": _silent,
    "'int' object is not iterable": _accident,
    "incompatible constructor": _foreign,
    "hangs for": _hang,
}


def _attempted(call: Callable[[], object]) -> Tally:
    tally = Tally()
    Fuzz(tally, 1, seconds=0.1).attempt("planted", "input", call)
    fault = next(fault for fault, planted in _CALLS.items() if planted is call)
    return expecting(tally, fault)


def _said(status: int, text: str) -> Callable[[list[str]], int]:
    def main(words: list[str]) -> int:
        print(text, file=sys.stderr)
        return status

    return main


_MAINS = {
    "exit status 7": _said(7, "torch-offload: expected something else"),
    "a traceback": _said(cli.BAD_ANSWER, "Traceback (most recent call last):"),
    "refused without a word": _said(cli.BAD_INPUT, " "),
    "refused by accident": _said(cli.BAD_INPUT, "torch-offload: 'int' object is not iterable"),
    "shows where": _said(cli.BAD_ANSWER, "KeyError: 'a'; TORCH_OFFLOAD_DEBUG=1 shows where"),
}


def _command_line(main: Callable[[list[str]], int], folder: Path) -> Tally:
    tally = Tally()
    with mock.patch.object(cli, "main", main):
        fuzz_command_line(tally, 2, 5, folder)
    return expecting(tally, next(fault for fault, planted in _MAINS.items() if planted is main))


def _process(folder: Path, program: str, fault: str) -> Tally:
    tally = Tally()
    fuzz_processes(tally, 1, 6, folder, program=("-c", program))
    return expecting(tally, fault)


# --- offload -------------------------------------------------------------------------------------


def _unwrapped(model: nn.Module, handle: torch_offload.Handle) -> None:
    for unit in handle.units:
        unwrap(model.get_submodule(unit.name))


@torch.no_grad()
def _edited(model: nn.Module, handle: torch_offload.Handle) -> None:
    next(model.parameters()).add_(1.0)


def _nothing(model: nn.Module, handle: torch_offload.Handle) -> None:
    pass


def _spoiling(begin: Any, end: Any) -> Callable[..., Any]:
    @contextmanager
    def offload(model: nn.Module, device: Any, **options: Any) -> Iterator[Any]:
        with _REAL_OFFLOAD(model, device, **options) as handle:
            begin(model, handle)
            yield handle
        end(model, handle)

    return offload


def _staying(model: nn.Module, device: Any, **options: Any) -> Any:
    """It is refused, but only after the model was offloaded."""
    handle = _REAL_OFFLOAD(model, device)
    _KEPT.append(handle)
    raise ValueError("expected other options")


_KEPT: list[torch_offload.Handle] = []
_SPOILT: dict[str, tuple[Callable[..., Any], str]] = {
    "a model that is not streamed": (_spoiling(_unwrapped, _nothing), "nothing was streamed"),
    "wrong outputs": (_spoiling(_edited, _nothing), "the outputs differ"),
    "another model": (_spoiling(_nothing, _edited), "the model is not what it was"),
    "a model that stays offloaded": (_staying, "the model is still offloaded"),
}


def _offloaded(offload: Callable[..., Any], fault: str, folder: Path) -> Tally:
    tally = Tally()
    with mock.patch.object(torch_offload, "offload", offload):
        bad_input.fuzz_offload(tally, 20, 4, folder)
    for handle in _KEPT:
        handle.remove()
    _KEPT.clear()
    return expecting(tally, fault)
