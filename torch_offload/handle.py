"""What `offload` returns: the state of an offloaded model, and the way back."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from rich.console import Console
from torch import nn

from torch_offload import _C
from torch_offload._C import StateError
from torch_offload.config import Config
from torch_offload.counts import OffloadStats, UnitInfo, stats_of
from torch_offload.description import UnitDescription, describe_unit
from torch_offload.hazards import Finding, check
from torch_offload.placed import Placed
from torch_offload.profiling import Profiler
from torch_offload.recording import Recorder
from torch_offload.report import report_of
from torch_offload.sizes import format_size
from torch_offload.trace import Trace, trace_of

if TYPE_CHECKING:
    from torch_offload.explanation import Explanation
    from torch_offload.measured_times import MeasuredTimes
    from torch_offload.profile import Profile

#: Of `Handle.replan`: leave an option as it is.
KEEP: Any = object()

# Key in `vars(model)`. The model keeps its handle alive, never the other way round.
HANDLE_KEY = "_torch_offload_handle"


class Installed(Protocol):
    """What a handle needs of the one who moved the weights and wrapped the calls.

    Lifetime: the handle owns it; it holds neither handle nor model, or they would form a cycle.
    """

    @property
    def config(self) -> Config:
        """The options that hold now."""

    @property
    def bytes_resident(self) -> int:
        """Weights and buffers that stay on the device."""

    @property
    def placed(self) -> Placed:
        """Where the weights are now."""

    def replan(self, model: nn.Module, config: Config, times: MeasuredTimes | None) -> None:
        """Goes on with other options for budget and depth; see `Handle.replan`."""

    def note_times(self, times: MeasuredTimes) -> None:
        """Lets later plans go by what forwards were measured to take."""

    def undo(self, model: nn.Module) -> None:
        """Gives the plain model back. Blocks while copying."""


class Handle:
    """An offloaded model: counters, report, refresh, and the way back.

    Made by `torch_offload.offload`. As a context manager it removes itself at the end.

    Example:
        >>> with torch_offload.offload(model) as handle:  # doctest: +SKIP
        ...     model.generate(**inputs)
        ...     handle.report()
    """

    def __init__(
        self,
        model: nn.Module,
        engine: _C.Engine,
        device: torch.device,
        recorder: Recorder,
        installed: Installed,
    ) -> None:
        self._model = weakref.ref(model)
        self._engine = engine
        self._recorder = recorder
        self._installed = installed
        self._last_profile: Profile | None = None
        self.device = device

    @property
    def config(self) -> Config:
        """The options that hold now: those of `offload`, as `replan` changed them."""
        return self._installed.config

    @property
    def model(self) -> nn.Module | None:
        """The model, or None once it is gone."""
        return self._model()

    @property
    def is_removed(self) -> bool:
        """Whether `remove` has given the plain model back."""
        return self._engine.is_closed

    @property
    def stats(self) -> OffloadStats:
        """Counts so far. Does not block.

        Raises:
            StateError: After `remove`.
        """
        return stats_of(self._engine, self._installed.bytes_resident)

    @property
    def units(self) -> Sequence[UnitInfo]:
        """All units in their planned order, resident ones included. Does not block.

        Raises:
            StateError: After `remove`, or while another thread runs a forward.
        """
        plan = self._engine.plan
        copied = self._engine.transport_bytes
        infos = []
        for index, (unit, place) in enumerate(zip(plan.units, plan.places, strict=True)):
            stats = self._engine.unit_stats(index)
            infos.append(
                UnitInfo(
                    name=unit.name,
                    layer_index=unit.layer_index,
                    kind=unit.kind,
                    size_bytes=unit.size_bytes,
                    place=place,
                    parameters=tuple(self._engine.parameter_names(index)),
                    acquired=stats.acquired,
                    transport=plan.transports[index],
                    copied_bytes=copied[index],
                    onloads=stats.onloads,
                    misses=stats.misses,
                    copies=self._engine.num_copies(index),
                    bytes_in_files=self._engine.bytes_in_files(index),
                )
            )
        return infos

    @property
    def streams(self) -> dict[str, torch.Stream]:
        """Our CUDA streams by name, for profilers and tests; empty on the host device.

        Work queued on them delays copies and kernels, and waiting for them waits for ours.

        Raises:
            StateError: During a forward, or after `remove`.
        """
        return dict(self._engine.streams)

    def report(self, console: Console | None = None) -> None:
        """Prints a table of the units and what was streamed; names units that never ran.

        Args:
            console: Where to print; standard output if None.

        Raises:
            StateError: After `remove`, or while another thread runs a forward.
        """
        (console or Console()).print(report_of(self))

    def record(self, *, times: bool = False) -> AbstractContextManager[_C.OpLog]:
        """Keeps the op log of the forwards in a block: every call to the device, in order.

        Each op has its stream, event, unit, onload generation and address range. With `times` it
        also has when the device began and ended it, for `timeline`; the end of the block then
        blocks until all is done.

        Raises:
            StateError: During a forward, after `remove`, or inside another such block.

        Example:
            >>> with handle.record(times=True) as log:  # doctest: +SKIP
            ...     model(**inputs)
            >>> handle.timeline("timeline.png")  # doctest: +SKIP
        """
        return self._recorder.record(times=times)

    def check(self) -> list[Finding]:
        """Whether the last recorded run could have gone wrong; see `torch_offload.check`.

        Raises:
            StateError: If there is none; shows the line to write.

        Example:
            >>> with handle.record():  # doctest: +SKIP
            ...     model(**inputs)
            >>> handle.check()  # doctest: +SKIP
            []
        """
        return check(self._recorder.last("check()", times=False))

    def trace(self, title: str = "") -> Trace:
        """The last recorded run as rows, bars and arrows, also after `remove`.

        Raises:
            StateError: If there is none with times; shows the line to write.
        """
        log = self._recorder.last("trace() and timeline()", times=True)
        return trace_of(log, title=title or self.config.mode, units=self._recorder.units)

    def timeline(self, path: str | Path | None = None, *, console: Console | None = None) -> None:
        """Draws the last recorded run: the CPU and every stream, copies, computes and waits.

        Like `check` and `trace` it needs no forward, and may be called after `remove`.

        Args:
            path: A file to write: ``.png``, ``.svg``, ``.pdf`` (by matplotlib), ``.json`` (for
                Perfetto) or ``.txt``. None prints to the terminal, as wide as it is.
            console: Where to print; standard output if None.

        Raises:
            StateError: If no run with times was recorded; shows the line to write.
            ValueError: For another suffix.
            ModuleNotFoundError: If a picture is asked for and matplotlib is missing.
            OSError: If the file cannot be written.
        """
        from torch_offload.timeline import check_suffix, text_of, write_timeline

        if path is not None:
            check_suffix(path)
            write_timeline([self.trace()], path)
            return
        console = console or Console()
        console.print(text_of([self.trace()], console.width))

    def profile(self) -> Profiler:
        """Measures the forwards in a block: where the time went, what bounds it, what would help.

        Timing events are recorded only inside the block, whose end blocks until all is done.

        Example:
            >>> with handle.profile() as p:  # doctest: +SKIP
            ...     model.generate(**inputs)
            >>> p.report()  # doctest: +SKIP

        Raises:
            StateError: At the start of the block, as `record`.
        """
        return Profiler(
            self._engine,
            self._recorder,
            self.config,
            self.device,
            self._installed.bytes_resident,
            self._keep_profile,
            self._installed.placed.packable,
        )

    def _keep_profile(self, profile: Profile) -> None:
        from torch_offload.measured_times import measured_times

        self._last_profile = profile
        if profile.sequence:
            self._installed.note_times(measured_times(profile))

    def _profiled(self) -> Profile | None:
        """The last profile, if it is of the units that there are now."""
        profile = self._last_profile
        if profile is None or [u.name for u in profile.units] != [u.name for u in self.units]:
            return None
        return profile

    def describe(self, unit: str | int) -> UnitDescription:
        """Says of one unit where it lives, when it was onloaded, and who shares its place.

        Args:
            unit: Its name, the end of it, or its position in `units`.

        Raises:
            ValueError: If no unit has that name, or several do.
            IndexError: If there is no such position.
            StateError: After `remove`, or while another thread runs a forward.
        """
        units = self.units
        names = tuple(unit.name for unit in units)
        timed = self._recorder.has_log and self._recorder.last("", times=False).has_times
        trace = self.trace() if timed else None
        return describe_unit(
            units,
            unit,
            device=str(self.device),
            is_whole=[self._engine.is_whole(index) for index in range(len(units))],
            overlaps=self._engine.plan.overlaps,
            trace=trace if trace is not None and trace.unit_names == names else None,
        )

    def replan(
        self,
        *,
        gpu_budget: int | float | str | None = KEEP,
        depth: int | str | None = KEEP,
        profile: Profile | None = KEEP,
    ) -> None:
        """Plans anew between two forwards: what changes its home moves, the rest stays.

        The results of later forwards have the same bits. Counts of single units begin anew. What
        units take packed is counted anew as well, so that those are packed again which an edit has
        made raw. An alias that you keep of a weight which moves (`detach()`, a numpy array) is a
        copy from then on, as after `Module.to`. Blocks while weights are copied.

        Args:
            gpu_budget: As in `offload`; as it is if not given.
            depth: Likewise.
            profile: Durations to plan by, from now on: of `profile()`, of these units. None goes by
                what is expected of a token and of a prompt. Not given: by the last profile of these
                units, if there is one.

        Raises:
            ValueError: For a budget below the least, which the message names; for a profile of
                other units.
            MemoryError: If host or device memory is missing. All is then as it was.
            StateError: During a forward, or after `remove`.

        Example:
            >>> handle.replan(gpu_budget="20GiB")  # doctest: +SKIP
            >>> with handle.profile() as p:  # doctest: +SKIP
            ...     model(**inputs)
            >>> handle.replan(profile=p.result)  # doctest: +SKIP
        """
        config = self.config
        if gpu_budget is not KEEP:
            config = replace(config, gpu_budget=gpu_budget)
        if depth is not KEEP:
            config = replace(config, depth=depth)
        model = self._model()
        if self._engine.is_closed or model is None:
            raise StateError(
                "expected replan() of an offloaded model, got it after remove(); call offload() "
                "again, with the options that you want now"
            )
        if self._engine.in_pass:
            raise StateError(
                "expected replan() between two forwards, got it while one is running; call it "
                "afterwards"
            )
        from torch_offload.measured_times import measured_times

        if profile is KEEP:
            profile = self._profiled()
        times = None if profile is None else measured_times(profile)
        self._installed.replan(model, config, times)
        self._last_profile = profile

    def explain(self, *, link: str | None = None) -> Explanation:
        """Says what is resident and why, what bounds a forward, and what more memory would change.

        Predicted by running plans in virtual time; with the measured durations of `profile` where
        one was taken, see `torch_offload.explanation`. Takes some tenths of a second.

        Args:
            link: Rate of copies to the device, as ``"25GB/s"``; what PCIe 5 reaches if not given.

        Raises:
            ValueError: For a rate of no meaning.
            StateError: After `remove`, or while another thread runs a forward.

        Example:
            >>> print(handle.explain())  # doctest: +SKIP
        """
        from torch_offload.explanation import explain

        if self._engine.is_closed:
            raise StateError("expected a live handle, got one after remove(); call offload() again")
        # As it is now: a unit that would not pack as well as was planned travels raw.
        placed = replace(self._installed.placed, plan=self._engine.plan)
        return explain(self, placed, self._profiled(), link)

    def refresh(self) -> None:
        """Reads all weights anew at their next use.

        Edits of weights between two forwards are noticed by themselves: in-place operations,
        optimizers, ``load_state_dict``, LoRA merges, replaced parameters. What may be missed is an
        edit of a part of a weight, up to a fifteenth of it, through ``.data`` or numpy, which moves
        no counter and may touch none of the 16 cache lines that are compared: call `refresh` after
        such an edit. See Note [Edits in the dark] in docs/correctness.md.

        Of weights that are streamed from checkpoint files it finds every edit, exactly; they go on
        from page-locked memory of their own. For them it blocks, about 2 ms for each GiB. With
        ``masters="packed"`` it finds every edit as well, and packs again what was unpacked.

        Raises:
            StateError: During a forward, or after `remove`.
        """
        self._engine.refresh()

    def remove(self) -> None:
        """Gives the plain model back: its weights in ordinary memory, on their former devices.

        The Parameter objects stay the same. Weights whose former device has no room for them any
        more stay on the CPU, and a warning names them. Blocks while copying. A second call does
        nothing.

        Raises:
            StateError: During a forward.
        """
        if self.is_removed:
            return
        model = self._model()
        if model is None:
            self._engine.close()
            return
        self._installed.undo(model)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        model = self._model()
        name = "a deleted model" if model is None else type(model).__name__
        if self.is_removed:
            return f"<torch_offload.Handle of {name}, removed>"
        start = f"<torch_offload.Handle of {name} on {self.device}: mode={self.config.mode!r}"
        try:
            streamed = [unit for unit in self.units if unit.place is not None]
            return (
                f"{start}, {len(streamed)} units of "
                f"{format_size(sum(unit.size_bytes for unit in streamed))} streamed through "
                f"{format_size(self._engine.window_bytes)}, "
                f"{format_size(self._installed.bytes_resident)} resident>"
            )
        except StateError:  # another thread runs a forward, or has removed it just now
            return f"{start}>"


def handle_of(model: nn.Module) -> Handle | None:
    """Returns the handle of an offloaded model, or None for a plain one.

    From a module around an offloaded model, as PEFT's, it is that model's. A part of an offloaded
    model has none.

    Raises:
        ValueError: If several models inside are offloaded.
    """
    own: Handle | None = vars(model).get(HANDLE_KEY)
    if own is not None:
        return own
    inside = [
        (name, found)
        for name, module in model.named_modules()
        if (found := vars(module).get(HANDLE_KEY)) is not None
    ]
    if len(inside) > 1:
        names = ", ".join(repr(name) for name, _ in inside)
        raise ValueError(
            f"expected one offloaded model in the {type(model).__name__}, got {len(inside)}: "
            f"{names}; ask for the handle of one of them, as handle_of(model.get_submodule("
            f"{inside[0][0]!r}))"
        )
    return inside[0][1] if inside else None
