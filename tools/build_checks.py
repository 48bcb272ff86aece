"""What a build needs, looked for before CMake runs, so that what is missing is one sentence.

Plain Python without torch: a build must be able to say that torch is not there, and reading
torch's version file takes no seconds, as importing torch does.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import runpy
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

INSTALL_COMMAND = "pip install --no-build-isolation ."
LEAST_TORCH = (2, 11)


class BuildError(Exception):
    """The build cannot start; the message is one sentence: what is missing and what to do."""


@dataclass(frozen=True)
class TorchFacts:
    """What the build must know of the installed torch.

    Attributes:
        root: torch's folder, with `include` and `lib` below.
        version: as in `torch.__version__`, e.g. "2.11.0+cu130".
        cuda: the CUDA version of the build, e.g. "13.0"; empty for a CPU build.
        cxx_standard: the C++ standard that torch's own CMake package asks of its users.
        cuda_include_dirs: folders with the CUDA headers that torch's headers include.
        cudart: the CUDA runtime library, by its full name.
    """

    root: Path
    version: str
    cuda: str
    cxx_standard: int
    cuda_include_dirs: tuple[Path, ...] = ()
    cudart: Path | None = None


def check_platform() -> None:
    """Raises BuildError unless this is Linux on x86-64, the only platform that is built for."""
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        raise BuildError(f"torch_offload builds on Linux x86-64 only, not on {system} {machine}.")


def check_compiler() -> None:
    """Raises BuildError unless the C++ compiler that CMake would take is there."""
    chosen = os.environ.get("CXX")
    candidates = [chosen.split()[0]] if chosen else ["c++", "g++", "clang++"]
    if not any(shutil.which(candidate) for candidate in candidates):
        raise BuildError(
            f"No C++ compiler found (looked for {', '.join(candidates)}): install one "
            "(Debian, Ubuntu: apt install g++) or name it in the environment variable CXX."
        )


def check_python_headers() -> None:
    """Raises BuildError unless Python.h of the running interpreter is there."""
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise BuildError(
            f"The headers of Python {version} are missing (no Python.h in {include}): install them "
            f"(Debian, Ubuntu: apt install python{version}-dev)."
        )


def _cuda_headers_are_complete(include_dirs: tuple[Path, ...]) -> bool:
    """Whether the folders hold every header that torch's CUDA headers include.

    They come from three PyPI packages; torch depends on one of them, so each is asked for.
    """
    needed = ("cuda_runtime_api.h", "cublas_v2.h", "cusparse.h", "cusolverDn.h")
    needed += ("crt/host_defines.h", "nv/target")
    return all(any((folder / name).is_file() for folder in include_dirs) for name in needed)


def _toolkits() -> list[Path]:
    """Folders where a CUDA toolkit may be, the likeliest first."""
    named = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [Path(folder) for folder in named if folder]
    compiler = shutil.which("nvcc")
    if compiler:
        folders.append(Path(compiler).resolve().parent.parent)
    return [*folders, Path("/usr/local/cuda")]


def find_cuda(torch_root: Path, cuda: str) -> tuple[tuple[Path, ...], Path]:
    """Finds CUDA's headers and runtime library for a torch built with CUDA version `cuda`.

    The packages that torch itself came with are asked first, as they match it exactly; then a
    toolkit of the same major version.

    Returns:
        The include folders, and the runtime library by its full name.

    Raises:
        BuildError: Neither is complete.
    """
    major = cuda.split(".")[0]
    site = torch_root.parent / "nvidia"
    folders = [site / f"cu{major}", site / "cuda_runtime", *_toolkits()]
    for folder in folders:
        # Since CUDA 13 the headers of CCCL (nv/target) have a folder of their own in a toolkit.
        include_dirs = (folder / "include", folder / "include" / "cccl")
        if not _cuda_headers_are_complete(include_dirs):
            continue
        for library in ("lib", "lib64"):
            cudart = folder / library / f"libcudart.so.{major}"
            if cudart.is_file():
                return tuple(path for path in include_dirs if path.is_dir()), cudart
    raise BuildError(
        f"CUDA {cuda} headers are incomplete: torch brings most of them, the rest comes with "
        f"`pip install 'nvidia-cuda-crt=={cuda}.*' 'nvidia-cuda-cccl=={cuda}.*'`, "
        f"or all from a CUDA {major} toolkit named in CUDA_HOME."
    )


def check_setuptools() -> None:
    """Raises BuildError unless wheels can be built: older setuptools need the package `wheel`.

    The `venv` of Python 3.11 brings such a setuptools alone.
    """
    import setuptools

    version = tuple(int(part) for part in setuptools.__version__.split(".")[:2])
    if version < (70, 1) and importlib.util.find_spec("wheel") is None:
        raise BuildError(
            f"setuptools {setuptools.__version__} cannot build a wheel by itself: "
            "`pip install wheel 'setuptools>=70.1,<82'`, then build again."
        )


def find_torch() -> TorchFacts:
    """Reads what the build must know from the torch of the running interpreter.

    Raises:
        BuildError: torch is absent, too old, or built for ROCm.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            "torch is not installed where this build runs: install torch first, then build with "
            f"`{INSTALL_COMMAND}` (build isolation hides the installed torch)."
        )
    root = Path(spec.origin).parent
    facts = runpy.run_path(str(root / "version.py"))
    version = str(facts["__version__"])
    least = ".".join(map(str, LEAST_TORCH))
    if tuple(int(part) for part in version.split(".")[:2]) < LEAST_TORCH:
        raise BuildError(f"torch {version} is too old: torch_offload needs torch {least} or newer.")
    if facts.get("hip"):
        raise BuildError(
            f"torch {version} is a ROCm build: torch_offload supports CUDA and CPU builds of torch."
        )
    config = (root / "share/cmake/Torch/TorchConfig.cmake").read_text()
    standard = re.search(r"CXX_STANDARD (\d+)", config)
    cuda = str(facts.get("cuda") or "")
    include_dirs, cudart = find_cuda(root, cuda) if cuda else ((), None)
    return TorchFacts(
        root=root,
        version=version,
        cuda=cuda,
        cxx_standard=int(standard.group(1)) if standard else 20,
        cuda_include_dirs=include_dirs,
        cudart=cudart,
    )


def _find_program(name: str) -> str | None:
    """Returns the program of the interpreter's own environment, activated or not, else the PATH's."""
    here = Path(sys.executable).parent
    return shutil.which(name, path=f"{here}{os.pathsep}{os.environ.get('PATH', '')}")


def find_cmake() -> tuple[str, list[str]]:
    """Returns the cmake program, and the arguments that choose what it builds with.

    Raises:
        BuildError: There is no cmake, or nothing for it to build with.
    """
    cmake, ninja = _find_program("cmake"), _find_program("ninja")
    if cmake is None or not (ninja or _find_program("make")):
        missing = "cmake" if cmake is None else "ninja (or make)"
        raise BuildError(f"{missing} is missing: `pip install cmake ninja`, then build again.")
    return cmake, ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []


def check_all() -> TorchFacts:
    """Runs every check, the cheapest first, and returns what is known of torch."""
    check_platform()
    check_compiler()
    check_python_headers()
    return find_torch()
