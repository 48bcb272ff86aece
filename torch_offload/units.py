"""The units of a model: what moves as one between host and device.

``find_units`` cuts a model by its structure, or as ``units=`` says; ``leaf_units`` cuts the result
finer once a trace has shown which leaves are read inside their own call only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.utils import parametrize

from torch_offload.names import listed
from torch_offload.residency import must_stay
from torch_offload.selection import select_resident, select_units
from torch_offload.structure import (
    HALF_SHARE,
    Half,
    Kind,
    ModelMap,
    has_forward,
    is_closed,
    is_table,
    kind_hint,
    parts_of,
    size_bytes,
)

Granularity = Literal["sublayer", "layer", "module"]
GRANULARITIES: tuple[Granularity, ...] = ("sublayer", "layer", "module")

# A unit below this share of the largest one costs a copy and saves nothing: it stays resident.
LEAST_UNIT_SHARE = 0.002
_LISTED = 8


@dataclass(frozen=True)
class UnitSpec:
    """One unit: a module that is called, and those of its parameters that are streamed.

    Attributes:
        name: Qualified name of the module, such as ``model.layers.3.self_attn``.
        module: The module whose call surrounds every read of the streamed parameters.
        layer_index: Running number of the block that the module belongs to, in module order.
        kind: Attention or FFN; a label for reports and for the ``split`` stream layout.
        parameters: (qualified name, parameter) of what is streamed, each parameter once, in module
            order. Parameters of the module that are missing here stay resident.
    """

    name: str
    module: nn.Module
    layer_index: int
    kind: Kind
    parameters: tuple[tuple[str, nn.Parameter], ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the streamed parameters, without padding."""
        return sum(size_bytes(parameter) for _, parameter in self.parameters)


def find_units(
    model: nn.Module,
    granularity: Granularity = "sublayer",
    units: Sequence[str | nn.Module] | None = None,
    resident: Sequence[str] = (),
) -> list[UnitSpec]:
    """Finds what is to be streamed, in the order in which a forward probably calls it.

    Reads the module tree only: nothing is copied, moved or changed.

    Args:
        model: The model, with real parameters or on ``meta``.
        granularity: ``"sublayer"`` for attention and FFN apart, ``"layer"`` for whole blocks.
            ``"module"`` gives the sublayer units, from which ``leaf_units`` goes on after a trace.
        units: Names, patterns or modules that replace the automatic choice.
        resident: Names or patterns of modules or parameters that stay on the device.

    Returns:
        The units, at least one, each with at least one parameter; no parameter is in two of them.

    Raises:
        ValueError: No unit was found, or `granularity`, `units` or `resident` is wrong; the message
            says what would do.
        TypeError: `units` or `resident` holds something of another type.

    Example:
        >>> layers = nn.Sequential(*(nn.TransformerEncoderLayer(32, 2, 64) for _ in range(3)))
        >>> [unit.name for unit in find_units(layers)]
        ['0', '1', '2']
    """
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"granularity must be one of {', '.join(map(repr, GRANULARITIES))}, not {granularity!r}"
        )
    kept = select_resident(model, resident)
    sizes = ModelMap(model)
    if units is None:
        candidates = list(_structural_candidates(sizes, whole_layers=granularity == "layer"))
    else:
        candidates = list(_selected_candidates(sizes, select_units(model, units)))
    stay = kept | must_stay(model, [half.module for half, _ in candidates])
    specs = [_to_spec(half, layer_index, stay) for half, layer_index in candidates]
    largest = max((spec.num_bytes for spec in specs), default=0)
    least = LEAST_UNIT_SHARE * largest if units is None else 0
    found = [spec for spec in specs if spec.parameters and spec.num_bytes >= least]
    if not found:
        raise ValueError(_nothing_found(sizes, candidates, units, resident))
    return found


def leaf_units(
    model: nn.Module, sublayer_units: Sequence[UnitSpec], proven: Collection[str]
) -> list[UnitSpec]:
    """Cuts sublayer units into leaves where a trace has proven that this is sound.

    A unit is cut only if every large parameter it streams lies in a proven leaf of one of torch's
    own classes: what is left is small and stays resident. Cutting less would leave nested units,
    of which the outer one is held while all of the inner ones run, so that nothing would be saved.

    Args:
        model: The model that the units are of.
        sublayer_units: What ``find_units`` returned.
        proven: Names of modules of which ``ReadTrace.proven_leaves`` says that all reads of their
            own parameters were inside their own call. Leaving one out joins it to its parent.

    Returns:
        The refined units, in the order of `sublayer_units` and of the modules inside each.
    """
    names = {id(module): name for name, module in model.named_modules()}
    proven_names = frozenset(proven)
    refined: list[UnitSpec] = []
    for unit in sublayer_units:
        refined.extend(_leaves_of(unit, names, proven_names) or [unit])
    return refined


def _structural_candidates(sizes: ModelMap, *, whole_layers: bool) -> Iterator[tuple[Half, int]]:
    seen: set[int] = set()
    for layer_index, block in enumerate(sizes.blocks):
        halves: Sequence[Half] = block.halves
        if whole_layers and has_forward(block.module):
            halves = (Half(block.name, block.module, halves[0].kind if halves else "mha"),)
        for half in halves:
            # One module object inside several blocks is one unit, used often.
            if id(half.module) not in seen:
                seen.add(id(half.module))
                yield half, layer_index


def _selected_candidates(
    sizes: ModelMap, selected: list[tuple[str, nn.Module]]
) -> Iterator[tuple[Half, int]]:
    block_of = {
        id(module): index
        for index, block in enumerate(sizes.blocks)
        for module in block.module.modules()
    }
    numbers: dict[int, int] = {}
    for name, module in selected:
        # A module outside all blocks is a layer of its own.
        key = block_of.get(id(module), -1 - len(numbers))
        layer_index = numbers.setdefault(key, len(numbers))
        yield Half(name, module, kind_hint(name, module) or "mha"), layer_index


def _to_spec(half: Half, layer_index: int, stay: set[int]) -> UnitSpec:
    streamed = tuple(
        (f"{half.name}.{name}" if half.name else name, parameter)
        for name, parameter in half.module.named_parameters()
        if id(parameter) not in stay and parameter.numel() > 0
    )
    return UnitSpec(half.name, half.module, layer_index, half.kind, streamed)


def _leaves_of(unit: UnitSpec, names: dict[int, str], proven: frozenset[str]) -> list[UnitSpec]:
    """The proven leaves of a unit as units, or nothing where it must stay whole."""
    streamed = {id(parameter): (name, parameter) for name, parameter in unit.parameters}
    least = HALF_SHARE * unit.num_bytes
    leaves: list[UnitSpec] = []
    uncovered = set(streamed)
    for module in _open_modules(unit.module):
        name = names[id(module)]
        own = [id(p) for p in module.parameters(recurse=False) if id(p) in streamed]
        if name not in proven or not type(module).__module__.startswith("torch.nn."):
            continue
        taken = tuple(streamed[key] for key in own if key in uncovered)
        if not any(size_bytes(parameter) > least for _, parameter in taken):
            continue
        uncovered.difference_update(own)
        leaves.append(UnitSpec(name, module, unit.layer_index, unit.kind, taken))
    rest_is_small = all(size_bytes(streamed[key][1]) <= least for key in uncovered)
    return leaves if rest_is_small else []


def _open_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The modules below one, without what lies inside closed ones."""
    if parametrize.is_parametrized(module):
        return  # its class is made on the fly, and its tensors live in modules of their own
    yield module
    if not is_closed(module):
        for child in module.children():
            yield from _open_modules(child)


def _nothing_found(
    sizes: ModelMap,
    candidates: list[tuple[Half, int]],
    units: Sequence[str | nn.Module] | None,
    resident: Sequence[str],
) -> str:
    if candidates:
        what = listed((half.name for half, _ in candidates), _LISTED)
        given = "units=" if units is not None else "the units found"
        named = select_resident(sizes.model, resident)
        held = {id(p) for half, _ in candidates for p in half.module.parameters()}
        if resident and held <= named:
            return (
                f"nothing is left to stream: resident={list(resident)!r} names every parameter of"
                f" {given} ({what}); name fewer in resident="
            )
        besides = f"named by resident={list(resident)!r}, " if resident else ""
        return (
            f"nothing is left to stream: every parameter of {given} ({what}) must stay on the"
            f" device, as each is {besides}shared, not one dense piece, or the model's first; name"
            f" other modules in units={', or fewer in resident=' if resident else ''}"
        )
    seen = _largest_modules(sizes)
    if not seen:
        kind = type(sizes.model).__name__
        begin = f"no units found: {kind} holds no modules with parameters below it"
        stay = select_resident(sizes.model, resident) | must_stay(sizes.model, [sizes.model])
        own = [p for p in sizes.model.parameters() if id(p) not in stay]
        if not any(parameter.numel() for parameter in own):
            return f"{begin}; there is nothing to stream"
        return (
            f"{begin}; units=[model] streams it as one unit, {sum(map(size_bytes, own)):,} of its"
            f" {sizes.bytes_of(sizes.model):,} bytes, as its first parameter stays on the device"
        )
    listing = ", ".join(f"{name!r} ({kind}, {count:,} bytes)" for name, kind, count in seen)
    return (
        f"no units found in {type(sizes.model).__name__}: expected layers in a ModuleList,"
        f" Sequential or numbered attributes; the largest modules are {listing}; choose what to"
        f" stream yourself, as in units={[name for name, _, _ in seen[:4]]!r}"
    )


def _largest_modules(sizes: ModelMap) -> list[tuple[str, str, int]]:
    """(name, class, bytes) of the largest modules that could be units beside each other."""
    model = sizes.model
    rows = [
        (name, type(module).__name__, sizes.bytes_of(module))
        for name, module in parts_of(model, "")
        if has_forward(module) and not is_table(module) and sizes.bytes_of(module) > 0
    ]
    return sorted(rows, key=lambda row: -row[2])[:_LISTED]
