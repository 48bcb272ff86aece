"""``granularity="module"``: from sublayers to leaves, once a pass has shown which are sound.

Some leaves are read without being called: a Mamba's ``conv1d``, a router, fused experts. So the
first pass streams sublayers and is traced; then the units are cut anew, within the same window,
into those leaves of torch's own classes whose every read was inside their own call. Should a later
pass read one outside all the same, that forward raises, and the leaf joins its sublayer again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from torch_offload.cut_names import UnitNames, specs_of
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
        self._sublayers = [UnitNames.of(spec) for spec in sublayers]
        self._apply = weakref.WeakMethod(apply)
        self._proven: set[str] = set()
        self._called: set[str] = set()
        self._traced_passes = 0
        self._is_cut = False
        #: Whether a pass needs nothing of this: the usual case, looked at in every wrapped call.
        self.is_settled = False

    @contextmanager
    def observed_pass(self) -> Iterator[None]:
        """Runs the outermost call of a pass that is not settled, and cuts after it."""
        model = self._model()
        if model is None:
            yield
            return
        self.is_settled = True  # for the calls inside this one
        try:
            if self._is_cut:
                self._cut(model)  # a leaf was distrusted in the last pass
                yield
                return
            with trace_reads(model) as trace:
                yield
        except BaseException:
            self.is_settled = self._is_cut
            raise
        self._proven |= trace.proven_leaves()
        self._called |= {name for name, count in trace.calls.items() if count}
        self._traced_passes += 1
        unseen = [unit.name for unit in self._sublayers if unit.name not in self._called]
        if unseen and self._traced_passes < _MOST_TRACED_PASSES:
            self.is_settled = False
        else:
            self._cut(model)

    def distrust(self, parameters: Sequence[str]) -> None:
        """Lets the leaves of these parameters join their sublayers before the next pass."""
        leaves = {name.rpartition(".")[0] for name in parameters} & self._proven
        if self._is_cut and leaves:
            self._proven -= leaves
            self.is_settled = False

    def _cut(self, model: nn.Module) -> None:
        sublayers = specs_of(model, self._sublayers)
        apply = self._apply()
        if apply is not None:
            apply(model, leaf_units(model, sublayers, self._proven))
            self._is_cut = True
