"""Prints what CMake must know of the installed torch, as CMake code. Run by cmake/Torch.cmake."""

import sys

from build_checks import BuildError, check_all


def main() -> int:
    try:
        facts = check_all()
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    include = facts.root / "include"
    values = {
        "TORCH_VERSION": facts.version,
        "TORCH_CUDA_VERSION": facts.cuda,
        "TORCH_CXX_STANDARD": facts.cxx_standard,
        "TORCH_LIBRARY_DIR": facts.root / "lib",
        "TORCH_INCLUDE_DIRS": f"{include};{include / 'torch/csrc/api/include'}",
        "TORCH_CUDA_INCLUDE_DIRS": ";".join(map(str, facts.cuda_include_dirs)),
        "TORCH_CUDART": facts.cudart or "",
    }
    for name, value in values.items():
        print(f'set({name} "{value}")')
    return 0


if __name__ == "__main__":
    sys.exit(main())
