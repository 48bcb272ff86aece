"""The zoo: tiny models with random weights of every family that must stream.

``CASES[name].build()`` gives the model, ``CASES[name].inputs()`` the keyword arguments of one
forward. Nothing heavy is imported before a case is built. A library that is missing, or too old for
a family, skips the test with the reason; with ``TORCH_OFFLOAD_REQUIRE_ALL_MODELS=1`` it fails it.
"""

from __future__ import annotations

from tests.python.zoo import diffusion, plain, text, vision
from tests.python.zoo.case import Case, ModelKind, noise, tokens

__all__ = ["CASES", "Case", "ModelKind", "names_of", "noise", "tokens"]

_ALL = (*text.CASES, *vision.CASES, *diffusion.CASES, *plain.CASES)

CASES: dict[str, Case] = {case.name: case for case in _ALL}

if len(CASES) != len(_ALL):
    raise ValueError("two cases of the zoo have the same name; rename one")


def names_of(*kinds: ModelKind) -> list[str]:
    """Names of the cases of some kinds, in the order of the zoo; of all cases without arguments."""
    return [name for name, case in CASES.items() if not kinds or case.kind in kinds]
