"""A cut that may be kept without keeping a module alive.

Modules and weights are held weakly and where they are, not by name: an adapter that is put around a
module afterwards changes the names of all that is below it. The units keep the names they had.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from torch_offload._C import StateError
from torch_offload.planning import Cut
from torch_offload.structure import Kind
from torch_offload.tables import Outsiders, Table
from torch_offload.units import Granularity, UnitSpec

_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True)
class KeptParameter:
    """One weight: its name, and where it is looked up."""

    name: str
    owner: weakref.ref[nn.Module]
    key: str


@dataclass(frozen=True)
class KeptUnit:
    """One unit."""

    name: str
    module: weakref.ref[nn.Module]
    layer_index: int
    kind: Kind
    parameters: tuple[KeptParameter, ...]

    @staticmethod
    def of(spec: UnitSpec) -> KeptUnit:
        """Of a unit."""
        slots: dict[int, tuple[weakref.ref[nn.Module], str]] = {}
        for module in spec.module.modules():
            for key, parameter in module._parameters.items():
                slots.setdefault(id(parameter), (weakref.ref(module), key))
        return KeptUnit(
            spec.name,
            weakref.ref(spec.module),
            spec.layer_index,
            spec.kind,
            tuple(KeptParameter(name, *slots[id(weight)]) for name, weight in spec.parameters),
        )


def specs_of(model: nn.Module, units: Sequence[KeptUnit]) -> tuple[UnitSpec, ...]:
    """The units, with what their weights are by now.

    Raises:
        StateError: If a module or a weight is not in the model any more.
    """
    present = _modules_of(model)
    return tuple(
        UnitSpec(
            unit.name,
            _found(unit.module, unit.name, present),
            unit.layer_index,
            unit.kind,
            tuple(
                (kept.name, _weight(_found(kept.owner, kept.name, present), kept.key, kept.name))
                for kept in unit.parameters
            ),
        )
        for unit in units
    )


def _modules_of(model: nn.Module) -> set[int]:
    return {id(module) for module in model.modules()}


def _found(reference: weakref.ref[_Module], name: str, present: Collection[int]) -> _Module:
    module = reference()
    if module is None or id(module) not in present:
        raise _missing(name)
    return module


def _weight(owner: nn.Module, key: str, name: str) -> nn.Parameter:
    weight = owner._parameters.get(key)
    if weight is None:
        raise _missing(name)
    return weight


def _missing(name: str) -> StateError:
    return StateError(
        f"expected {name!r} in the model, as it was at offload(), got a model that it was taken "
        "out of; to go on with other modules call handle.remove() and offload() again"
    )


@dataclass(frozen=True)
class KeptTable:
    """One table: its name, its embeddings by their names, and the unit that reads it as well."""

    name: str
    modules: tuple[tuple[str, weakref.ref[nn.Embedding]], ...]
    head: str

    @staticmethod
    def of(table: Table) -> KeptTable:
        """Of a table."""
        return KeptTable(
            table.name,
            tuple((name, weakref.ref(module)) for name, module in table.modules),
            table.head,
        )

    def find(self, present: Collection[int]) -> Table:
        """The table, with what its weight is by now; raises as `specs_of`."""
        embeddings = tuple((name, _found(kept, name, present)) for name, kept in self.modules)
        weight = _weight(embeddings[0][1], "weight", self.name)
        return Table(self.name, weight, embeddings, self.head)


@dataclass(frozen=True)
class KeptCut:
    """A whole cut."""

    specs: tuple[KeptUnit, ...]
    heads: tuple[KeptUnit, ...]
    tables: tuple[KeptTable, ...]
    granularity: Granularity

    @staticmethod
    def of(cut: Cut) -> KeptCut:
        """Of a cut."""
        return KeptCut(
            tuple(map(KeptUnit.of, cut.specs)),
            tuple(map(KeptUnit.of, cut.outsiders.heads)),
            tuple(map(KeptTable.of, cut.outsiders.tables)),
            cut.granularity,
        )

    def find(self, model: nn.Module) -> Cut:
        """The cut, in the model that it was made of, whatever was put around its modules since.

        Raises:
            StateError: If a module or a weight is not in the model any more.
        """
        present = _modules_of(model)
        return Cut(
            model,
            specs_of(model, self.specs),
            Outsiders(
                specs_of(model, self.heads), tuple(table.find(present) for table in self.tables)
            ),
            self.granularity,
        )
