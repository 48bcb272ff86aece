"""Results as JSON: one file per subject, written anew after every part."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from clocks import DEVICE, ON_GPU

import torch_offload._version

SCHEMA = 1
_PACKAGES = ("transformers", "accelerate", "pytest-benchmark", "numpy")


def _answer(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""


def machine() -> dict[str, Any]:
    """What the run ran on. No name of the machine: figures compare by kind."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")]
    found: dict[str, Any] = {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": None,
    }
    if ON_GPU:
        properties = torch.cuda.get_device_properties(DEVICE)
        found["gpu"] = properties.name
        found["gpu_memory_bytes"] = properties.total_memory
        found["driver"] = _answer(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    return found


def gpu_state() -> dict[str, float] | None:
    """Clock, power and temperature of the GPU just now. Blocks for some tenths of a second."""
    names = {"sm_clock_mhz": "clocks.sm", "power_w": "power.draw", "celsius": "temperature.gpu"}
    answer = ON_GPU and _answer(
        "nvidia-smi",
        f"--id=GPU-{torch.cuda.get_device_properties(DEVICE).uuid}",
        f"--query-gpu={','.join(names.values())}",
        "--format=csv,noheader,nounits",
    )
    try:
        return dict(zip(names, map(float, str(answer).split(",")), strict=True))
    except ValueError:  # no GPU, or one that does not tell
        return None


def versions() -> dict[str, str]:
    """Of everything that a figure may depend on."""
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda or "none",
        "torch_offload": torch_offload._version.__version__,
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def commit() -> str:
    """The commit that was measured; from TORCH_OFFLOAD_COMMIT where there is no repository."""
    if named := os.environ.get("TORCH_OFFLOAD_COMMIT"):
        return named
    root = str(Path(__file__).resolve().parent.parent)
    head = _answer("git", "-C", root, "rev-parse", "HEAD")
    if not head:
        return "unknown"
    changed = _answer("git", "-C", root, "status", "--porcelain", "--untracked-files=no")
    return head + ("+changes" if changed else "")


@dataclass
class Part:
    """One bench: its figures, and how long it may take.

    A bench fills `figures` only after it has asserted that bits and counts are right.
    """

    subject: str
    name: str
    tiny: bool
    deadline: float
    share_s: float
    figures: dict[str, Any] = field(default_factory=dict)
    status: str = "not run"
    error: str | None = None
    seconds: float = 0.0

    def rounds(
        self, wanted: int, seconds_each: float, *, least: int = 2, weight: float = 1.0
    ) -> int:
        """How many rounds fit `weight` shares of what is left of the file's time.

        Fixed before measuring: a number of rounds that depends on their outcome is a bias.
        """
        if self.tiny:
            return least
        allowed = min(self.share_s * weight, self.deadline - time.monotonic())
        return max(least, min(wanted, int(allowed / seconds_each)))


class Records:
    """All parts of this run, by subject, and their files."""

    def __init__(self, folder: Path, command: str, tiny: bool) -> None:
        self._folder = folder
        self._header = {
            "schema": SCHEMA,
            "tiny": tiny,
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
            "command": command,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self.subjects: dict[str, dict[str, Part]] = {}

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._folder

    def keep(self, part: Part) -> None:
        """Takes a part in and writes its subject's file."""
        self.subjects.setdefault(part.subject, {})[part.name] = part
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{part.subject}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self.document(part.subject), indent=1) + "\n")
        partial.replace(path)

    def keep_result(
        self,
        subject: str,
        name: str,
        figures: dict[str, Any],
        *,
        status: str = "ok",
        error: str | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Takes in what is no bench: it was run by other means, and has no limit of time."""
        part = Part(subject, name, self._header["tiny"], deadline=0.0, share_s=0.0)
        part.figures, part.status, part.error, part.seconds = figures, status, error, seconds
        self.keep(part)

    def document(self, subject: str) -> dict[str, Any]:
        """What the file of a subject holds."""
        parts = {
            name: {
                "status": part.status,
                "error": part.error,
                "seconds": round(part.seconds, 3),
                **part.figures,
            }
            for name, part in self.subjects[subject].items()
        }
        return {**self._header, "subject": subject, "parts": parts}
