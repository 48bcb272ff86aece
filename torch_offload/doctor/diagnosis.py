"""All findings in their order, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from torch_offload.doctor.finding import Finding, Status
from torch_offload.doctor.gpu import gpu_node, look_at_gpus, pinned_nodes
from torch_offload.doctor.memory import look_at_cpus, look_at_limits, look_at_placement
from torch_offload.doctor.system import System
from torch_offload.doctor.versions import look_at_variables, look_at_versions

_STYLES: dict[Status, str] = {"ok": "green", "off": "bold red", "note": "cyan", "not tried": "dim"}


@dataclass(frozen=True)
class Diagnosis:
    """What was looked at on this machine."""

    findings: tuple[Finding, ...]

    @property
    def off(self) -> list[Finding]:
        """What costs something."""
        return [finding for finding in self.findings if finding.status == "off"]

    @property
    def verdict(self) -> str:
        """One line."""
        untried = sum(finding.status == "not tried" for finding in self.findings)
        rest = f"; {untried} could not be tried" if untried else ""
        if not self.off:
            return f"nothing is off{rest}"
        names = ", ".join(finding.what for finding in self.off)
        return f"{len(self.off)} off: {names}{rest}"

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "findings": [asdict(finding) for finding in self.findings],
            "verdict": self.verdict,
        }

    def __rich__(self) -> RenderableType:
        """For a terminal."""
        table = Table(show_lines=False)
        table.add_column("looked at", no_wrap=True)
        table.add_column("", no_wrap=True)
        table.add_column("found", overflow="fold")
        for finding in self.findings:
            text = Text(finding.value)
            if finding.cost:
                text.append(f"\ncosts: {finding.cost}")
            if finding.mend:
                text.append(f"\nmend: {finding.mend}")
            table.add_row(finding.what, Text(finding.status, _STYLES[finding.status]), text)
        return Group(table, Text(self.verdict, style="bold"))


def diagnose(
    system: System | None = None, progress: Callable[[str], None] = lambda what: None
) -> Diagnosis:
    """Looks at everything. Blocks for some seconds where there is a GPU; changes nothing.

    Args:
        system: What to ask; this machine if None.
        progress: Told what is being looked at.
    """
    return Diagnosis(tuple(_findings(system or System(), progress)))


def _findings(system: System, progress: Callable[[str], None]) -> Iterator[Finding]:
    progress("versions")
    yield from look_at_versions(system)
    yield from look_at_variables(system)
    progress("host memory")
    yield from look_at_cpus(system)
    yield from look_at_limits(system)
    progress("the GPU and its link")
    yield from look_at_gpus(system)
    progress("NUMA placement")
    yield look_at_placement(system, gpu_node(system), pinned_nodes(system))
