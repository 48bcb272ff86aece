"""How long each unit of a plain model computes: what predictions are made from."""

from __future__ import annotations

from collections import defaultdict
from statistics import median

import torch
from clocks import Stamp, synchronize
from torch import nn
from yardstick import forward


def unit_times_ns(plain: nn.Module, names: list[str], tokens: torch.Tensor) -> dict[str, int]:
    """Device time of each unit in a resident forward, and of all else as "".

    Of the plain model: nothing of what is predicted goes into the prediction.
    """
    marks: dict[str, list[tuple[Stamp, Stamp]]] = defaultdict(list)
    begun: dict[str, Stamp] = {}
    hooks = []
    for name in names:
        module = plain.get_submodule(name)

        def before(*_: object, name: str = name) -> None:
            begun[name] = Stamp()

        def after(*_: object, name: str = name) -> None:
            marks[name].append((begun[name], Stamp()))

        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after, with_kwargs=True))
    wholes = []
    forward(plain, tokens)
    marks.clear()
    for _ in range(3):
        synchronize()
        begin = Stamp()
        forward(plain, tokens)
        wholes.append(Stamp() - begin)
    synchronize()
    for hook in hooks:
        hook.remove()
    times = {
        name: round(median(end - begin for begin, end in pairs) * 1e9)
        for name, pairs in marks.items()
    }
    times[""] = max(0, round(median(wholes) * 1e9) - sum(times.values()))
    return times
