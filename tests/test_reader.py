"""The three I/O back ends read the same bytes, whatever is asked of them at once."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mer.errors import CheckpointError, ConfigError, DeviceReadError
from mer.streaming.reader import Reader, aligned_empty

SIZE = 9_000_123  # not a multiple of any block


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "data.bin"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


def open_reader(path: Path, backend: str, **options: int) -> Reader:
    try:
        return Reader([path], backend=backend, **options)
    except ConfigError as e:
        pytest.skip(f"this machine can't: {e}")


@pytest.fixture(params=["uring", "preadv", "buffered"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def reader(path: Path, backend: str) -> Iterator[Reader]:
    with open_reader(path, backend, queue_depth=8) as reader:
        assert reader.backend == backend
        yield reader


def truth(path: str | Path, offset: int, length: int) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def extents(n: int, seed: int, most: int = 300_000) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    lengths = [0, 1, 511, 4095, 4096, 4097, 65536, most]
    found = []
    for _ in range(n):
        length = min(rng.choice([rng.choice(lengths), rng.randrange(most)]), most)
        offset = rng.choice([rng.randrange(SIZE - length), rng.randrange((SIZE - length) // 4096) * 4096])
        found.append((offset, length))
    found += [(SIZE - k, k) for k in (1, 123, 4096, 5000)]
    return found


def test_any_extent_is_what_pread_says(reader: Reader, path: Path) -> None:
    for offset, length in extents(200, seed=2):
        assert reader.read(0, offset, length) == truth(path, offset, length), (offset, length)
    assert reader.read(0, 0, SIZE) == path.read_bytes()


@pytest.mark.parametrize("shift", [0, 1, 4095])
def test_read_into_places_of_any_alignment(reader: Reader, path: Path, shift: int) -> None:
    data = path.read_bytes()
    dest = np.full(SIZE + 10_000, 0xAA, np.uint8)
    wanted, at = [], shift
    for offset, length in extents(40, seed=3 + shift, most=2_500_000):
        if at + length < len(dest):
            wanted.append((0, offset, length, dest, at))
            at += length + 3
    reader.read_into(wanted)
    expected = np.full(len(dest), 0xAA, np.uint8)
    for _, offset, length, _, place in wanted:
        expected[place : place + length] = np.frombuffer(data, np.uint8, length, offset)
    assert np.array_equal(dest, expected)  # the bytes between the places too


@pytest.mark.parametrize("offset", [0, 4096, 8 * 4096 + 24])
def test_read_into_congruent_memory_reads_no_block_twice(reader: Reader, path: Path, offset: int) -> None:
    dest = aligned_empty(3_500_000, offset)
    reader.read_into([(0, offset, 3_500_000, dest, 0)])
    assert dest.tobytes() == truth(path, offset, 3_500_000)
    end = offset + 3_500_000
    blocks = -(-end // reader.alignment) * reader.alignment - offset // reader.alignment * reader.alignment
    assert reader.stats()["bytes"] == blocks


def test_read_into_other_types_and_refusals(reader: Reader, path: Path) -> None:
    floats = np.zeros((10, 25), np.float32)
    reader.read_into([(0, 40, 1000, floats, 0)])
    assert floats.tobytes() == truth(path, 40, 1000)
    with pytest.raises(ValueError, match="do not fit"):
        reader.read_into([(0, 0, 1001, floats, 0)])
    with pytest.raises((BufferError, ValueError)):
        reader.read_into([(0, 0, 10, b"constant bytes", 0)])
    with pytest.raises(ValueError, match="file number 1"):
        reader.read(1, 0, 10)
    with pytest.raises(ValueError, match="extent at -1"):
        reader.read(0, -1, 10)


def test_thousands_of_extents_at_a_small_depth(path: Path, backend: str) -> None:
    data = path.read_bytes()
    with open_reader(path, backend, queue_depth=2, threads=2) as reader:
        dest = np.zeros((2000, 300), np.uint8)
        reader.read_into([(0, i * 4321, 300, dest, i * 300) for i in range(2000)])
        assert all(dest[i].tobytes() == data[i * 4321 : i * 4321 + 300] for i in range(2000))


@pytest.mark.parametrize("past", [1, 4096, 500_000])
def test_the_end_of_the_file_is_named(reader: Reader, path: Path, past: int) -> None:
    offset = SIZE - 10
    with pytest.raises(CheckpointError) as e:
        reader.read(0, offset, 10 + past)
    assert str(path) in str(e.value)
    assert str(offset) in str(e.value)
    assert str(SIZE) in str(e.value)
    assert reader.read(0, offset, 10) == truth(path, offset, 10)


@pytest.mark.parametrize("left", [0, 4096, 5000])
def test_a_file_cut_while_open(tmp_path: Path, backend: str, left: int) -> None:
    path = tmp_path / "cut.bin"
    path.write_bytes(b"x" * 20_000)
    with open_reader(path, backend) as reader:
        os.truncate(path, left)
        with pytest.raises(CheckpointError, match="truncated"):
            reader.read(0, 0, 20_000)
        assert reader.read(0, 0, left) == b"x" * left


def test_several_files(tmp_path: Path, backend: str) -> None:
    paths = [tmp_path / f"{i}.bin" for i in range(5)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 10_000)
    try:
        with Reader(paths, backend=backend) as reader:
            assert all(reader.read(i, 5000, 5000) == bytes([i]) * 5000 for i in range(5))
    except ConfigError as e:
        pytest.skip(str(e))


def test_many_threads(reader: Reader, path: Path) -> None:
    data, wrong = path.read_bytes(), []

    def work(seed: int) -> None:
        for offset, length in extents(60, seed):
            if reader.read(0, offset, length) != data[offset : offset + length]:
                wrong.append((offset, length))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("error", [errno.EIO, errno.ENODEV])
def test_a_failing_device_fails_what_needs_it_and_nothing_else(
    reader: Reader, path: Path, error: int
) -> None:
    reader.set_fault(0, 1_000_000, 1_000_001, error=error, times=2)
    assert reader.read(0, 0, 900_000) == truth(path, 0, 900_000)
    for _ in range(2):
        with pytest.raises(DeviceReadError) as e:
            reader.read(0, 999_990, 20)
        assert str(path) in str(e.value)
        assert "999990" in str(e.value)
        assert errno.errorcode[error] in str(e.value)
    assert reader.read(0, 999_990, 20) == truth(path, 999_990, 20)
    assert reader.stats()["errors"] == 2


def test_the_failing_extent_of_many_is_named(reader: Reader) -> None:
    dest = np.zeros(50 * 10_000, np.uint8)
    reader.set_fault(0, 37 * 100_000, 37 * 100_000 + 1, times=1)
    with pytest.raises(DeviceReadError, match="offset 3700000"):
        reader.read_into([(0, i * 100_000, 10_000, dest, i * 10_000) for i in range(50)])


@pytest.mark.parametrize("error", [errno.EINTR, errno.EAGAIN])
def test_interruptions_are_retried_but_not_for_ever(reader: Reader, path: Path, error: int) -> None:
    reader.set_fault(0, 0, SIZE, error=error, times=20)
    assert reader.read(0, 777, 5000) == truth(path, 777, 5000)
    assert reader.stats()["retries"] == 20
    reader.set_fault(0, 0, SIZE, error=error, times=10_000)
    with pytest.raises(DeviceReadError):
        reader.read(0, 777, 5000)
    reader.clear_faults()
    assert reader.read(0, 777, 5000) == truth(path, 777, 5000)


def test_short_reads_go_on(reader: Reader, path: Path) -> None:
    reader.set_fault(0, 0, SIZE, limit=8192 + 100, times=30)
    assert reader.read(0, 4096 * 3, 200_000) == truth(path, 4096 * 3, 200_000)
    assert reader.stats()["short_reads"] > 0
    reader.clear_faults()
    reader.set_fault(0, 0, SIZE, limit=0)
    with pytest.raises(CheckpointError):
        reader.read(0, 0, 10)


def test_registered_memory(path: Path, backend: str) -> None:
    memory = aligned_empty(1 << 20)
    with open_reader(path, backend) as reader:
        registered = reader.add_buffer(memory.ctypes.data, memory.nbytes)
        assert registered == (reader.buffers_note == "")
        reader.read_into([(0, 40_960, 500_000, memory, 4096)])
        assert memory[4096 : 4096 + 500_000].tobytes() == truth(path, 40_960, 500_000)
        if backend != "uring":
            assert not registered
        if registered:
            assert reader.stats()["fixed_ops"] > 0
            assert reader.stats()["registered_bytes"] == 1 << 20


def test_closed_readers_say_so(path: Path, backend: str) -> None:
    reader = open_reader(path, backend)
    reader.close()
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.read(0, 0, 1)


def test_closing_under_readers_in_other_threads(path: Path, backend: str) -> None:
    reader = open_reader(path, backend, queue_depth=2, threads=2)
    started, ends = threading.Semaphore(0), []

    def work() -> None:
        started.release()
        try:
            while True:
                assert len(reader.read(0, 100, 2_000_000)) == 2_000_000
        except (DeviceReadError, ValueError) as e:
            ends.append(str(e))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in threads:
        started.acquire()
    reader.close()
    for thread in threads:
        thread.join()
    assert len(ends) == 4
    assert all("closed" in end for end in ends)


def test_no_event_loop_is_needed_twice(path: Path, backend: str) -> None:
    with open_reader(path, backend) as reader:
        for _ in range(2):  # each asyncio.run makes a loop of its own
            assert asyncio.run(reader.aread(0, 5, 100)) == truth(path, 5, 100)
