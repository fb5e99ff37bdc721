"""What the page cache holds comes from there, all else from the device; either way it is the file."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mer.errors import ConfigError
from mer.streaming.reader import Reader, aligned_empty

SIZE = 3_000_123  # not a multiple of a page
PAGES = -(-SIZE // mmap.PAGESIZE)

KERNEL = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))
pytestmark = pytest.mark.skipif(KERNEL < (6, 5), reason="no cachestat before Linux 6.5")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path


@pytest.fixture(params=["uring", "preadv"])
def reader(request: pytest.FixtureRequest, path: Path) -> Iterator[Reader]:
    try:
        reader = Reader([path], backend=request.param)
    except ConfigError as e:
        pytest.skip(f"this machine can't: {e}")
    with reader:
        yield reader


def forget(path: Path, offset: int = 0) -> None:
    """Has the page cache drop the file, from an offset on."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, offset, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def resident(path: Path) -> int:
    """Pages of the file that the page cache holds, as mincore says."""
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as view,
    ):
        array = np.frombuffer(view, np.uint8)
        found = (ctypes.c_ubyte * PAGES)()
        assert (
            ctypes.CDLL(None).mincore(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(SIZE), found) == 0
        )
        del array
        return sum(each & 1 for each in found)


def read_all(reader: Reader) -> bytes:
    """One extent straight into place, with the end of the file in it."""
    memory = aligned_empty(SIZE)
    reader.read_into([(0, 0, SIZE, memory, 0)])
    return memory.tobytes()


def test_what_is_there_is_taken_from_there(reader: Reader, path: Path) -> None:
    want = path.read_bytes()
    assert resident(path) == PAGES
    assert read_all(reader) == want
    assert reader.read(0, 12_345, 700_000) == want[12_345:712_345]
    assert reader.stats()["cached_ops"] == reader.stats()["ops"] > 0


def test_what_is_not_there_comes_from_the_device_and_leaves_no_trace(reader: Reader, path: Path) -> None:
    want = path.read_bytes()
    forget(path)
    assert resident(path) == 0
    assert read_all(reader) == want
    assert reader.stats()["cached_ops"] == 0
    assert resident(path) == 0


def test_what_is_there_in_part(reader: Reader, path: Path) -> None:
    want = path.read_bytes()
    forget(path, 1_500_000)
    before = resident(path)
    assert 0 < before < PAGES
    assert read_all(reader) == want
    assert 0 < reader.stats()["cached_ops"] < reader.stats()["ops"]
    assert resident(path) == before


@pytest.mark.parametrize("synced", [False, True])
def test_what_others_write_is_seen(reader: Reader, path: Path, synced: bool) -> None:
    """In the page cache and not yet on the device; on the device alone; written past the page cache."""
    want = bytearray(path.read_bytes())
    for at, text in ((0, b"first"), (1_234_567, b"second"), (SIZE - 3, b"end")):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(text)
        want[at : at + len(text)] = text
        if synced:
            forget(path)
        assert read_all(reader) == want
    block = mmap.mmap(-1, 4096)
    block[:] = want[8192:12288] = random.Random(2).randbytes(4096)
    fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
    os.pwritev(fd, [block], 8192)
    os.close(fd)
    assert read_all(reader) == want


def test_the_device_is_measured_and_not_the_page_cache(reader: Reader, path: Path) -> None:
    path.read_bytes()
    done, _ = reader.measure(0, 65536, 4, 0.02)
    assert done == reader.stats()["bytes"] > 0
    assert reader.stats()["cached_ops"] == 0
    again, _ = reader.measure(0, 65536, 4, 0.02, ramp=0.05)
    assert 0 < again < reader.stats()["bytes"] - done, "what was read before is not counted"


def test_injected_faults_are_met_there_too(reader: Reader, path: Path) -> None:
    want = path.read_bytes()
    reader.set_fault(0, 0, SIZE, error=4, times=3)
    assert reader.read(0, 5, 100_000) == want[5:100_005]
    reader.set_fault(0, 0, SIZE, limit=10_000, times=3)
    assert reader.read(0, 5, 100_000) == want[5:100_005]
    assert (reader.stats()["retries"], reader.stats()["short_reads"]) == (3, 3)
