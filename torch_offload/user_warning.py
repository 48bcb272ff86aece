"""Warnings that show the user's line, from however deep they come."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings

from torch import nn

# Between the user's line and ours: our own package, torch's call of a module, ends of `with`.
_OWN_FOLDER = os.path.dirname(__file__) + os.sep
_BETWEEN = (nn.modules.module.__file__, contextlib.__file__)


def warn_user(text: str) -> None:
    """Issues a UserWarning at the innermost line that is neither ours nor in between.

    Args:
        text: What is wrong and what follows, without our name.
    """
    level = 1
    frame = sys._getframe()
    while frame.f_back is not None and _is_passed_over(frame.f_code.co_filename):
        frame = frame.f_back
        level += 1
    warnings.warn(f"torch_offload: {text}", stacklevel=level)


def _is_passed_over(filename: str) -> bool:
    return filename.startswith(_OWN_FOLDER) or filename in _BETWEEN
