"""``granularity="module"``: from sublayers to leaves, once passes have shown which are sound.

Some leaves are read without being called: a Mamba's ``conv1d``, a router, fused experts. So the
first passes stream sublayers and are traced, until every sublayer has run, or four times; then the
units are cut anew, within the same window, into those leaves of torch's own classes whose every
read was inside their own call. Should a later pass read one outside all the same, that forward
raises, and the leaf joins its sublayer again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from torch_offload._C import StateError
from torch_offload.debugging import LOGGER
from torch_offload.kept_cut import KeptUnit, specs_of
from torch_offload.reads import trace_reads
from torch_offload.units import UnitSpec, leaf_units

# An encoder's pass shows nothing of the decoder; but a part that never runs must not keep the
# tracer on for ever.
_MOST_TRACED_PASSES = 4


class LeafCut:
    """Decides when the units are cut anew, and into what.

    Holds no module, and not the owner of `apply`, which holds this: a cycle would keep the arena
    alive after ``del`` until a collection.
    """

    def __init__(
        self,
        model: nn.Module,
        sublayers: Sequence[UnitSpec],
        apply: Callable[[nn.Module, list[UnitSpec]], None],
    ) -> None:
        self._model = weakref.ref(model)
        self._sublayers = [KeptUnit.of(spec) for spec in sublayers]
        self._apply = weakref.WeakMethod(apply)
        self._proven: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._called: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._units: dict[str, weakref.ref[nn.Module]] = {}  # once cut, by name of their weights
        self._traced_passes = 0
        self._is_observing = threading.Lock()
        self._is_cut = False
        #: Whether a pass needs nothing of this: the usual case, looked at in every wrapped call.
        self.is_settled = False
        #: Whether the pass that is about to begin is to run in a `traced_pass`.
        self.is_to_be_traced = False

    @contextmanager
    def observed_pass(self) -> Iterator[None]:
        """Runs the outermost call of a pass that is not settled, and cuts after it."""
        model = self._model()
        # Of two threads that call the model at once only one has the pass.
        if model is None or not self._is_observing.acquire(blocking=False):
            yield
            return
        try:
            if self._is_cut:
                self._cut(model)  # a leaf was distrusted in the last pass
                yield
                return
            self.is_settled = self.is_to_be_traced = True  # settled for the calls inside this one
            try:
                yield
            finally:
                self.is_settled = self.is_to_be_traced = False
            is_seen = all(unit.module() in self._called for unit in self._sublayers)
            if is_seen or self._traced_passes >= _MOST_TRACED_PASSES:
                self._cut(model)
        finally:
            self._is_observing.release()

    @contextmanager
    def traced_pass(self) -> Iterator[None]:
        """Traces a pass, and nothing around it: a plan that changes there reads every weight."""
        self.is_to_be_traced = False
        model = self._model()
        assert model is not None  # it is being called
        with trace_reads(model) as trace:
            yield
        self._proven.update(trace.modules(trace.proven_leaves()))
        self._called.update(trace.modules(trace.calls))
        self._traced_passes += 1

    def distrust(self, parameters: Sequence[str]) -> None:
        """Lets the leaves of these parameters join their sublayers before the next pass."""
        units = {self._units[name]() for name in parameters if name in self._units}
        leaves = units & set(self._proven)
        if leaves:
            self._proven.difference_update(leaves)
            self.is_settled = False

    def _cut(self, model: nn.Module) -> None:
        """Cuts the units anew; after a later pass if another thread's has begun already."""
        try:
            sublayers = specs_of(model, self._sublayers)
        except StateError as error:  # nor would it work out later
            LOGGER.warning("the units stay as they are: %s", error)
            self.is_settled = True
            return
        names = {name for name, module in model.named_modules() if module in self._proven}
        units = leaf_units(model, sublayers, names)
        apply = self._apply()
        if apply is None:
            return
        try:
            apply(model, units)
        except StateError as error:
            LOGGER.info("kept the plan: %s", error)
            return
        self._is_cut = self.is_settled = True
        self._units = {
            name: weakref.ref(unit.module) for unit in units for name, _ in unit.parameters
        }
