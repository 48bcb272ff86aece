"""Names and patterns of modules and parameters, as users write them in ``units=``, ``resident=``.

An entry is a full name (``model.layers.3.mlp``), the end of exactly one full name, a pattern with
``*``, ``?`` or ``[...]`` (``*`` crosses dots), or a module object.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from torch_offload.names import listed
from torch_offload.structure import has_forward

_SHOWN = 4


def is_pattern(entry: str) -> bool:
    """Whether an entry is to be matched with wildcards rather than taken as a name."""
    return any(mark in entry for mark in "*?[")


def select_units(
    model: nn.Module, entries: Sequence[str | nn.Module]
) -> list[tuple[str, nn.Module]]:
    """Modules that a ``units=`` argument means, in the order of the model's modules.

    A pattern that matches a module and modules inside it means the outermost ones that can be
    called and hold parameters: ``model.layers.*`` is the layers, not the projections in them.

    Args:
        model: The model whose modules are named.
        entries: Full names, unique name endings, patterns, or modules of the model.

    Raises:
        ValueError: An entry matches nothing, a plain name ends several names, a module is selected
            by two entries, can never be called, holds no parameters, or lies inside another one.
        TypeError: An entry is neither a string nor a module.
    """
    if isinstance(entries, str | nn.Module):
        raise TypeError(
            "units= takes a sequence of names, patterns or modules, not one"
            f" {type(entries).__name__}; write units=[...]"
        )
    by_name = dict(model.named_modules(remove_duplicate=False))
    first_name = {id(module): name for name, module in model.named_modules()}
    chosen: dict[int, tuple[str | nn.Module, str, nn.Module]] = {}
    for entry in entries:
        for name, module in _modules_of(entry, by_name, first_name):
            if id(module) in chosen:
                raise ValueError(
                    f"units= selects module {name!r} twice, by {_show(chosen[id(module)][0])} and"
                    f" by {_show(entry)}; remove one of the two entries"
                )
            chosen[id(module)] = (entry, name, module)
    _refuse_overlaps(chosen.values())
    order = {key: position for position, key in enumerate(first_name)}
    picked = sorted(chosen.values(), key=lambda item: order[id(item[2])])
    return [(first_name[id(module)], module) for _, _, module in picked]


def select_resident(model: nn.Module, entries: Sequence[str]) -> set[int]:
    """``id``s of the parameters that a ``resident=`` argument keeps on the device.

    Args:
        model: The model whose modules and parameters are named.
        entries: Names or patterns of modules (all parameters below them) or of parameters.

    Raises:
        ValueError: An entry matches nothing, or a plain name ends several names.
        TypeError: `entries` is a single string, or an entry is no string.
    """
    if isinstance(entries, str):
        raise TypeError(
            f"resident= takes a sequence of names or patterns, not one string; write"
            f" resident=[{entries!r}]"
        )
    holders: dict[str, list[nn.Parameter]] = {
        name: list(module.parameters())
        for name, module in model.named_modules(remove_duplicate=False)
    }
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders[name] = [parameter]
    kept: set[int] = set()
    for entry in entries:
        if not isinstance(entry, str):
            raise TypeError(
                f"resident= takes names or patterns, not {type(entry).__name__}; give the module's"
                " qualified name"
            )
        for name in _names_of(entry, holders, "resident"):
            kept.update(id(parameter) for parameter in holders[name])
    return kept


def _modules_of(
    entry: str | nn.Module, by_name: dict[str, nn.Module], first_name: dict[int, str]
) -> list[tuple[str, nn.Module]]:
    if isinstance(entry, nn.Module):
        if id(entry) not in first_name:
            raise ValueError(
                f"units= holds a {type(entry).__name__} that is no module of this model; pass a"
                " module found in model.modules(), or its name"
            )
        names = [first_name[id(entry)]]
    elif isinstance(entry, str):
        names = _names_of(entry, by_name, "units")
    else:
        raise TypeError(
            f"units= takes names, patterns or modules, not {type(entry).__name__} ({entry!r})"
        )
    if isinstance(entry, str) and is_pattern(entry) and entry not in by_name:
        return _outermost_usable(entry, names, by_name)
    for name in names:
        _require_usable(name, by_name[name])
    return [(name, by_name[name]) for name in names]


def _names_of(entry: str, known: Iterable[str], argument: str) -> list[str]:
    """Full names that one entry means; a plain name means one."""
    names = list(known)
    if not entry:
        cure = "units=[model]" if argument == "units" else "keep the model plain"
        raise ValueError(
            f"expected names or patterns in {argument}=, got an empty string; name what is meant"
            f" (if that is the whole model: {cure})"
        )
    if entry in names:
        return [entry]
    if is_pattern(entry):
        matches = [name for name in names if fnmatchcase(name, entry)]
    else:
        matches = [name for name in names if name.endswith("." + entry)]
        if len(matches) > 1:
            raise ValueError(
                f"{argument}= name {entry!r} matches {len(matches)} names"
                f" ({listed(matches, _SHOWN)}); write the full name of one, or the pattern"
                f" '*.{entry}' for all"
            )
    if matches:
        return matches
    close = difflib.get_close_matches(entry, names, n=3, cutoff=0.5)
    hint = (
        f"did you mean {listed(close, _SHOWN)}?"
        if close
        else "see the names in model.named_modules()"
    )
    raise ValueError(f"{argument}= entry {entry!r} matches nothing in the model; {hint}")


def _outermost_usable(
    pattern: str, names: list[str], by_name: dict[str, nn.Module]
) -> list[tuple[str, nn.Module]]:
    picked: list[tuple[str, nn.Module]] = []
    covered: set[int] = set()
    for name in names:  # parents come before their children in named_modules()
        module = by_name[name]
        if id(module) in covered or not _is_usable(module):
            continue
        picked.append((name, module))
        covered.update(id(inner) for inner in module.modules())
    if not picked:
        raise ValueError(
            f"units= pattern {pattern!r} matches only modules that are never called or hold no"
            f" parameters ({listed(names, _SHOWN)}); match their elements, as in"
            f" {names[0] + '.*'!r}"
        )
    return picked


def _is_usable(module: nn.Module) -> bool:
    return has_forward(module) and next(module.parameters(), None) is not None


def _require_usable(name: str, module: nn.Module) -> None:
    if not has_forward(module):
        raise ValueError(
            f"units= names {name!r}, a {type(module).__name__}, which is never called; name its"
            f" elements instead: {name + '.*'!r}"
        )
    if next(module.parameters(), None) is None:
        raise ValueError(
            f"units= names {name!r}, a {type(module).__name__} without parameters; remove the entry"
        )


def _refuse_overlaps(chosen: Iterable[tuple[str | nn.Module, str, nn.Module]]) -> None:
    selected = {id(module): name for _, name, module in chosen}
    for _, outer, module in chosen:
        for inner_module in module.modules():
            inner = selected.get(id(inner_module))
            if inner is not None and inner_module is not module:
                raise ValueError(
                    f"units= overlap: {inner!r} lies inside {outer or 'the whole model'!r}; keep"
                    " either the outer module or the inner ones"
                )


def _show(entry: str | nn.Module) -> str:
    return repr(entry) if isinstance(entry, str) else f"a {type(entry).__name__} object"
