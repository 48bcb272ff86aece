"""Whether the extension fits the torch that is running, said in one sentence if it does not."""

from __future__ import annotations

import importlib

import torch

_COMMAND = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _minor(version: str) -> str:
    """Returns "2.11" of "2.11.0+cu130"; within a minor version torch keeps its C++ interface."""
    return ".".join(version.split(".")[:2])


def check() -> None:
    """Imports the extension, or says why it cannot.

    Does not block. Costs one import of a small file more than the extension's own.

    Raises:
        ImportError: The extension was built against another minor version or another kind (CUDA
            or CPU) of torch, was never built, or one of its libraries is missing.
    """
    try:
        info = importlib.import_module("torch_offload._build_info")
    except ModuleNotFoundError as error:
        raise ImportError(
            "torch_offload's extension was never built here: run `make build` in its source tree, "
            f"or install it with `{_COMMAND}` there."
        ) from error
    running = str(torch.__version__)
    built = str(info.TORCH_VERSION)
    if _minor(running) != _minor(built):
        raise ImportError(
            f"torch_offload was built against torch {built}, but torch {running} is running: "
            f"build it anew with `{_COMMAND}` in its source tree."
        )
    cuda = torch.version.cuda or ""
    if cuda.split(".")[0] != str(info.TORCH_CUDA_VERSION).split(".")[0]:
        raise ImportError(
            f"torch_offload was built for {_kind(info.TORCH_CUDA_VERSION)} of torch, but torch "
            f"{running} is {_kind(cuda)}: build it anew with `{_COMMAND}` in its source tree."
        )
    try:
        importlib.import_module("torch_offload._C")
    except ImportError as error:
        raise ImportError(
            f"torch_offload's extension does not load ({error}); likely causes: it was built for "
            f"another Python than this one (built for {info.PYTHON_VERSION}), against another "
            f"build of torch {running}, or a library of CUDA {cuda or '(none)'} is missing. "
            f"`{_COMMAND}` in its source tree builds it anew."
        ) from error


def _kind(cuda: str) -> str:
    return f"a CUDA {cuda} build" if cuda else "a CPU build"


check()
