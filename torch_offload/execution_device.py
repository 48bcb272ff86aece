"""Keeps ``model.device`` right while the model's first parameter is in host memory.

transformers answers ``model.device`` with the device of the first parameter, and inputs are sent
there. Where that parameter is a table that stays on the host, the classes of the modules that
answer are replaced by generated ones which answer the execution device. They have the same name and
module, and are subclasses: ``isinstance`` holds.
"""

from __future__ import annotations

import torch
from torch import nn

_MARK = "_torch_offload_plain_class"


def answer_device(module: nn.Module, device: torch.device) -> bool:
    """Makes ``module.device`` answer `device`. Returns whether its class was replaced.

    Only where the class has a property of that name, and it answers something else now.
    """
    plain = type(module)
    if not isinstance(getattr(plain, "device", None), property) or module.device == device:
        return False
    generated = type(
        plain.__name__,
        (plain,),
        {
            "__module__": plain.__module__,
            "__qualname__": plain.__qualname__,
            "__doc__": plain.__doc__,
            "device": property(lambda self: device),
            _MARK: plain,
        },
    )
    module.__class__ = generated
    return True


def give_class_back(module: nn.Module) -> None:
    """Undoes `answer_device`."""
    plain = vars(type(module)).get(_MARK)
    if plain is not None:
        module.__class__ = plain
