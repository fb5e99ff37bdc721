"""Signs that memory is short: how much of it is left, and how long tasks have waited for some."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Final

from mer.streaming.machine import memory

# Waiting anywhere on the machine concerns this process where no more than this share of memory is available.
_SCARCE: Final = 0.1


class Gauge:
    """Reads the signs. root: where /proc and /sys are found; clock: seconds."""

    def __init__(self, root: Path = Path("/"), clock: Callable[[], float] = time.monotonic) -> None:
        self._root = root
        self._clock = clock
        own = _group(root)
        self._own = own is not None
        self._file = own or root / "proc/pressure/memory"
        self._last = (clock(), self._stalled_us())

    def read(self) -> tuple[int, float]:
        """Bytes that are left to this process, and the share of the time since the last call in which a task
        waited for memory; 0 where the kernel does not say.

        All page cache counts as left: of what is needed there, tasks that wait tell. The waiting is that of
        this process's control group (version 2); else the machine's, which counts where memory is scarce.
        """
        found = memory(self._root, active=True)
        now, stalled = self._clock(), self._stalled_us()
        before, stalled_before = self._last
        self._last = now, stalled
        share = (stalled - stalled_before) / 1e6 / max(now - before, 1e-3)
        counts = self._own or found.available < _SCARCE * found.total
        return found.available, share if counts else 0.0

    def _stalled_us(self) -> int:
        """Microseconds, in all, in which some task waited."""
        try:
            for line in self._file.read_text().splitlines():
                kind, *fields = line.split()
                if kind == "some":
                    return next(int(each[6:]) for each in fields if each.startswith("total="))
        except (OSError, ValueError, StopIteration):
            pass
        return 0


def _group(root: Path) -> Path | None:
    """The file of this process's own control group."""
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        number, _, path = line.partition("::")
        if number == "0" and path:
            # In a container the path may be the host's; its own group is the mount itself then.
            for place in (mount / PurePosixPath(path.lstrip("/")), mount):
                if (place / "memory.pressure").exists():
                    return place / "memory.pressure"
    return None
