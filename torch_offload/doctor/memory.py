"""Host memory: limits, huge pages, and on which node page-locked memory lies."""

from __future__ import annotations

import os
from collections.abc import Iterator

from torch_offload import _C
from torch_offload.doctor.finding import Finding
from torch_offload.doctor.system import System, parse_cpu_list
from torch_offload.sizes import format_size


def look_at_limits(system: System) -> Iterator[Finding]:
    """What a model's masters may take."""
    limits = _C.host_limits(str(system.root).rstrip("/"))
    yield _machine(limits)
    yield _cgroup(limits)
    yield _locked(limits)
    yield _huge_pages(system)


def _machine(limits: _C.HostLimits) -> Finding:
    what = "host memory"
    if limits.total_bytes is None or limits.available_bytes is None:
        return Finding(what, "not tried", "/proc/meminfo does not say")
    available, total = format_size(limits.available_bytes), format_size(limits.total_bytes)
    return Finding(what, "ok", f"{available} available of {total}")


def _cgroup(limits: _C.HostLimits) -> Finding:
    what = "control group"
    if limits.cgroup_limit_bytes is None:
        return Finding(what, "ok", "sets no limit to memory")
    left = limits.cgroup_available_bytes
    rest = "" if left is None else f", of which {format_size(left)} are left"
    limit = format_size(limits.cgroup_limit_bytes)
    return Finding(what, "note", f"limits memory to {limit}{rest}: masters count in full")


def _locked(limits: _C.HostLimits) -> Finding:
    limit = limits.locked_limit_bytes
    text = "none" if limit is None else format_size(limit)
    return Finding(
        "locked-memory limit", "ok", f"{text}; CUDA pins pages without asking for it, see offload()"
    )


def _huge_pages(system: System) -> Finding:
    what = "huge pages"
    text = system.read("/sys/kernel/mm/transparent_hugepage/enabled")
    if text is None:
        return Finding(what, "not tried", "the kernel does not say")
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen == "never":
        return Finding(
            what,
            "off",
            "switched off",
            "offload() touches and pins every page of 4 KiB by itself, which takes longer",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )
    return Finding(what, "ok", chosen or text)


def look_at_cpus(system: System) -> Iterator[Finding]:
    """How many processors there are for launching kernels and for all else."""
    cpus = os.sched_getaffinity(0)
    count = len(cpus)
    if count == 1:
        yield Finding(
            "processors",
            "off",
            "this process may use one",
            "on the host device copies and kernels take turns; on a GPU, launching competes with "
            "all other work",
            "give it a second one: see taskset and the container's limits",
        )
    else:
        yield Finding("processors", "ok", f"{count} for this process")


def look_at_placement(system: System, gpu_node: int | None, pinned_nodes: set[int]) -> Finding:
    """Whether masters lie on the node that the GPU is attached to.

    Args:
        system: What to ask.
        gpu_node: Node of the GPU; None if there is no GPU, or its node is not known.
        pinned_nodes: Nodes on which page-locked memory of this process was found.
    """
    what = "NUMA placement"
    nodes = {
        int(path.name.removeprefix("node")): parse_cpu_list(
            system.read(f"/sys/devices/system/node/{path.name}/cpulist") or ""
        )
        for path in system.paths("/sys/devices/system/node", "node[0-9]*")
    }
    if len(nodes) <= 1:
        return Finding(what, "ok", "one node: all memory is equally near")
    if gpu_node is None:
        return Finding(what, "not tried", f"{len(nodes)} nodes, but no GPU whose node is known")
    if pinned_nodes and pinned_nodes != {gpu_node}:
        others = ", ".join(str(node) for node in sorted(pinned_nodes))
        return Finding(
            what,
            "off",
            f"page-locked memory lies on node {others}, the GPU on node {gpu_node}",
            "copies cross the link between the sockets; compare the measured rate",
            f"numactl --cpunodebind={gpu_node} --membind={gpu_node} python ...",
        )
    near = nodes.get(gpu_node, set())
    if near and not near & os.sched_getaffinity(0):
        return Finding(
            what,
            "off",
            f"this process runs on processors far from the GPU's node {gpu_node}",
            "memory that it touches first lies far away, and launching takes longer",
            f"numactl --cpunodebind={gpu_node} python ...",
        )
    return Finding(what, "ok", f"memory and processors on the GPU's node {gpu_node}")


def nodes_of(system: System, address: int) -> set[int]:
    """Nodes on which the pages of a mapping lie; none where the kernel does not say."""
    for line in (system.read("/proc/self/numa_maps") or "").splitlines():
        first, *fields = line.split()
        if int(first, 16) == address:
            return {
                int(field.partition("=")[0][1:])
                for field in fields
                if field[:1] == "N" and field[1:2].isdigit()
            }
    return set()
