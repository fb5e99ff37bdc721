"""What the machine and the control groups of this process allow: memory, huge pages, memlock, processor."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from attrs import frozen

_CAP_IPC_LOCK = 14
# Version 1 writes "no limit" as the largest multiple of a page.
_NO_LIMIT = 1 << 60


@frozen
class Memory:
    """Bytes. `limit` and `limit_from` are None where no control group limits this process."""

    total: int
    available: int  # to this process: what the machine has free, or what its control group leaves
    limit: int | None
    limit_from: str | None


@frozen
class Machine:
    """Facts about this machine; sizes in bytes, None where it does not say."""

    kernel: str
    cpu_model: str
    io_uring_disabled: int | None  # the sysctl: 0 allowed, 1 for a group only, 2 forbidden
    huge_pages: str | None  # transparent huge pages: 'always', 'madvise' or 'never'
    memlock: int | None  # None: unlimited
    may_exceed_memlock: bool
    open_files: int | None  # limits of this process; None: unlimited
    address_space: int | None
    governor: str | None  # of the first processor's frequency
    memory: Memory


def describe(root: Path = Path("/")) -> Machine:
    """The facts. root: where /proc and /sys are found."""
    disabled = _read(root / "proc/sys/kernel/io_uring_disabled")
    modes = _read(root / "sys/kernel/mm/transparent_hugepage/enabled") or ""
    capabilities = int(_field(root / "proc/self/status", "CapEff") or "0", 16)
    return Machine(
        kernel=platform.release(),
        cpu_model=_field(root / "proc/cpuinfo", "model name") or platform.machine(),
        io_uring_disabled=int(disabled) if disabled and disabled.isdigit() else None,
        huge_pages=modes.partition("[")[2].partition("]")[0] or None,
        memlock=_limit(resource.RLIMIT_MEMLOCK),
        may_exceed_memlock=bool(capabilities >> _CAP_IPC_LOCK & 1),
        open_files=_limit(resource.RLIMIT_NOFILE),
        address_space=_limit(resource.RLIMIT_AS),
        governor=_read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        memory=memory(root),
    )


def _limit(kind: int) -> int | None:
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft


def memory(root: Path = Path("/"), *, active: bool = False) -> Memory:
    """Memory of the machine, and what this process's control groups (version 1 or 2) leave of it.

    Page cache that was not used lately counts as available; `active`: all of a group's page cache.
    """
    total, available = (_kilobytes(root, key) for key in ("MemTotal", "MemAvailable"))
    tightest, tightest_from = None, None
    for directory, version in _groups(root):
        limit_file, used_file, *cache_keys = _FILES[version]
        limit = _number(directory / limit_file)
        soft = _number(directory / _SOFT)
        if soft is not None and (limit is None or soft < limit):
            limit, limit_file = soft, _SOFT
        if limit is None or limit >= min(total or _NO_LIMIT, _NO_LIMIT):
            continue
        cached = _reclaimable(directory / "memory.stat", cache_keys[: 1 + active])
        used = (_number(directory / used_file) or 0) - cached
        available = min(available, max(limit - used, 0))
        if tightest is None or limit < tightest:
            tightest, tightest_from = limit, str(directory / limit_file)
    return Memory(total=total, available=available, limit=tightest, limit_from=tightest_from)


# Limit, usage, and the parts of the usage that are page cache: not used lately, and used.
_SOFT = "memory.high"  # of version 2: beyond it processes are slowed down
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file"),
    2: ("memory.max", "memory.current", "inactive_file", "active_file"),
}


def _groups(root: Path) -> list[tuple[Path, int]]:
    """This process's memory groups and all above them, each of which may have a limit.

    In a container the path may be the host's; its own group is then the mount itself.
    """
    mounts = root / "sys/fs/cgroup"
    found = [(mounts / "memory", 1), (mounts, 2)]
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        relative = PurePosixPath(path.lstrip("/"))
        for part in [relative, *relative.parents][:-1]:
            if "memory" in controllers.split(","):
                found.append((mounts / "memory" / part, 1))
            elif controllers == "":
                found.append((mounts / part, 2))
    return found


def _reclaimable(stat: Path, keys: Sequence[str]) -> int:
    pairs = (line.partition(" ") for line in (_read(stat) or "").splitlines())
    return sum(int(value) for name, _, value in pairs if name in keys and value.isdigit())


def _kilobytes(root: Path, key: str) -> int:
    words = (_field(root / "proc/meminfo", key) or "0 kB").split()
    return int(words[0]) * 1024


def _field(path: Path, key: str) -> str | None:
    for line in (_read(path) or "").splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip() == key:
            return value.strip()
    return None


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text and text.isdigit() else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def file_system(path: Path, root: Path = Path("/")) -> str:
    """The type of the file system that holds `path`, such as 'ext4'; 'unknown' where /proc does not say."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    best, best_length = "unknown", -1
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        mount, _, rest = line.partition(" - ")
        fields = mount.split()
        if len(fields) < 5 or not rest:
            continue
        # btrfs and overlays give files another device number than their mount: then the longest path counts
        inside = path.resolve().is_relative_to(fields[4])
        rank = len(fields[4]) + (10_000 if fields[2] == wanted else 0)
        if inside and rank > best_length:
            best, best_length = rest.split()[0], rank
    return best


def rotational(path: Path, root: Path = Path("/")) -> bool | None:
    """Whether the device below `path` turns; None where the kernel does not say."""
    number = os.stat(path).st_dev
    device = (root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    for place in (device, device.parent):  # a partition's queue is its device's
        said = _read(place / "queue/rotational")
        if said is not None:
            return said == "1"
    return None
