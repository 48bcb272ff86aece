"""What a build refuses and in which words, what sdist and wheel contain, and that lists agree."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import types
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import torch_offload
from torch_offload import _build_check, _version

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(sysconfig.get_path("purelib"))
MODULE = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
BUILD_WHEEL = "from setuptools import build_meta; build_meta.build_wheel('dist')"
BUILD_EDITABLE = "from setuptools import build_meta; build_meta.build_editable('editable')"

# Stands in for cmake, for which a wheel takes seconds instead of minutes: notes how it was called,
# and installs what the real one would.
FAKE_CMAKE = f"""#!{sys.executable}
import pathlib, sys
with open("cmake-calls.txt", "a") as calls:
    print(*sys.argv[1:], file=calls)
if sys.argv[1] == "--install":
    package = pathlib.Path(sys.argv[sys.argv.index("--prefix") + 1], "torch_offload")
    package.mkdir(parents=True, exist_ok=True)
    (package / "{MODULE}").write_bytes(b"")
    (package / "_build_info.py").write_text("")
"""


@pytest.fixture(scope="session")
def build_checks() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("build_checks", ROOT / "tools/build_checks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_checks"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree as a clone would be, for builds to leave their traces in."""
    skipped = ("build", "build-*", "dist", ".*", "*.egg-info", "__pycache__", "*.so", "results")
    skipped += ("_build_info.py",)
    target = tmp_path_factory.mktemp("source") / "tree"
    return Path(shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*skipped)))


def make_python(folder: Path, packages: list[Path], programs: dict[str, str]) -> Path:
    """Makes an environment with these packages alone, and these scripts beside its Python."""
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for package in packages:
        (site / package.name).symlink_to(package)
    for name, text in programs.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    return folder / "bin" / "python"


def setuptools_packages() -> list[Path]:
    patterns = ("setuptools*", "pkg_resources", "_distutils_hack", "wheel*")
    return [path for pattern in patterns for path in SITE.glob(pattern)]


def make_torch(
    folder: Path, version: str, *, cuda: str | None = None, hip: str | None = None
) -> Path:
    """Makes a package that looks to a build as torch does."""
    torch_folder = folder / "torch"
    config = torch_folder / "share/cmake/Torch"
    config.mkdir(parents=True)
    (config / "TorchConfig.cmake").write_text("CXX_STANDARD 17\n")
    (torch_folder / "__init__.py").touch()
    (torch_folder / "version.py").write_text(
        f"__version__ = {version!r}\ncuda = {cuda!r}\nhip = {hip!r}\n"
    )
    return torch_folder


Build = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def build(source: Path, tmp_path: Path) -> Build:
    """Returns a function that runs a build, of a wheel, in an environment with a given torch."""

    def run(
        torch_folder: Path | None, *, what: str = BUILD_WHEEL, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        packages = setuptools_packages() + ([torch_folder] if torch_folder else [])
        fake = {"cmake": FAKE_CMAKE, "ninja": ""}
        python = make_python(tmp_path / "environment", packages, fake)
        return subprocess.run(
            [python, "-c", what],
            cwd=source,
            env={"PATH": os.environ["PATH"], **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def assert_one_sentence(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line.startswith("torch_offload: ")]
    assert len(said) == 1, result.stderr
    for word in words:
        assert word in said[0]
    assert "Traceback" not in result.stderr


def test_build_without_torch_fails_with_one_sentence(build: Build) -> None:
    result = build(None)
    assert_one_sentence(result, "torch is not installed", "--no-build-isolation")


def test_build_with_old_torch_fails_with_one_sentence(build: Build, tmp_path: Path) -> None:
    result = build(make_torch(tmp_path, "2.10.1"))
    assert_one_sentence(result, "torch 2.10.1 is too old", "2.11")


def test_build_with_rocm_torch_fails_with_one_sentence(build: Build, tmp_path: Path) -> None:
    result = build(make_torch(tmp_path, "2.11.0+rocm7", hip="7.0"))
    assert_one_sentence(result, "ROCm")


def test_build_without_compiler_fails_with_one_sentence(build: Build, tmp_path: Path) -> None:
    result = build(make_torch(tmp_path, "2.11.0"), PATH=str(tmp_path))
    assert_one_sentence(result, "No C++ compiler found", "apt install g++")


def test_build_with_compiler_of_cxx_missing_fails_naming_it(build: Build, tmp_path: Path) -> None:
    result = build(make_torch(tmp_path, "2.11.0"), CXX="no-such-compiler -m64")
    assert_one_sentence(result, "no-such-compiler", "CXX")


def test_build_without_python_headers_fails(
    build_checks: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build_checks.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(build_checks.BuildError, match=r"headers of Python .*apt install python3"):
        build_checks.check_python_headers()


@pytest.mark.parametrize(
    ("system", "machine"),
    [("Windows", "AMD64"), ("Darwin", "arm64"), ("Linux", "aarch64")],
)
def test_build_on_another_platform_fails(
    build_checks: types.ModuleType, monkeypatch: pytest.MonkeyPatch, system: str, machine: str
) -> None:
    monkeypatch.setattr(build_checks.platform, "system", lambda: system)
    monkeypatch.setattr(build_checks.platform, "machine", lambda: machine)
    with pytest.raises(build_checks.BuildError, match=f"Linux x86-64 only, not on {system}"):
        build_checks.check_all()


def test_build_without_cmake_fails(
    build_checks: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_checks.shutil, "which", lambda name, path=None: None)
    with pytest.raises(build_checks.BuildError, match=r"cmake is missing: `pip install cmake"):
        build_checks.find_cmake()


def test_build_with_old_setuptools_and_no_wheel_fails(
    build_checks: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "setuptools", types.SimpleNamespace(__version__="65.5.0"))
    monkeypatch.setitem(sys.modules, "wheel", None)
    monkeypatch.setattr(build_checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build_checks.BuildError, match=r"setuptools 65\.5\.0 cannot build a wheel"):
        build_checks.check_setuptools()


CUDA_HEADERS = ("cuda_runtime_api.h", "cublas_v2.h", "cusparse.h", "cusolverDn.h")


def make_cuda(folder: Path, headers: tuple[str, ...], library: str) -> Path:
    for header in headers:
        path = folder / "include" / header
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / library).mkdir(parents=True)
    (folder / library / "libcudart.so.13").touch()
    return folder


def test_cuda_headers_of_the_packages_come_before_those_of_a_toolkit(
    build_checks: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    complete = (*CUDA_HEADERS, "crt/host_defines.h", "nv/target")
    packages = make_cuda(tmp_path / "site/nvidia/cu13", complete, "lib")
    toolkit = make_cuda(tmp_path / "toolkit", complete, "lib64")
    monkeypatch.setattr(build_checks, "_toolkits", lambda: [toolkit])
    found = build_checks.find_cuda(tmp_path / "site/torch", "13.0")
    assert found == ((packages / "include",), packages / "lib/libcudart.so.13")


def test_cuda_headers_of_a_toolkit_serve_where_the_packages_lack_some(
    build_checks: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_cuda(tmp_path / "site/nvidia/cu13", CUDA_HEADERS, "lib")
    in_cccl = (*CUDA_HEADERS, "crt/host_defines.h", "cccl/nv/target")
    toolkit = make_cuda(tmp_path / "toolkit", in_cccl, "lib64")
    monkeypatch.setattr(build_checks, "_toolkits", lambda: [toolkit])
    include_dirs, cudart = build_checks.find_cuda(tmp_path / "site/torch", "13.0")
    assert include_dirs == (toolkit / "include", toolkit / "include/cccl")
    assert cudart == toolkit / "lib64/libcudart.so.13"


def test_cuda_headers_incomplete_everywhere_fails_naming_the_packages(
    build_checks: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_cuda(tmp_path / "site/nvidia/cu13", CUDA_HEADERS, "lib")
    monkeypatch.setattr(build_checks, "_toolkits", list)
    with pytest.raises(build_checks.BuildError, match=r"nvidia-cuda-crt==13\.0\.\*"):
        build_checks.find_cuda(tmp_path / "site/torch", "13.0")


# ---- what is built -----------------------------------------------------------------------------


def test_sdist_contains_every_source_and_nothing_built(source: Path, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    assert archive.name == f"torch_offload-{_version.__version__}.tar.gz"
    with tarfile.open(archive) as tar:
        members = [member.name.split("/", 1) for member in tar.getmembers() if member.isfile()]
    names = {name for _, name in members}
    tracked = {
        str(path.relative_to(source))
        for folder in ("csrc", "cmake", "tools", "torch_offload", "requirements", "tests/cpp")
        for path in (source / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert names >= tracked | {"setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile"}
    assert not {name for name in names if name.endswith((".so", ".pyc"))}
    assert "torch_offload/_build_info.py" not in names


def test_wheel_contains_the_package_the_extension_and_the_licence_only(
    build: Build, source: Path, tmp_path: Path
) -> None:
    result = build(make_torch(tmp_path, "2.11.0"))
    assert result.returncode == 0, result.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    expected = {
        str(path.relative_to(source))
        for path in (source / "torch_offload").rglob("*")
        if path.suffix in {".py", ".pyi"} or path.name == "py.typed"
    }
    assert package == expected | {f"torch_offload/{MODULE}", "torch_offload/_build_info.py"}
    assert any(name.endswith("/LICENSE") for name in names)
    assert "linux_x86_64" in wheel.name  # not a wheel for any machine


def test_editable_build_puts_the_extension_beside_the_sources(
    build: Build, source: Path, tmp_path: Path
) -> None:
    """What ``pip install --no-build-isolation -e .`` builds, and then installs."""
    built = [source / "torch_offload" / name for name in (MODULE, "_build_info.py")]
    for path in built:
        path.unlink(missing_ok=True)
    (source / "editable").mkdir()
    result = build(make_torch(tmp_path, "2.11.0"), what=BUILD_EDITABLE)
    assert result.returncode == 0, result.stderr
    assert all(path.is_file() for path in built)
    (wheel,) = (source / "editable").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
        archive.extractall(tmp_path / "installed")
    for path in built:
        path.unlink()
    assert not [name for name in files if name.startswith("torch_offload/")], "a copy, not a link"
    # As Python would: what the wheel leaves in site-packages leads to the tree.
    found = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            f"import importlib.util, site; site.addsitedir({str(tmp_path / 'installed')!r})\n"
            "print(importlib.util.find_spec('torch_offload').origin)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(source / "torch_offload" / "__init__.py")


def test_build_calls_cmake_with_its_own_python_and_names_no_source(
    build: Build, source: Path, tmp_path: Path
) -> None:
    (source / "cmake-calls.txt").unlink(missing_ok=True)
    result = build(make_torch(tmp_path, "2.11.0"), MAX_JOBS="3")
    assert result.returncode == 0, result.stderr
    configure, compile_it, install = (source / "cmake-calls.txt").read_text().splitlines()
    assert "-DCMAKE_BUILD_TYPE=Release" in configure
    assert f"-DPython_EXECUTABLE={tmp_path / 'environment/bin/python'}" in configure
    assert compile_it.endswith("--target _C --parallel 3")
    assert install.startswith("--install")
    assert ".cpp" not in (ROOT / "setup.py").read_text()


# ---- what an import refuses --------------------------------------------------------------------


def fake_build_info(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    info = importlib.import_module("torch_offload._build_info")
    values = {name: getattr(info, name) for name in vars(info) if name.isupper()}
    fake = types.SimpleNamespace(**{**values, **changes})
    monkeypatch.setitem(sys.modules, "torch_offload._build_info", fake)


def test_check_of_a_build_that_fits_passes() -> None:
    _build_check.check()


def test_check_under_another_patch_version_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    major, minor = torch.__version__.split(".")[:2]
    fake_build_info(monkeypatch, TORCH_VERSION=f"{major}.{minor}.99")
    _build_check.check()


def test_check_under_another_minor_version_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_build_info(monkeypatch, TORCH_VERSION="2.9.1")
    with pytest.raises(ImportError, match=r"against torch 2\.9\.1.*pip install --no-build-isol"):
        _build_check.check()


def test_check_under_another_kind_of_torch_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_build_info(monkeypatch, TORCH_CUDA_VERSION="" if torch.version.cuda else "13.0")
    with pytest.raises(ImportError, match=r"a CPU build.*pip install"):
        _build_check.check()


def test_check_without_a_build_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_offload._build_info", None)
    with pytest.raises(ImportError, match=r"never built here: run `make build`"):
        _build_check.check()


def test_check_of_an_extension_that_does_not_load_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_offload._C", None)
    with pytest.raises(ImportError, match=r"does not load .*likely causes: .*another Python"):
        _build_check.check()


def test_import_under_another_minor_version_fails_with_one_sentence(tmp_path: Path) -> None:
    package = tmp_path / "torch_offload"
    shutil.copytree(
        ROOT / "torch_offload", package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    info = package / "_build_info.py"
    info.write_text(re.sub(r"(TORCH_VERSION = )\".*\"", r'\1"2.9.1"', info.read_text(), count=1))
    result = subprocess.run(
        [sys.executable, "-c", "import torch_offload"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: torch_offload was built against torch 2.9.1")


# ---- lists that must agree ---------------------------------------------------------------------


def test_version_has_one_source() -> None:
    assert torch_offload.__version__ == _version.__version__
    others = [ROOT / name for name in ("pyproject.toml", "setup.py", "CMakeLists.txt")]
    for path in others:
        assert _version.__version__ not in path.read_text(), path


def test_readme_names_every_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    readme = (ROOT / "README.md").read_text()
    assert project["optional-dependencies"]
    for extra in project["optional-dependencies"]:
        assert f'`".[{extra}]"`' in readme


def test_cmake_lists_every_source_file() -> None:
    listed = (ROOT / "csrc/CMakeLists.txt").read_text()
    for path in (ROOT / "csrc").rglob("*.cpp"):
        assert str(path.relative_to(ROOT / "csrc")) in listed, f"{path} is not built"
    listed = (ROOT / "tests/cpp/CMakeLists.txt").read_text()
    for path in [*(ROOT / "tests/cpp").glob("*.cpp"), *(ROOT / "tests/gpu").glob("*.cpp")]:
        assert path.name in listed, f"{path} is not built"


def test_every_requirement_has_its_version_in_the_one_place() -> None:
    versions = (ROOT / "requirements/versions.txt").read_text()
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", versions, re.MULTILINE))
    normal = {name.lower().replace("_", "-") for name in pinned}
    for path in (ROOT / "requirements").glob("*.txt"):
        if path.name in {"versions.txt", "models.txt"}:  # models.txt pins by hash
            continue
        for line in path.read_text().splitlines():
            if line and not line.startswith(("#", "-r ")):
                assert line.lower().replace("_", "-") in normal, f"{path.name}: {line}"


def test_stub_matches_the_extension() -> None:
    pytest.importorskip("mypy")
    command = [sys.executable, str(ROOT / "tools/check_stub.py")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_extension_passes_nothing_through_iostreams() -> None:
    """They crash beside another C++ runtime; see Note [No numbers through iostreams]."""
    uses = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted((ROOT / "csrc").rglob("*"))
        if path.suffix in (".h", ".cpp", ".cu")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(
            r"#include <(sstream|iostream|fstream|iomanip)>|std::(i|o|)(string|f)stream", line
        )
    ]
    assert uses == []
