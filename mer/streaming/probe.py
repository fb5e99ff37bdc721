"""What the device under a path delivers: O_DIRECT, the back end, bandwidth by queue depth."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

from mer._ext.uring import Reader, dio_alignment
from mer.errors import ConfigError
from mer.streaming.machine import file_system, rotational

DEPTHS = (1, 2, 4, 8, 16, 32, 64)
FILE_BYTES = 1 << 30
LEAST_FILE_BYTES = 64 << 20
# The depth to use is the least that comes this near to the best.
NEAR_BEST = 0.95


@frozen
class DepthRate:
    depth: int
    bytes_per_second: float


@frozen
class Device:
    """What was found about the file system and the device under `path`."""

    path: str
    file_system: str
    direct: bool
    dio_alignment: tuple[int, int] | None  # of addresses and offsets, bytes; None: the kernel does not say
    backend: str
    why: str
    block: int
    rates: tuple[DepthRate, ...]
    rotational: bool | None = None  # None: the kernel does not say

    @property
    def best(self) -> float:
        """Bytes per second at the best depth."""
        return max(rate.bytes_per_second for rate in self.rates)

    @property
    def depth(self) -> int:
        """The least queue depth that gives nearly the best rate."""
        return next(r.depth for r in self.rates if r.bytes_per_second >= NEAR_BEST * self.best)


def uring_refusal() -> str | None:
    """Why this process can't have io_uring, or None when it can."""
    try:
        Reader([], backend="uring").close()
    except ConfigError as e:
        return str(e)
    return None


def probe(
    path: Path,
    *,
    block: int = 1 << 20,
    depths: Sequence[int] = DEPTHS,
    seconds: float = 0.4,
    report: Callable[[str], None] = lambda _: None,
) -> Device:
    """Measures random reads of `block` bytes on the device under `path`, `seconds` for each depth.

    path: an existing file of at least `block` bytes, or a directory in which to make a temporary one that
    never has a name. block: bytes, a multiple of 4096. report: told what is being done.
    Raises ConfigError for what can't be measured: path missing, not writable, too small, no room.
    """
    if block < 4096 or block % 4096:
        raise ConfigError(f"block size {block}: must be a multiple of 4096")
    try:
        with _file_to_read(path, block, report) as name, Reader([name]) as reader:
            best = dict.fromkeys(depths, 0.0)
            for depth in [*depths, *depths]:  # twice, so that a passing disturbance spoils none
                report(f"reading blocks of {block >> 10} KiB, {depth} at once")
                best[depth] = max(best[depth], _rate(name, reader.backend, block, depth, seconds / 2))
            return Device(
                path=str(path),
                file_system=file_system(path),
                direct=reader.alignment > 1,
                dio_alignment=dio_alignment(name),
                backend=reader.backend,
                why=reader.why,
                block=block,
                rates=tuple(DepthRate(*item) for item in best.items()),
                rotational=rotational(path),
            )
    except OSError as e:
        raise ConfigError(
            f"{path}: {os.strerror(e.errno or 0)}; name a readable file or a writable directory"
        ) from e


def _rate(name: str, backend: str, block: int, depth: int, seconds: float) -> float:
    with Reader([name], backend=backend, queue_depth=depth, threads=depth) as reader:
        done, elapsed = reader.measure(0, block, depth, seconds)
        return done / elapsed


@contextmanager
def _file_to_read(path: Path, block: int, report: Callable[[str], None]) -> Iterator[str]:
    if not path.exists():
        raise ConfigError(f"{path}: no such file or directory")
    if path.is_file():
        if path.stat().st_size < block:
            raise ConfigError(
                f"{path}: smaller than one block of {block} bytes; name a larger file or a directory"
            )
        yield str(path)
        return
    if not path.is_dir():
        raise ConfigError(f"{path}: neither a file nor a directory")
    size = _affordable(path, block)
    report(f"writing a temporary file of {size >> 20} MiB")
    with tempfile.TemporaryFile(dir=path, buffering=0) as file:
        # Random bytes, because a device or a file system may compress.
        chunk = random.randbytes(4 << 20)
        for at in range(0, size, len(chunk)):
            file.write(chunk[: size - at])
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield f"/proc/self/fd/{file.fileno()}"


def _affordable(path: Path, block: int) -> int:
    """Bytes of the temporary file: a gigabyte, or half of what is free."""
    free = os.statvfs(path).f_bavail * os.statvfs(path).f_frsize
    size = min(FILE_BYTES, free // 2) // block * block
    if size < max(LEAST_FILE_BYTES, block):
        raise ConfigError(
            f"{path}: {free >> 20} MiB are free, too little to measure; free some, or name a large file"
        )
    return size
