"""A thin shim: checks that a build can start, then lets CMake configure, build and install."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

from build_checks import BuildError, check_all, check_setuptools, find_cmake

# The commands that compile; others (sdist, metadata) need neither compiler nor torch.
BUILDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}


class CMakeBuild(build_ext):
    """Builds the extension with CMake, which also installs what it generates beside it."""

    def run(self) -> None:
        python_files = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        build = Path(self.build_temp).resolve()
        cmake, generator = find_cmake()
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), *generator),
            f"-DCMAKE_BUILD_TYPE={os.environ.get('TORCH_OFFLOAD_BUILD_TYPE', 'Release')}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        jobs = self.parallel or os.environ.get("MAX_JOBS") or os.cpu_count() or 1
        compile_it = [cmake, "--build", str(build), "--target", "_C", "--parallel", str(jobs)]
        install = [cmake, "--install", str(build), "--prefix", str(python_files.resolve())]
        for command in (configure, compile_it, install):
            subprocess.run(command, check=True)

    def get_source_files(self) -> list[str]:
        """Empty, as CMake holds the only list of sources; MANIFEST.in brings them along."""
        return []


def main() -> None:
    # Said before setuptools starts: what is wrong, in one sentence and without a traceback.
    if BUILDS & set(sys.argv):
        try:
            check_all()
            find_cmake()
            check_setuptools()
        except BuildError as error:
            sys.exit(f"\ntorch_offload: {error}\n")
    setup(
        ext_modules=[Extension("torch_offload._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )


main()
