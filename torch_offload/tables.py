"""Large tables and heads outside of the layers: of a vocabulary of 128k tokens they are gigabytes.

When the budget asks for it, the output head streams as a unit like any other, and the input
embedding stays on the host: its rows are gathered there and only those are copied. A tied table is
one master with two readers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from torch_offload.gathering import hands_indices_on
from torch_offload.residency import is_dense, overlapping
from torch_offload.selection import select_resident
from torch_offload.units import UnitSpec

# A table or head below this part of the largest unit is nothing large.
_LEAST_SHARE = 0.1


@dataclass(frozen=True)
class Table:
    """An embedding whose rows can be gathered on the host.

    Attributes:
        name: Qualified name of its weight.
        weight: It.
        modules: The embeddings that read it, by their qualified names.
        head: Name of the unit that reads it as well; "" if none does.
    """

    name: str
    weight: nn.Parameter
    modules: tuple[tuple[str, nn.Embedding], ...]
    head: str = ""

    @property
    def size_bytes(self) -> int:
        """Of the whole table."""
        return self.weight.nbytes


@dataclass(frozen=True)
class Outsiders:
    """What is large outside of the layers.

    Attributes:
        heads: Units behind all others.
        tables: Embeddings that may stay on the host.
    """

    heads: tuple[UnitSpec, ...] = ()
    tables: tuple[Table, ...] = ()


def find_outsiders(
    model: nn.Module, specs: Sequence[UnitSpec], resident: Sequence[str] = ()
) -> Outsiders:
    """Finds the head and the table of a model that says which they are; reads the tree only.

    Args:
        model: As transformers makes them: with ``get_input_embeddings``.
        specs: Its units.
        resident: Names and patterns of what is to stay.
    """
    table_module = _answer(model, "get_input_embeddings")
    head_module = _answer(model, "get_output_embeddings")
    taken = {id(parameter) for spec in specs for _, parameter in spec.parameters}
    taken |= select_resident(model, resident) | overlapping(model)
    least = _LEAST_SHARE * max(spec.num_bytes for spec in specs)
    holders = _holders(model)
    names = {id(module): name for name, module in model.named_modules()}

    def is_large(weight: Any) -> bool:
        return (
            isinstance(weight, nn.Parameter)
            and type(weight) is nn.Parameter
            and id(weight) not in taken
            and is_dense(weight)
            and weight.nbytes >= least
            and not parametrize.is_parametrized(head_module or model)
        )

    table_weight = getattr(table_module, "weight", None)
    head_weight = getattr(head_module, "weight", None)
    tables: list[Table] = []
    heads: list[UnitSpec] = []
    is_head = type(head_module) is nn.Linear and is_large(head_weight)
    if is_large(table_weight):
        readers = holders[id(table_weight)]
        embeddings = [module for module in readers if _can_gather(module)]
        others = [module for module in readers if not _can_gather(module)]
        is_tied = head_weight is table_weight
        if embeddings and all(is_tied and is_head and module is head_module for module in others):
            tables.append(
                Table(
                    f"{names[id(embeddings[0])]}.weight",
                    table_weight,  # type: ignore[arg-type]  # is_large has looked
                    tuple((names[id(module)], module) for module in embeddings),
                    names[id(head_module)] if is_tied else "",
                )
            )
    readers_of_head = holders.get(id(head_weight), [])
    has_one_reader = [module for module in readers_of_head if module is not head_module] == []
    if (
        isinstance(head_weight, nn.Parameter)
        and is_head
        and (has_one_reader or (tables and tables[0].head))
    ):
        name = names[id(head_module)]
        layer = max(spec.layer_index for spec in specs) + 1
        heads.append(UnitSpec(name, head_module, layer, "ffn", ((f"{name}.weight", head_weight),)))
    return Outsiders(tuple(heads), tuple(tables))


def _answer(model: nn.Module, method: str) -> Any:
    try:
        return getattr(model, method, lambda: None)()
    except (NotImplementedError, AttributeError):  # transformers' for models that have none
        return None


def _holders(model: nn.Module) -> dict[int, list[Any]]:
    holders: dict[int, list[Any]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(module)
    return holders


def _can_gather(module: object) -> bool:
    return (
        isinstance(module, nn.Embedding)
        and module.max_norm is None
        and not module.sparse
        and not parametrize.is_parametrized(module)
        and list(module._parameters) == ["weight"]
        and hands_indices_on(module)
    )
