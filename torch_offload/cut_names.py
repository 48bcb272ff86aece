"""A cut by names: what may be kept without keeping a module alive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from torch_offload.planning import Cut
from torch_offload.structure import Kind
from torch_offload.tables import Outsiders, Table
from torch_offload.units import Granularity, UnitSpec


@dataclass(frozen=True)
class UnitNames:
    """One unit by its names."""

    name: str
    layer_index: int
    kind: Kind
    parameters: tuple[str, ...]

    @staticmethod
    def of(spec: UnitSpec) -> UnitNames:
        """Of a unit."""
        return UnitNames(
            spec.name, spec.layer_index, spec.kind, tuple(name for name, _ in spec.parameters)
        )


def specs_of(model: nn.Module, units: Sequence[UnitNames]) -> tuple[UnitSpec, ...]:
    """The units of a model that have these names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return tuple(
        UnitSpec(
            unit.name,
            model.get_submodule(unit.name),
            unit.layer_index,
            unit.kind,
            tuple((name, parameters[name]) for name in unit.parameters),
        )
        for unit in units
    )


@dataclass(frozen=True)
class CutNames:
    """A whole cut by its names."""

    specs: tuple[UnitNames, ...]
    heads: tuple[UnitNames, ...]
    tables: tuple[tuple[str, tuple[str, ...], str], ...]
    granularity: Granularity

    @staticmethod
    def of(cut: Cut) -> CutNames:
        """Of a cut."""
        return CutNames(
            tuple(map(UnitNames.of, cut.specs)),
            tuple(map(UnitNames.of, cut.outsiders.heads)),
            tuple(
                (table.name, tuple(name for name, _ in table.modules), table.head)
                for table in cut.outsiders.tables
            ),
            cut.granularity,
        )

    def find(self, model: nn.Module) -> Cut:
        """The cut, in the model that it was made of."""
        return Cut(
            model,
            specs_of(model, self.specs),
            Outsiders(specs_of(model, self.heads), tuple(self._tables(model))),
            self.granularity,
        )

    def _tables(self, model: nn.Module) -> list[Table]:
        tables = []
        for name, modules, head in self.tables:
            embeddings: list[tuple[str, nn.Embedding]] = []
            for module_name in modules:
                module = model.get_submodule(module_name)
                assert isinstance(module, nn.Embedding)
                embeddings.append((module_name, module))
            weight = embeddings[0][1]._parameters["weight"]
            assert weight is not None
            tables.append(Table(name, weight, tuple(embeddings), head))
        return tables
