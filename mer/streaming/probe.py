"""What the device under a path delivers: O_DIRECT, the back end, bandwidth by queue depth."""

from __future__ import annotations

import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mer._ext.uring import Reader, dio_alignment
from mer.errors import ConfigError
from mer.streaming.machine import file_system, rotational

DEPTHS = (1, 2, 4, 8, 16, 32, 64)
FILE_BYTES = 1 << 30
LEAST_FILE_BYTES = 64 << 20
# The depth to use is the least that comes this near to the best, and at least what the device does in the
# time in which the computing thread may not look what was read: it has a batch of experts to multiply.
NEAR_BEST = 0.95
UNSEEN_S = 0.01


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
        """The queue depth to use, see enough()."""
        return enough(self.rates, self.block, self.block)


def enough(rates: Sequence[DepthRate], block: int, size: int) -> int:
    """The queue depth, one of DEPTHS, for reads of `size` bytes where `rates` are of reads of `block` bytes.

    The least that gives nearly the best rate and is some UNSEEN_S seconds of the device's work, so that few
    prefetches are ahead of a demand read; never a single read, which would leave it idle after each.
    """
    best = max(rate.bytes_per_second for rate in rates)
    least = next(rate.depth for rate in rates if rate.bytes_per_second >= NEAR_BEST * best)
    wanted = max(2, least * block / size, best * UNSEEN_S / size)
    return next((depth for depth in DEPTHS if depth >= wanted), DEPTHS[-1])


def measure_rates(
    reader: Reader,
    file: int,
    block: int,
    depths: Sequence[int],
    seconds: float,
    *,
    into: NDArray[np.uint8] | None = None,
    until: float = math.inf,
    report: Callable[[str], None] = lambda _: None,
) -> tuple[DepthRate, ...]:
    """Random reads of the reader's file number `file`, by depth: the better of two rounds of `seconds` each.

    reader: opened for the largest depth. into: see Reader.measure. until: of time.monotonic(); nothing begins
    after it, but for the first.
    """
    best: dict[int, float] = {}
    for depth in [*depths, *depths]:  # twice, so that a passing disturbance spoils none
        if best and time.monotonic() >= until:
            break
        report(f"reading blocks of {block >> 10} KiB, {depth} at once")
        done, elapsed = reader.measure(file, block, depth, seconds, into)
        best[depth] = max(best.get(depth, 0.0), done / elapsed)
    return tuple(DepthRate(*item) for item in best.items())


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
        most = max(depths)
        with (
            _file_to_read(path, block, report) as name,
            Reader([name], queue_depth=most, threads=most) as reader,
        ):
            rates = measure_rates(reader, 0, block, depths, seconds / 2, report=report)
            return Device(
                path=str(path),
                file_system=file_system(path),
                direct=reader.alignment > 1,
                dio_alignment=dio_alignment(name),
                backend=reader.backend,
                why=reader.why,
                block=block,
                rates=rates,
                rotational=rotational(path),
            )
    except OSError as e:
        raise ConfigError(
            f"{path}: {os.strerror(e.errno or 0)}; name a readable file or a writable directory"
        ) from e


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
