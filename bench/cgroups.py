"""A memory control group around a command: the kernel kills what goes over the limit."""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


class MemoryGroup:
    """A group of version 1 or 2, removed at the end. Raises OSError where none can be made."""

    def __init__(self, limit: int) -> None:
        self._old = (ROOT / "memory" / "memory.limit_in_bytes").exists()
        self.path = (ROOT / "memory" if self._old else ROOT) / f"mer-{uuid.uuid4().hex[:8]}"
        self.path.mkdir()
        self.limit(limit)
        swap = self.path / ("memory.memsw.limit_in_bytes" if self._old else "memory.swap.max")
        if swap.exists():
            swap.write_text(str(limit) if self._old else "0")

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(self, *error: object) -> None:
        for _ in range(50):
            try:
                self.path.rmdir()
                return
            except OSError:
                time.sleep(0.1)

    def limit(self, size: int) -> None:
        """Another one, in bytes; it may not be raised where there is a limit for swap as well."""
        (self.path / ("memory.limit_in_bytes" if self._old else "memory.max")).write_text(str(size))

    @property
    def usage(self) -> Path:
        """The file that says how many bytes are charged to the group now."""
        return self.path / ("memory.usage_in_bytes" if self._old else "memory.current")

    @property
    def used(self) -> int:
        return int(self.usage.read_text())

    @property
    def peak(self) -> int:
        """Most bytes that were ever charged to the group, the page cache of its files included."""
        name = "memory.max_usage_in_bytes" if self._old else "memory.peak"
        return int((self.path / name).read_text())

    def join(self) -> None:
        """The calling process and its children are of the group."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def run(self, command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, preexec_fn=self.join, **options)  # type: ignore[call-overload,no-any-return]


class SlowReads:
    """A group of version 1 or 2 that reads slowly from the device of a path, as a throttled volume does.

    For the calling process, from `with` to its end. Raises OSError where none can be made.
    """

    def __init__(self, path: Path) -> None:
        device = path.stat().st_dev
        self._device = f"{os.major(device)}:{os.minor(device)}"
        known = Path("/sys/dev/block", self._device).resolve()
        if (known / "partition").exists():
            self._device = (known.parent / "dev").read_text().strip()
        self._old = (ROOT / "blkio").exists()
        mine = Path("/proc/self/cgroup").read_text().splitlines()
        place = next(line for line in mine if line.split(":")[1] == ("blkio" if self._old else ""))
        self._before = (ROOT / "blkio" if self._old else ROOT) / place.split(":", 2)[2].lstrip("/")
        self.path = (ROOT / "blkio" if self._old else ROOT) / f"mer-{uuid.uuid4().hex[:8]}"

    def __enter__(self) -> SlowReads:
        self.path.mkdir()
        (self.path / "cgroup.procs").write_text(str(os.getpid()))
        return self

    def __exit__(self, *error: object) -> None:
        (self._before / "cgroup.procs").write_text(str(os.getpid()))
        self.path.rmdir()

    def limit(self, rate: int | None) -> None:
        """From now on so many bytes/s; None: as many as there are."""
        if self._old:
            (self.path / "blkio.throttle.read_bps_device").write_text(f"{self._device} {rate or 0}")
        else:
            (self.path / "io.max").write_text(f"{self._device} rbps={rate or 'max'}")
