"""Versions, the driver against the runtime, and variables that change how CUDA works."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
from collections.abc import Iterator

import torch

from torch_offload import _C
from torch_offload._version import __version__
from torch_offload.doctor.finding import Finding
from torch_offload.doctor.system import System

_PACKAGES = ("transformers", "accelerate", "diffusers", "matplotlib")


def look_at_versions(system: System) -> Iterator[Finding]:
    """The package, torch, and what they were built for."""
    versions = [f"torch_offload {__version__}", f"torch {torch.__version__}"]
    versions.append(f"Python {platform.python_version()}")
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    yield Finding("versions", "ok", ", ".join(versions))
    yield _build()
    yield _driver(system)


def _build() -> Finding:
    if torch.version.cuda is None:
        return Finding("CUDA build", "note", "torch was built without CUDA: the host device only")
    if not _C.has_cuda:
        return Finding(
            "CUDA build",
            "off",
            f"torch has CUDA {torch.version.cuda}, this build of torch_offload has none",
            "nothing can be streamed to the GPU",
            "pip install --no-build-isolation . in the repository, with this torch",
        )
    return Finding("CUDA build", "ok", f"for CUDA {torch.version.cuda}")


def _driver(system: System) -> Finding:
    """The driver must be at least as new as the runtime that torch brings."""
    what = "driver"
    runtime = torch.version.cuda
    module = system.read("/proc/driver/nvidia/version")
    if runtime is None or (module is None and not torch.cuda.is_available()):
        return Finding(what, "not tried", "no NVIDIA driver is loaded on this machine")
    number = _driver_supports()
    supports = f"{number // 1000}.{number % 1000 // 10}"
    if number == 0:
        return Finding(
            what,
            "off",
            "the driver is loaded, but CUDA cannot talk to it",
            "torch sees no GPU",
            "in a container: run it with --gpus all; else see `nvidia-smi`",
        )
    if [int(part) for part in supports.split(".")] < [int(part) for part in runtime.split(".")]:
        return Finding(
            what,
            "off",
            f"it supports CUDA {supports}, torch was built with {runtime}",
            "newer features fail, kernels may not load",
            "install a newer driver, or a torch built for this one",
        )
    return Finding(what, "ok", f"supports CUDA {supports}, torch was built with {runtime}")


def _driver_supports() -> int:
    """The CUDA version that the driver supports, as 13000 for 13.0; 0 if it does not answer."""
    version = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        failed = driver.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return 0 if failed else version.value


def look_at_variables(system: System) -> Iterator[Finding]:
    """Variables that stop copies and kernels from running side by side."""
    off = {
        "CUDA_LAUNCH_BLOCKING": (
            "1",
            "every launch waits for its end: no copy overlaps a kernel",
        ),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": (
            "1",
            "every tensor of a forward is allocated by the driver, which waits for the device",
        ),
    }
    for name, (value, cost) in off.items():
        if system.environment.get(name) == value:
            yield Finding(name, "off", f"is {value}", cost, f"unset {name}, but for debugging")
    if system.environment.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        yield Finding(
            "CUDA_DEVICE_MAX_CONNECTIONS",
            "note",
            "is 1: all streams share one queue to the device, so a kernel that waits may hold up a "
            "copy behind it",
        )
