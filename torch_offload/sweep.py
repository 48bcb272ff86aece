"""How a prediction changes with depth, layout and budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from rich.console import RenderableType
from rich.table import Table

from torch_offload import _C
from torch_offload.prediction import Prediction, Scenario, predict
from torch_offload.simulate import MODES
from torch_offload.sizes import format_size

Axis: TypeAlias = Literal["depth", "layout", "budget"]
AXES: tuple[Axis, ...] = get_args(Axis)

_DEPTHS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)  # layers
_BUDGET_STEPS = 9


@dataclass(frozen=True)
class Point:
    """One prediction of a sweep.

    Attributes:
        label: What was set, for people.
        position: Where it lies on its axis: layers of depth, bytes of budget; 0 for a layout.
        prediction: What comes of it.
    """

    label: str
    position: float
    prediction: Prediction


@dataclass(frozen=True)
class Sweep:
    """The points along one axis."""

    axis: Axis
    points: tuple[Point, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """The same as plain data."""
        return [
            {"label": point.label, "position": point.position, **point.prediction.to_json()}
            for point in self.points
        ]

    def __rich__(self) -> RenderableType:
        """For a terminal."""
        table = Table(title=f"sweep over {self.axis}", title_justify="left")
        table.add_column(self.axis)
        for heading in ("a forward", "device memory", "streamed", "bound by"):
            table.add_column(heading, justify="right", no_wrap=True)
        for point in self.points:
            found = point.prediction
            table.add_row(
                point.label,
                f"{found.forward_ms:,.2f} ms",
                format_size(found.device_bytes),
                format_size(found.streamed_bytes),
                found.bound.by,
            )
        return table


def scenarios_along(axis: Axis, base: Scenario) -> list[tuple[str, float, Scenario]]:
    """What a sweep predicts: label, position and scenario of each point."""
    if axis == "depth":
        return list(_along_depth(base))
    if axis == "budget":
        return list(_along_budget(base))
    return [
        (f"{mode}, {streams}", 0.0, base.with_(mode=mode, streams=streams))
        for mode in reversed(MODES)
        for streams in ("shared", "split")
        if (mode, streams) != ("sync", "split")
    ]


def sweep_along(axis: Axis, points: Iterable[tuple[str, float, Scenario]]) -> Sweep:
    """Predicts the points of an axis, in their order."""
    return Sweep(axis, tuple(Point(label, at, predict(scenario)) for label, at, scenario in points))


def _along_depth(base: Scenario) -> Iterator[tuple[str, float, Scenario]]:
    layer = largest_layer_bytes(base.units)
    for layers in _DEPTHS:
        depth = int(layers * layer)
        label = f"{layers:g} layers, {format_size(depth)}"
        # More room would keep units resident instead: only the depth is to change here.
        yield label, layers, base.with_(depth_bytes=depth, budget_bytes=None)


def _along_budget(base: Scenario) -> Iterator[tuple[str, float, Scenario]]:
    packable = base.packable
    least = _C.least_budget_bytes(base.units, packable.transport, packable.packed_bytes)
    whole = sum(unit.size_bytes for unit in base.units)
    for step in range(_BUDGET_STEPS):
        budget = least + (whole - least) * step // (_BUDGET_STEPS - 1)
        if budget < least:
            continue
        label = format_size(budget + base.outside_bytes)
        yield label, budget + base.outside_bytes, base.with_(budget_bytes=budget)


def largest_layer_bytes(units: Sequence[_C.Unit]) -> int:
    """Bytes of the layer that has most."""
    layers: dict[int, int] = {}
    for unit in units:
        layers[unit.layer_index] = layers.get(unit.layer_index, 0) + unit.size_bytes
    return max(layers.values())
