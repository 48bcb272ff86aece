"""The doctor, shown machines that are not this one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from rich.console import Console

from torch_offload import _C
from torch_offload.doctor import Diagnosis, Finding, diagnose
from torch_offload.doctor import gpu as gpu_module
from torch_offload.doctor import versions as versions_module
from torch_offload.doctor.gpu import Link, judge_decoder, judge_link, judge_overlap, read_link
from torch_offload.doctor.memory import (
    look_at_cpus,
    look_at_limits,
    look_at_placement,
    nodes_of,
)
from torch_offload.doctor.system import System, parse_cpu_list
from torch_offload.doctor.versions import look_at_variables, look_at_versions


class FakeSystem(System):
    """A machine made of files under a folder and answers of nvidia-smi."""

    def __init__(
        self, root: Path, files: dict[str, str], answers: dict[str, str] | None = None
    ) -> None:
        super().__init__(root=root, environment={})
        object.__setattr__(self, "answers", answers or {})
        for path, text in files.items():
            file = root / path.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    def run(self, *command: str) -> str | None:
        answers: dict[str, str] = vars(self)["answers"]
        return next((text for word, text in answers.items() if word in " ".join(command)), None)


def found_in(findings: object, what: str) -> Finding:
    assert hasattr(findings, "__iter__")
    return next(finding for finding in findings if finding.what == what)


# ---- memory ------------------------------------------------------------------------------------


def test_limits_are_read_and_said(tmp_path: Path) -> None:
    system = FakeSystem(
        tmp_path,
        {
            "/proc/meminfo": "MemTotal:  8388608 kB\nMemAvailable:  4194304 kB\nHugePages: 0\n",
            "/proc/self/cgroup": "0::/jobs/7\n",
            "/sys/fs/cgroup/jobs/7/memory.max": str(2**31),
            "/sys/fs/cgroup/jobs/7/memory.current": str(2**30),
            "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
        },
    )
    findings = list(look_at_limits(system))
    assert found_in(findings, "host memory").value == "4.00 GiB available of 8.00 GiB"
    assert "2.00 GiB, of which 1.00 GiB are left" in found_in(findings, "control group").value
    assert found_in(findings, "huge pages") == Finding("huge pages", "ok", "madvise")


def test_no_limit_is_no_note(tmp_path: Path) -> None:
    group = "/sys/fs/cgroup/memory"
    files = {
        f"{group}/memory.limit_in_bytes": "9223372036854771712",
        f"{group}/memory.usage_in_bytes": "4096",
    }
    found = found_in(look_at_limits(FakeSystem(tmp_path, files)), "control group")
    assert found == Finding("control group", "ok", "sets no limit to memory")


def test_machine_that_tells_nothing_is_not_judged(tmp_path: Path) -> None:
    findings = list(look_at_limits(FakeSystem(tmp_path, {})))
    assert found_in(findings, "host memory").status == "not tried"
    assert found_in(findings, "huge pages").status == "not tried"


def test_huge_pages_switched_off_are_off(tmp_path: Path) -> None:
    path = "/sys/kernel/mm/transparent_hugepage/enabled"
    found = found_in(
        look_at_limits(FakeSystem(tmp_path, {path: "always madvise [never]"})), "huge pages"
    )
    assert found.status == "off"
    assert path in found.mend


def test_one_processor_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert next(look_at_cpus(System())).status == "off"


@pytest.mark.parametrize(
    ("gpu_node", "pinned", "affinity", "status"),
    [
        (0, {0}, {0, 1}, "ok"),
        (1, {0}, {2, 3}, "off"),
        (1, {1}, {0, 1}, "off"),
        (None, set(), {0}, "not tried"),
    ],
)
def test_placement_is_judged_by_the_node_of_the_gpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpu_node: int | None,
    pinned: set[int],
    affinity: set[int],
    status: str,
) -> None:
    nodes = "/sys/devices/system/node"
    system = FakeSystem(
        tmp_path, {f"{nodes}/node0/cpulist": "0-1\n", f"{nodes}/node1/cpulist": "2-3\n"}
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: affinity)
    found = look_at_placement(system, gpu_node, pinned)
    assert found.status == status
    assert bool(found.cost) == (status == "off")


def test_one_node_is_near_to_everything(tmp_path: Path) -> None:
    system = FakeSystem(tmp_path, {"/sys/devices/system/node/node0/cpulist": "0-7"})
    assert look_at_placement(system, None, set()).status == "ok"


def test_nodes_of_a_mapping_are_read(tmp_path: Path) -> None:
    text = (
        "7f0000000000 default anon=9 dirty=9 N0=4 N3=5 kernelpagesize_kB=4\n7f1000000000 default\n"
    )
    system = FakeSystem(tmp_path, {"/proc/self/numa_maps": text})
    assert nodes_of(system, 0x7F0000000000) == {0, 3}
    assert nodes_of(system, 0x7F1000000000) == nodes_of(system, 1) == set()


def test_lists_of_processors_are_read() -> None:
    assert parse_cpu_list("0-2,8\n") == {0, 1, 2, 8}
    assert parse_cpu_list("") == parse_cpu_list("none") == set()


# ---- driver and variables ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "runtime", "status"),
    [(13010, "13.0", "ok"), (13000, "13.0", "ok"), (12080, "13.0", "off"), (0, "13.0", "off")],
)
def test_driver_is_held_against_the_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, runtime: str, status: str
) -> None:
    monkeypatch.setattr(versions_module, "_driver_supports", lambda: number)
    monkeypatch.setattr(torch.version, "cuda", runtime)
    system = FakeSystem(tmp_path, {"/proc/driver/nvidia/version": "NVRM version: 580"})
    found = found_in(look_at_versions(system), "driver")
    assert found.status == status
    assert bool(found.mend) == (status == "off")


def test_build_without_cuda_under_a_torch_with_it_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_C, "has_cuda", False)
    found = found_in(look_at_versions(FakeSystem(tmp_path, {})), "CUDA build")
    assert found.status == "off"
    assert "pip install" in found.mend


@pytest.mark.parametrize(
    ("name", "status"),
    [("CUDA_LAUNCH_BLOCKING", "off"), ("CUDA_DEVICE_MAX_CONNECTIONS", "note")],
)
def test_variables_that_serialize_are_found(name: str, status: str) -> None:
    (found,) = look_at_variables(System(environment={name: "1"}))
    assert (found.what, found.status) == (name, status)
    assert list(look_at_variables(System(environment={name: "8"}))) == []


# ---- link and overlap --------------------------------------------------------------------------


def smi(generation: str, width: str) -> dict[str, str]:
    return {"pcie.link.gen.current": f"00000000:1B:00.0, {generation}, 5, {width}, 16"}


def test_decoder_that_was_not_built_is_off() -> None:
    assert judge_decoder(True).status == "ok"
    missing = judge_decoder(False)
    assert missing.status == "off"
    assert "nvcc" in missing.mend


def test_link_is_read_from_nvidia_smi(tmp_path: Path) -> None:
    assert read_link(FakeSystem(tmp_path, {}, smi("5", "16")), 0) == Link(5, 5, 16, 16)
    assert read_link(FakeSystem(tmp_path, {}, smi("[N/A]", "16")), 0) is None
    assert read_link(FakeSystem(tmp_path, {}), 0) is None


def test_full_link_at_its_rate_is_ok() -> None:
    link, copies = judge_link(Link(5, 5, 16, 16), 55.2e9)
    assert (link.status, copies.status) == ("ok", "ok")
    assert "55.2 GB/s; the link should give 55.2 GB/s" in copies.value


def test_narrow_or_slow_link_says_what_it_costs() -> None:
    link, copies = judge_link(Link(4, 5, 8, 16), 13.5e9)
    assert link.status == "off"
    assert link.value == "PCIe 4 x8, of PCIe 5 x16"
    assert "4.0 times as long" in link.cost
    assert copies.status == "ok", "for what the link is, the rate is right"


def test_rate_below_what_the_link_gives_is_off() -> None:
    link, copies = judge_link(Link(5, 5, 16, 16), 27.6e9)
    assert (link.status, copies.status) == ("ok", "off")
    assert "2.0 times as long" in copies.cost


def test_unknown_link_is_not_judged() -> None:
    link, copies = judge_link(None, 27.6e9)
    assert (link.status, copies.status) == ("not tried", "note")


@pytest.mark.parametrize(
    ("both_s", "status", "share"), [(0.101, "ok", "99 %"), (0.2, "off", "0 %"), (0.3, "off", "0 %")]
)
def test_overlap_is_judged_by_what_disappears(both_s: float, status: str, share: str) -> None:
    found = judge_overlap(0.1, 0.1, both_s)
    assert found.status == status
    assert share in found.value


# ---- all of it ---------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_nothing_of_it_is_claimed() -> None:
    heard: list[str] = []
    found = diagnose(progress=heard.append)
    assert found_in(found.findings, "GPU").status == "not tried"
    untouched = {"link", "copies to the GPU", "a copy beside a kernel", "NVLink"}
    assert not untouched & {finding.what for finding in found.findings}
    assert "could not be tried" in found.verdict
    assert len(heard) >= 3


@pytest.mark.needs_cuda
def test_with_a_gpu_link_rate_and_overlap_are_measured() -> None:
    found = diagnose()
    assert {"GPU", "copies to the GPU", "a copy beside a kernel", "NUMA placement"} <= {
        finding.what for finding in found.findings
    }
    copy_s, compute_s, both_s = gpu_module.measure_overlap(torch.device("cuda", 0))
    assert 0 < both_s < 1.5 * (copy_s + compute_s)


def test_diagnosis_prints_cost_and_mend_and_counts_what_is_off() -> None:
    found = Diagnosis(
        (
            Finding("a", "ok", "fine"),
            Finding("b", "off", "bad", "twice the time", "turn it"),
            Finding("c", "not tried", "unseen"),
        )
    )
    console = Console(width=60, color_system=None)
    with console.capture() as capture:
        console.print(found)
    assert "costs: twice the time" in capture.get()
    assert "mend: turn it" in capture.get()
    assert found.verdict == "1 off: b; 1 could not be tried"
