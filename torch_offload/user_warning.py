"""Warnings that show the user's line, from however deep they come."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from types import FrameType

from torch import nn

# Between the user's line and ours: our own package, torch's call of a module, ends of `with`.
_OWN_FOLDER = os.path.dirname(__file__) + os.sep
_BETWEEN = (nn.modules.module.__file__, contextlib.__file__)
# Within a call of its wrapper, a line is the model's.
_WRAPPER = _OWN_FOLDER + "calls.py"


def warn_user(text: str, category: type[Warning] = UserWarning) -> None:
    """Issues a warning at the innermost line that is neither ours nor in between.

    In a forward that is the line which calls the model, whatever its layers are called by: Python
    shows a warning once a line, and that of a layer is the same for every model of its class.

    Args:
        text: What is wrong and what follows, without our name.
        category: Of the warning.
    """
    names = _filenames()
    level = len(names) - names[::-1].index(_WRAPPER) if _WRAPPER in names else 0
    while level < len(names) - 1 and _is_passed_over(names[level]):
        level += 1
    warnings.warn(f"torch_offload: {text}", category, stacklevel=level + 1)


def _filenames() -> list[str]:
    """Of `warn_user` and its callers, innermost first. Keeps no frame: it would keep a model."""
    names = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        names.append(frame.f_code.co_filename)
        frame = frame.f_back
    return names


def _is_passed_over(filename: str) -> bool:
    return filename.startswith(_OWN_FOLDER) or filename in _BETWEEN
