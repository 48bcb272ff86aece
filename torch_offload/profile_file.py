"""Profiles as JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

from torch_offload import _C
from torch_offload.advice import Advice
from torch_offload.attribution import Attribution, UnitTimes
from torch_offload.bounds import Bottleneck, Bound
from torch_offload.config import Mode, Streams
from torch_offload.profile import Measured, Profile, UnitProfile

FORMAT = "torch_offload profile 1"
_MOST = 2**62
# Counts that older files lack.
_ADDED = frozenset(
    {"ahead_uses", "ahead_ns", "launch_ns", "ahead_gaps", "ahead_gap_ns", "launch_gap_ns"}
)


def profile_to_json(profile: Profile) -> dict[str, Any]:
    """A profile as plain data."""
    total = {name: value for name, value in asdict(profile.total).items() if name != "units"}
    return {
        "format": FORMAT,
        "sentence": profile.sentence,
        "roofline_share": profile.roofline_share,
        "attributed_share": profile.attributed_share,
        "link_bytes_per_second": profile.link_bytes_per_second,
        "measured": asdict(profile.measured),
        "total": total,
        "bound": asdict(profile.bound),
        "advice": asdict(profile.advice),
        "units": [asdict(unit) for unit in profile.units],
        "sequence": list(profile.sequence),
    }


def write_profile(profile: Profile, path: Path) -> None:
    """Writes one. Raises OSError if the file cannot be written."""
    path.write_text(json.dumps(profile_to_json(profile), indent=1) + "\n")


def read_profile(path: Path) -> Profile:
    """Reads what `Profile.save` wrote.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no profile.
    """
    try:
        document = json.loads(path.read_text())
        if document["format"] != FORMAT:
            raise KeyError("format")
        return _profile_from(document)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            "expected a profile as `with handle.profile() as p:` and `p.save('p.json')` write it, "
            f"got something else in {path} ({type(error).__name__}: {error})"
        ) from error


def _profile_from(document: Mapping[str, Any]) -> Profile:
    units = tuple(_unit_from(unit) for unit in document["units"])
    sequence = tuple(document["sequence"])
    if not units or not all(type(u) is int and 0 <= u < len(units) for u in sequence):
        raise ValueError("the sequence names units that are not there")
    measured, total = document["measured"], document["total"]
    return Profile(
        measured=Measured(
            device=_text(measured["device"]),
            mode=_one_of(measured["mode"], get_args(Mode)),
            streams=_one_of(measured["streams"], get_args(Streams)),
            **_counts(Measured, measured),
        ),
        total=Attribution(
            hidden_share=_number(total["hidden_share"], 1),
            units=tuple(unit.times for unit in units),
            **_counts(Attribution, total),
        ),
        units=units,
        sequence=sequence,
        link_bytes_per_second=_number(document["link_bytes_per_second"], 1e18),
        bound=Bound(
            by=_one_of(document["bound"]["by"], get_args(Bottleneck)),
            busy_share=_number(document["bound"]["busy_share"], 1e9),
            stall_share=_number(document["bound"]["stall_share"], 1e9),
        ),
        advice=Advice(
            options=_text(document["advice"]["options"]),
            saving_share=_number(document["advice"]["saving_share"], 1),
            sentence=_text(document["advice"]["sentence"]),
        ),
    )


def _unit_from(fields_of: Mapping[str, Any]) -> UnitProfile:
    size_bytes = fields_of["size_bytes"]
    if type(size_bytes) is not int or not 0 < size_bytes < _MOST:
        raise ValueError(f"{size_bytes!r} is no size")
    layer_index = fields_of["layer_index"]
    if type(layer_index) is not int or not 0 <= layer_index < 2**31:
        raise ValueError(f"{layer_index!r} is no layer")
    if type(fields_of["is_resident"]) is not bool:
        raise TypeError(f"is_resident is {fields_of['is_resident']!r}")
    copied_bytes = fields_of.get("copied_bytes", size_bytes)  # of older files: raw copies
    if type(copied_bytes) is not int or not 0 <= copied_bytes <= size_bytes:
        raise ValueError(f"{copied_bytes!r} is no size of a copy")
    return UnitProfile(
        name=_text(fields_of["name"]),
        layer_index=layer_index,
        kind=_one_of(fields_of["kind"], ("mha", "ffn")),
        size_bytes=_C.aligned_size(size_bytes),
        is_resident=fields_of["is_resident"],
        times=UnitTimes(**_counts(UnitTimes, fields_of["times"])),
        copied_bytes=copied_bytes,
    )


def _counts(of: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The whole numbers among the fields of a class."""
    counts = {
        field.name: values.get(field.name, 0) if field.name in _ADDED else values[field.name]
        for field in fields(of)
        if field.type == "int"
    }
    for name, count in counts.items():
        if type(count) is not int or abs(count) >= _MOST:
            raise ValueError(f"{name} is {count!r}")
    return counts


def _number(value: Any, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise ValueError(f"{value!r} is not between 0 and {most:g}")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _one_of(value: Any, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"{value!r} is none of {', '.join(choices)}")
    return value
