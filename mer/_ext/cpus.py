"""Which CPUs this process may use: its affinity, the CPU quota of its control groups, memory nodes."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs that the affinity mask and the cgroup quota (version 1 and 2) leave; at least 1.

    A quota of 2.5 CPUs counts as 2: a third thread would be stopped half of the time, and all wait for it.
    root: where /proc and /sys are found.
    """
    quotas = [q for q in (_quota_v2(root), _quota_v1(root)) if q is not None]
    return max(1, int(min([float(len(os.sched_getaffinity(0))), *quotas])))


def numa_nodes(root: Path = Path("/")) -> dict[int, list[int]]:
    """Memory nodes and their CPUs, as far as the affinity mask leaves any; of the first 64 nodes."""
    allowed = os.sched_getaffinity(0)
    nodes = {}
    for path in (root / "sys/devices/system/node").glob("node[0-9]*"):
        cpus = sorted(allowed & _parse_list(_read(path / "cpulist") or ""))
        if cpus and path.name[4:].isdigit() and int(path.name[4:]) < 64:
            nodes[int(path.name[4:])] = cpus
    return dict(sorted(nodes.items()))


def share_cpus(nodes: dict[int, list[int]], n_threads: int) -> list[list[int]]:
    """Of each thread the CPUs of its node: neighbours share one, in proportion to its CPUs.

    Empty with one node.
    """
    if len(nodes) < 2:
        return []
    every = [node for node, cpus in nodes.items() for _ in cpus]
    return [nodes[every[i * len(every) // n_threads]] for i in range(n_threads)]


def _parse_list(text: str) -> set[int]:
    """CPUs of a list such as '0-3,8'; empty for what is none."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            return set()
        found.update(range(int(first), int(last or first) + 1))
    return found


def _quota_v2(root: Path) -> float | None:
    return min(
        (q for d in _group_dirs(root, "", root / "sys/fs/cgroup") if (q := _parse_max(d / "cpu.max"))),
        default=None,
    )


def _quota_v1(root: Path) -> float | None:
    quotas = []
    for group in _group_dirs(root, "cpu", root / "sys/fs/cgroup/cpu"):
        quota = _read(group / "cpu.cfs_quota_us")
        period = _read(group / "cpu.cfs_period_us")
        # -1 stands for no limit
        if quota and period and quota.isdigit() and period.isdigit() and int(quota) > 0 < int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _group_dirs(root: Path, controller: str, mount: Path) -> list[Path]:
    """The process's group of a controller ('' is version 2) and all groups above it: each may have a quota.

    In a container the path may be the host's and not exist here; its group is then the mount itself.
    """
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controller in controllers.split(","):
            relative = PurePosixPath(path).relative_to("/") if path.startswith("/") else PurePosixPath(path)
            return [mount / p for p in (relative, *relative.parents)]
    return [mount]


def _parse_max(path: Path) -> float | None:
    """CPUs of a cpu.max file: 'max 100000' or '150000 100000'."""
    words = (_read(path) or "").split()
    if len(words) != 2 or not all(w.isdigit() for w in words) or int(words[1]) == 0:
        return None
    return int(words[0]) / int(words[1])


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
