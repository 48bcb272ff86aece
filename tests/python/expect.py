"""An oracle for what an offloaded model must copy, to the byte.

It knows the sequence of unit calls of each pass (observed from outside our wrappers), the places of
the plan, and four sentences, which are all of its independence from the C++ pipeline:

* A unit must be copied before a call unless its bytes are still whole in its place.
* A copy overwrites every unit whose place overlaps.
* `sync` and `streams` copy nothing that was not asked for; `events` copies within the layer in use;
  `pipeline` goes on into the next pass, until `depth` bytes are ahead or a place is taken; units
  that stay packed on the device, and are decoded rather than copied, have a depth of their own.
* A pass is expected to repeat the last completed one that began with the same unit. A pass like the
  one before it is expected to come again, another to be followed by what followed it last time.
  Before the first pass, the planned order is expected.

Where a pass goes the expected way these give one number. Where it does not, a guess may have been
copied in vain, and the oracle gives the least number.

Usage::

    with expect.watch(handle) as calls:
        model(**inputs)
        model(**inputs)
    expect.assert_streams_exactly(calls)

The first `watch` of a handle must begin before its first forward, and forwards must not run
unwatched in between: the expected order is learned from all of them. With ``granularity="module"``
the first forward, which is traced and after which the units are cut anew, must not be watched.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from torch_offload.counts import OffloadStats
from torch_offload.handle import Handle
from torch_offload.packed_parameter import PackedParameter

_WRAPPER = "_call_impl"


@dataclass
class Pass:
    """One pass: from the outermost wrapped call to its return.

    Attributes:
        units: Units that were called, in order, as indices into ``handle.units``.
        whole_before: Units that were whole in their places when it began.
        copied_in_vain: Units that, once copied ahead, must be copied again.
        in_vain_if_evicted: Units of which that holds once another one has taken their place, where
            their former bytes still are.
        is_edited: Whether masters were edited since the last pass.
        before: Counters when it began.
        after: Counters when it had ended.
        completed: Whether it returned, rather than raised.
    """

    units: list[int]
    whole_before: frozenset[int]
    copied_in_vain: frozenset[int]
    in_vain_if_evicted: frozenset[int]
    is_edited: bool
    before: OffloadStats
    after: OffloadStats | None = None
    completed: bool = False

    @property
    def onloads(self) -> int:
        """Copies that were issued in this pass."""
        assert self.after is not None
        return self.after.onloads - self.before.onloads

    @property
    def bytes_onloaded(self) -> int:
        """Bytes of those."""
        assert self.after is not None
        return self.after.bytes_onloaded - self.before.bytes_onloaded

    @property
    def misses(self) -> int:
        """Units of this pass that nobody had prefetched."""
        assert self.after is not None
        return self.after.misses - self.before.misses


@dataclass
class Expected:
    """What a pass must copy.

    Attributes:
        onloads: Number of copies.
        bytes_onloaded: Bytes of those, padding between parameters included.
        is_exact: Whether it must be just that; else at least that.
        is_repeat: Whether the pass went as was expected before it began, and the one before it
            ended as expected, so that its last units knew what to copy ahead; and nothing was
            edited since.
        goes_as_known: Whether the pass went the way that its first unit foretells.
    """

    onloads: int
    bytes_onloaded: int
    is_exact: bool
    is_repeat: bool
    goes_as_known: bool


@dataclass
class _Learned:
    """The order that completed passes have taught so far."""

    names: list[str]
    planned: list[int]
    sequences: dict[int, list[int]] = field(default_factory=dict)
    follower: dict[int, int] = field(default_factory=dict)
    last_first: int | None = None
    last_is_repeat: bool = False
    last_was_known: bool = False

    def after(self, sequence: list[int], is_repeat: bool) -> list[int]:
        """The pass expected after one like `sequence`, which was or was not like the one before."""
        if not sequence or is_repeat:
            return sequence
        first = self.follower.get(sequence[0], sequence[0])
        return self.sequences.get(first, sequence)

    def next_pass(self) -> list[int]:
        if self.last_first is None:
            return self.planned
        return self.after(self.sequences[self.last_first], self.last_is_repeat)

    def endless(self, units: list[int]) -> Iterator[int]:
        """What is expected after a pass that is about to end, whose own lesson is not learned."""
        sequence, is_repeat = units, units[0] == self.last_first
        while True:
            following = self.after(sequence, is_repeat)
            is_repeat = following == sequence
            sequence = following
            yield from sequence

    def learn(self, units: list[int], completed: bool, was_known: bool) -> None:
        self.last_was_known = completed and was_known
        if not units or not completed:
            return
        if self.last_first is not None and not self.last_is_repeat:
            self.follower[self.last_first] = units[0]
        self.last_is_repeat = units[0] == self.last_first
        self.last_first = units[0]
        self.sequences[units[0]] = list(units)


@dataclass
class Calls:
    """What `watch` has observed.

    Attributes:
        handle: Of the offloaded model.
        passes: In the order in which they began.
        expected: What each of them must copy.
        stale: Units whose edited masters no pass has asked for yet: what the next `watch` is told.
        replaced: Those of them in which a Parameter or its data was replaced.
    """

    handle: Handle
    passes: list[Pass] = field(default_factory=list)
    expected: list[Expected] = field(default_factory=list)
    stale: set[str] = field(default_factory=set)
    replaced: set[str] = field(default_factory=set)

    @property
    def exact(self) -> list[tuple[Pass, Expected]]:
        """The passes of which the oracle knows the exact number."""
        return [
            (one, expected)
            for one, expected in zip(self.passes, self.expected, strict=True)
            if expected.is_exact
        ]


_learned: weakref.WeakKeyDictionary[Handle, _Learned] = weakref.WeakKeyDictionary()


@contextmanager
def watch(
    handle: Handle, *, stale: Collection[str] = (), replaced: Collection[str] = ()
) -> Iterator[Calls]:
    """Observes passes: which units are called, and what is copied.

    Also asserts that while a unit runs, each of its streamed parameters lies in its place.

    Args:
        handle: Of the offloaded model.
        stale: Names of units whose masters were edited since the last pass: what lies in their
            places is no longer whole, and is missed.
        replaced: Names of units in which a Parameter or its data was replaced. That is noticed when
            the unit is asked for, so a copy that ran ahead in that same pass was in vain.
    """
    model = handle.model
    assert model is not None, "the model is gone"
    units = handle.units
    streamed = {unit.name: index for index, unit in enumerate(units) if unit.place is not None}
    assert streamed, "nothing is streamed"
    if handle not in _learned or _learned[handle].names != list(streamed):
        # New, or cut anew into other units, which begins with the planned order again.
        used = [unit.name for unit in units if unit.acquired]
        assert not (used and handle.stats.forwards), (
            f"watch a handle from its first forward on; {used} were used before"
        )
        _learned[handle] = _Learned(list(streamed), sorted(streamed.values()))
    observer = _Observer(
        handle,
        stale={streamed[name] for name in (*stale, *replaced)},
        replaced={streamed[name] for name in replaced},
    )
    wrapped = [
        (module, vars(module)[_WRAPPER], streamed.get(name))
        for name, module in model.named_modules()
        if _WRAPPER in vars(module)
    ]
    assert {index for _, _, index in wrapped if index is not None} == set(streamed.values()), (
        "some streamed units have no wrapper"
    )
    try:
        for module, wrapper, index in wrapped:
            vars(module)[_WRAPPER] = observer.around_call(wrapper, index)
            if index is not None:
                names = units[index].parameters
                parameters = [model.get_parameter(name) for name in names]
                vars(module)["forward"] = observer.around_forward(module.forward, index, parameters)
        yield observer.calls
    finally:
        for module, wrapper, index in wrapped:
            vars(module)[_WRAPPER] = wrapper
            if index is not None:
                del vars(module)["forward"]


class _Observer:
    def __init__(self, handle: Handle, stale: set[int], replaced: set[int]) -> None:
        self.calls = Calls(handle)
        self._handle = handle
        self._stale = stale
        self._replaced = replaced
        self._nesting = 0
        self._running: Pass | None = None
        self._onloads_before: list[int] = []

    def around_call(self, wrapper: Callable[..., Any], unit: int | None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._nesting == 0:
                self._begin()
            assert self._running is not None
            self._nesting += 1
            completed = False
            if unit is not None:
                self._running.units.append(unit)
            try:
                result = wrapper(*args, **kwargs)
                completed = True
                return result
            finally:
                self._nesting -= 1
                if self._nesting == 0:
                    self._end(completed)

        return call

    def around_forward(
        self, forward: Callable[..., Any], unit: int, parameters: Sequence[nn.Parameter]
    ) -> Callable[..., Any]:
        window_begin, _ = self._handle._engine.window
        place = self._handle.units[unit].place
        assert place is not None

        @functools.wraps(forward)
        def checked(*args: Any, **kwargs: Any) -> Any:
            offsets = [parameter.data_ptr() - window_begin for parameter in parameters]
            assert self._handle.stats.extra_places or all(
                place[0] <= offset < place[1] for offset in offsets
            ), f"{self._handle.units[unit].name} runs with parameters outside its place"
            return forward(*args, **kwargs)

        return checked

    def _begin(self) -> None:
        engine = self._handle._engine
        streamed = [i for i, unit in enumerate(self._handle.units) if unit.place is not None]
        whole = {index for index in streamed if engine.is_whole(index)}
        self._running = Pass(
            units=[],
            whole_before=frozenset(whole - self._stale),
            copied_in_vain=frozenset(self._replaced - whole),
            in_vain_if_evicted=frozenset(self._replaced & whole),
            is_edited=bool(self._stale),
            before=self._handle.stats,
        )
        self._onloads_before = [unit.onloads for unit in self._handle.units]
        self.calls.passes.append(self._running)

    def _end(self, completed: bool) -> None:
        running, self._running = self._running, None
        assert running is not None
        running.after = self._handle.stats
        # An edit counts until its unit is asked for, or, in place, copied since.
        copied = {
            index
            for index, unit in enumerate(self._handle.units)
            if unit.onloads > self._onloads_before[index]
        }
        self._replaced -= set(running.units)
        self._stale -= set(running.units) | (copied - self._replaced)
        units = self._handle.units
        self.calls.stale = {units[index].name for index in self._stale}
        self.calls.replaced = {units[index].name for index in self._replaced}
        running.completed = completed
        learned = _learned[self._handle]
        expected = _expected(self._handle, learned, running)
        self.calls.expected.append(expected)
        learned.learn(running.units, completed, expected.goes_as_known)


def _expected(handle: Handle, learned: _Learned, one: Pass) -> Expected:
    predicted = learned.next_pass()
    first = one.units[0] if one.units else None
    # A pass that begins with another unit than expected is recognized by it.
    recognized = learned.sequences.get(first) if first is not None else None
    goes_as_known = one.units in (predicted, recognized)
    window = _Window(handle, one.whole_before)
    for unit in one.units:
        window.demand(unit)
    if one.completed and goes_as_known and one.units:
        # Each unit was foretold while the one before it was in use. In another pass it may not have
        # been, so a copy in vain is no part of the least number.
        seen = set(one.units[:1])
        for before, unit in pairwise(one.units):
            in_vain = unit in one.copied_in_vain or (
                unit in one.in_vain_if_evicted
                and any(window.overlap(unit, other) for other in seen)
            )
            if unit not in seen and in_vain and window.runs_ahead(before, unit):
                window.copy_again(unit)
            seen.add(unit)
        window.run_ahead(one.units[-1], learned.endless(one.units))
    demands_only = handle.config.mode in ("sync", "streams")
    return Expected(
        onloads=window.onloads,
        bytes_onloaded=window.bytes_onloaded,
        is_exact=demands_only or (one.completed and goes_as_known),
        is_repeat=one.units == predicted and learned.last_was_known and not one.is_edited,
        goes_as_known=goes_as_known,
    )


class _Window:
    """Which units are whole in their places, and what it took."""

    def __init__(self, handle: Handle, whole: frozenset[int]) -> None:
        units = handle.units
        self._mode = handle.config.mode
        plan = handle._engine.plan
        # Those that stay packed on the device are brought ahead for themselves, unless all units
        # come in the order of their use.
        self._lanes = [unit.transport == "packed_resident" and not plan.one_ring for unit in units]
        self._depths = (plan.depth_bytes, plan.decode_depth_bytes)
        self._sizes = [unit.size_bytes for unit in units]
        self._layers = [unit.layer_index for unit in units]
        self._places = [unit.place for unit in units]
        self._whole = set(whole)
        self.onloads = 0
        self.bytes_onloaded = 0

    def overlap(self, one: int, other: int) -> bool:
        """Whether they share bytes of the window."""
        a, b = self._places[one], self._places[other]
        return a is not None and b is not None and a[0] < b[1] and b[0] < a[1]

    def demand(self, unit: int) -> None:
        if unit not in self._whole:
            self._whole = {other for other in self._whole if not self.overlap(unit, other)}
            self._whole.add(unit)
            self.onloads += 1
            self.bytes_onloaded += self._sizes[unit]

    def runs_ahead(self, before: int, unit: int) -> bool:
        """Whether `unit` is copied while `before`, the one in front of it, is in use."""
        return self._mode == "pipeline" or (
            self._mode == "events" and self._layers[before] == self._layers[unit]
        )

    def copy_again(self, unit: int) -> None:
        """Counts a copy that ran ahead in vain."""
        self.onloads += 1
        self.bytes_onloaded += self._sizes[unit]

    def run_ahead(self, last: int, following: Iterator[int]) -> None:
        """Copies ahead after the last unit of a pass, which is no longer in use."""
        if self._mode in ("sync", "streams"):
            return
        ahead: list[int] = []
        ahead_bytes, is_over = [0, 0], [False, False]
        for _ in range(len(self._sizes)):
            unit = next(following)
            if self._mode == "events" and self._layers[unit] != self._layers[last]:
                return
            lane = self._lanes[unit]
            is_first = ahead_bytes[lane] == 0
            ahead_bytes[lane] += self._sizes[unit]
            taken = any(other != unit and self.overlap(unit, other) for other in ahead)
            is_over[lane] |= not is_first and ahead_bytes[lane] > self._depths[lane]
            is_over[lane] |= unit not in self._whole and taken
            if not is_over[lane]:
                self.demand(unit)
                ahead.append(unit)


def assert_copies(calls: Calls) -> None:
    """Asserts that each pass has copied just what it must, as far as the oracle knows it.

    Of a pass that it does not know exactly, that it has copied so much at least.
    """
    assert calls.passes, "no pass was observed"
    mode = calls.handle.config.mode
    for number, (one, expected) in enumerate(zip(calls.passes, calls.expected, strict=True)):
        got = (one.onloads, one.bytes_onloaded)
        must = (expected.onloads, expected.bytes_onloaded)
        what = f"pass {number} of units {one.units}: (onloads, bytes) {got}, expected {must}"
        if expected.is_exact:
            assert got == must, what
        else:
            assert got >= must, f"{what} at least"
        if mode == "pipeline" and expected.is_repeat:
            assert one.misses == 0, f"{what}; {one.misses} misses in a pass that repeats the last"


def assert_streams_exactly(calls: Calls, *, exact_passes: int | None = None) -> None:
    """Asserts that each pass has copied just what it must, and met no miss where it repeats.

    Args:
        calls: What `watch` has observed.
        exact_passes: How many passes the oracle must know exactly; None asks for all but the first
            of a run of passes that begin with the same unit, and for one at least.
    """
    assert_copies(calls)
    exact = len(calls.exact)
    if exact_passes is not None:
        assert exact == exact_passes, f"{exact} of {len(calls.passes)} passes are known exactly"
    assert exact, "no pass went as expected, so nothing exact is known; run the sequence again"


def assert_at_rest(handle: Handle) -> None:
    """Asserts that no streamed parameter lies in the window: each shows its master, on the CPU."""
    model = handle.model
    assert model is not None
    begin, end = handle._engine.window
    assert not handle._engine.in_pass
    for unit in handle.units:
        if unit.place is None:
            continue
        for name in unit.parameters:
            parameter = model.get_parameter(name)
            assert parameter.device.type == "cpu", (
                f"{name} is not at rest but on {parameter.device}"
            )
            if isinstance(parameter, PackedParameter):
                continue  # which has no memory
            assert not begin <= parameter.data_ptr() < end, f"{name} was left on its place"


def num_streamed(handle: Handle) -> int:
    """How many units stream: a head may be a unit that stays."""
    return sum(unit.place is not None for unit in handle.units)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that `offload` and a failed one must leave or give back."""
    return {
        "vars": {name: dict(vars(module)) for name, module in model.named_modules()},
        "parameters": {
            name: (parameter, parameter.device, parameter.data_ptr(), parameter.detach().clone())
            for name, parameter in model.named_parameters(remove_duplicate=False)
        },
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any], *, same_memory: bool = True) -> None:
    """Asserts that a model is what it was at `snapshot`.

    Args:
        model: The model.
        before: From `snapshot`.
        same_memory: Whether parameters must lie where they lay, as after a refusal, or may have
            come to lie elsewhere on the same device, as after `remove`.
    """
    modules = dict(model.named_modules())
    assert list(modules) == list(before["vars"]), "modules have come or gone"
    for name, module in modules.items():
        was = before["vars"][name]
        now = vars(module)
        assert list(now) == list(was), f"{name}: attributes changed: {set(now) ^ set(was)}"
        for key, value in was.items():
            is_equal_list = isinstance(value, list) and now[key] == value  # export copies lists
            assert now[key] is value or is_equal_list, f"{name}.{key} is another object"
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert list(parameters) == list(before["parameters"])
    for name, (was, where, address, values) in before["parameters"].items():
        now = parameters[name]
        assert now is was, f"{name} is another Parameter"
        assert now.device == where, f"{name} is on {now.device}, was on {where}"
        assert not same_memory or now.data_ptr() == address, f"{name} lies elsewhere"
        assert torch.equal(now.detach(), values), f"{name} has other values"
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before["buffers"][name]), f"buffer {name} has other values"
