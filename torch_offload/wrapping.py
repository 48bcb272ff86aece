"""What stands around the modules of an offloaded model: wrapped calls, guards, answers."""

from __future__ import annotations

import weakref

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from torch_offload import _C
from torch_offload.adapting import Adaptation
from torch_offload.calls import unwrap, wrap_ancestor, wrap_unit
from torch_offload.execution_device import answer_device, give_class_back
from torch_offload.gathering import gather_rows, stop_gathering
from torch_offload.guards import Probes, guard, guard_resident, unguard
from torch_offload.idle import IdleUnits
from torch_offload.leaves import LeafCut
from torch_offload.mismatch import MismatchExplainer
from torch_offload.module_tree import modules_above
from torch_offload.planning import Planned, streamed_units

# transformers compiles the forward by itself for static caches; it asks this method before.
_AUTO_COMPILE = "_valid_auto_compile_criteria"


class Wrapping:
    """Wraps and guards the modules of one model, and lets go of them again.

    Lifetime: holds modules weakly, and not the owner of what it hands to the wrappers. Each module
    is noted before anything is put on it: an interrupt in between leaves nothing behind.

    Args:
        engine: Of the model.
        device: Where it runs.
        leaf_cut: What decides about leaves, if units are to be cut into them.
        adaptation: Told of the outermost calls.
        table_views: Of tables whose rows are gathered from a checkpoint file, by name.
        names_ranges: Whether NVTX ranges surround the calls of units.
        finds_edits: Whether edits are looked for before weights are saved: those of weights that
            lie in files may have been missed.
    """

    def __init__(
        self,
        engine: _C.Engine,
        device: torch.device,
        leaf_cut: LeafCut | None,
        adaptation: Adaptation,
        table_views: dict[str, _C.FileView],
        *,
        names_ranges: bool,
        finds_edits: bool,
    ) -> None:
        self._engine = engine
        self._device = device
        self._leaf_cut = leaf_cut
        self._adaptation = adaptation
        self._table_views = table_views
        self._names_ranges = names_ranges
        self._finds_edits = finds_edits
        self._idle_units = IdleUnits()
        self._wrapped: list[weakref.ref[nn.Module]] = []
        self._guarded: list[weakref.ref[nn.Module]] = []
        self._save_hook: RemovableHandle | None = None

    def wrap(self, model: nn.Module, planned: Planned) -> None:
        """Wraps the call of each streamed unit, of each table, and of all that is above one."""
        streamed = streamed_units(planned)
        explainer = MismatchExplainer(
            self._device,
            ((*named, spec.module) for _, spec in streamed for named in spec.parameters),
            self._leaf_cut.distrust if self._leaf_cut else lambda names: None,
        )
        self._answer_device(model, planned)
        for index, spec in streamed:
            self._wrapped.append(weakref.ref(spec.module))
            wrap_unit(spec.module, self._engine, index, spec.name if self._names_ranges else None)
        embeddings = []
        for table in planned.tables:
            for _, embedding in table.modules:
                embeddings.append(embedding)
                self._wrapped.append(weakref.ref(embedding))
                view = self._table_views.get(table.name)
                gather_rows(embedding, table.name, self._device, view)
        # Above a unit that stays as well: it may be given back when memory runs out.
        inner = {id(spec.module) for spec in planned.specs} | set(map(id, embeddings))
        for module in modules_above(model, inner):
            self._wrapped.append(weakref.ref(module))
            idle_units = self._idle_units if module is model else None
            wrap_ancestor(
                module, self._engine, explainer, self._leaf_cut, idle_units, self._adaptation
            )
        self._guard(model, planned)

    def unwrap(self, model: nn.Module) -> None:
        """Undoes `wrap`, from whatever point was reached; does nothing a second time."""
        for reference in self._wrapped:
            if (module := reference()) is not None:
                unwrap(module)
                stop_gathering(module)
                give_class_back(module)
        self._wrapped.clear()
        if self._save_hook is not None:
            self._save_hook.remove()
            self._save_hook = None
        for reference in self._guarded:
            if (module := reference()) is not None:
                unguard(module)
        self._guarded.clear()
        vars(model).pop(_AUTO_COMPILE, None)

    def _answer_device(self, model: nn.Module, planned: Planned) -> None:
        """Keeps ``model.device`` what it is without us, where a table is the first parameter."""
        tables = {id(table.weight) for table in planned.tables}
        for module in model.modules():
            first = next(module.parameters(), None)
            if first is not None and id(first) in tables:
                self._wrapped.append(weakref.ref(module))
                answer_device(module, self._device)

    def _guard(self, model: nn.Module, planned: Planned) -> None:
        """Guards every module with weights or buffers below it.

        Where weights are, or may come to be, elsewhere, against more than where all of them stay.
        """
        away = {id(parameter) for spec in planned.specs for _, parameter in spec.parameters}
        away |= {id(table.weight) for table in planned.tables}
        probes = Probes(self._device)
        holders = {
            id(module)
            for module in model.modules()
            if any(id(parameter) in away for parameter in module._parameters.values())
        }
        for module in model.modules():
            self._guarded.append(weakref.ref(module))
            if any(id(inner) in holders for inner in module.modules()):
                guard(module, probes.of(module), self._engine)
            elif kinds := probes.of(module):
                guard_resident(module, kinds)
        if hasattr(model, _AUTO_COMPILE):
            vars(model)[_AUTO_COMPILE] = _never
        if self._finds_edits:
            self._save_hook = model.register_state_dict_pre_hook(  # type: ignore[no-untyped-call]
                self._before_saving
            )

    def _before_saving(self, *args: object) -> None:
        """What is saved is what the next forward computes with: no edit has been missed."""
        if not self._engine.is_closed and not self._engine.in_pass:
            self._engine.find_edits()


def _never(*args: object, **kwargs: object) -> bool:
    return False
