"""What the doctor asks the system: files, programs and variables, replaceable by tests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class System:
    """Where files, programs and variables are.

    Attributes:
        root: Stands before /proc and /sys.
        environment: Variables.
    """

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def read(self, path: str) -> str | None:
        """A small file of the system; None if it cannot be read."""
        try:
            return (self.root / path.lstrip("/")).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None

    def paths(self, folder: str, pattern: str) -> list[Path]:
        """Entries of a folder, in order; none if it is not there."""
        return sorted((self.root / folder.lstrip("/")).glob(pattern))

    def run(self, *command: str) -> str | None:
        """What a program prints; None if it is missing, fails, or takes too long."""
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=20, check=True, stdin=-3
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    def query_gpu(self, index: int, fields: Sequence[str]) -> dict[str, str] | None:
        """Fields of one GPU as nvidia-smi knows them; None without it."""
        answer = self.run(
            "nvidia-smi",
            f"--id={index}",
            f"--query-gpu={','.join(fields)}",
            "--format=csv,noheader,nounits",
        )
        values = [value.strip() for value in (answer or "").split(",")]
        return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else None


def parse_cpu_list(text: str) -> set[int]:
    """Returns the numbers in ``"0-3,8"``; none if it is something else."""
    found: set[int] = set()
    try:
        for part in filter(None, text.strip().split(",")):
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    except ValueError:
        return set()
    return found
