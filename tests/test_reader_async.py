"""Awaited reads: the event loop lives on, other threads may reap, tasks may go away."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mer.errors import CheckpointError, ConfigError, DeviceReadError
from mer.streaming.reader import Reader

SIZE = 3_000_123
DATA = random.Random(5).randbytes(SIZE)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aread") / "data.bin"
    path.write_bytes(DATA)
    return path


@pytest.fixture(params=["uring", "preadv", "buffered"])
def reader(request: pytest.FixtureRequest, path: Path) -> Iterator[Reader]:
    try:
        reader = Reader([path], backend=request.param, queue_depth=4)
    except ConfigError as e:
        pytest.skip(f"this machine can't: {e}")
    with reader:
        yield reader


async def some_reads(reader: Reader, seed: int, n: int) -> None:
    rng = random.Random(seed)
    for _ in range(n):
        offset = rng.randrange(SIZE - 60_000)
        length = rng.choice([0, 1, 4096, 60_000])
        got = await reader.aread(0, offset, length, prefetch=rng.random() < 0.5)
        assert got == DATA[offset : offset + length]


async def test_many_tasks_while_the_loop_lives(reader: Reader) -> None:
    turns, reading = 0, True

    async def tick() -> None:
        nonlocal turns
        while reading:
            turns += 1
            await asyncio.sleep(0)

    ticker = asyncio.create_task(tick())
    await asyncio.gather(*(some_reads(reader, seed, 10) for seed in range(50)))
    reading = False
    await ticker
    assert turns > 5  # no reader has fewer reads, one after the other


async def test_many_more_than_the_queue_holds(reader: Reader) -> None:
    got = await asyncio.gather(*(reader.aread(0, i * 4999, 5000) for i in range(500)))
    assert all(got[i] == DATA[i * 4999 : i * 4999 + 5000] for i in range(500))


async def test_other_threads_reap_too(reader: Reader) -> None:
    reading, wrong = threading.Event(), []

    def work() -> None:
        while not reading.is_set():
            if reader.read(0, 1000, 300_000) != DATA[1000:301_000]:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        await asyncio.gather(*(some_reads(reader, seed, 20) for seed in range(10)))
    finally:
        reading.set()
        for thread in threads:
            await asyncio.to_thread(thread.join)
    assert wrong == []


async def test_failures_reach_the_one_who_awaits(reader: Reader) -> None:
    reader.set_fault(0, 1_000_000, 1_000_001)
    bad, good = await asyncio.gather(
        reader.aread(0, 999_999, 10), reader.aread(0, 10, 10), return_exceptions=True
    )
    assert isinstance(bad, DeviceReadError)
    assert "999999" in str(bad)
    assert good == DATA[10:20]
    with pytest.raises(CheckpointError, match="truncated"):
        await reader.aread(0, SIZE - 5, 10)
    with pytest.raises(ValueError, match="file number"):
        await reader.aread(7, 0, 1)


async def test_a_cancelled_task_leaves_the_others(reader: Reader) -> None:
    tasks = [asyncio.create_task(reader.aread(0, i, 500_000)) for i in range(40)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(results[i] == DATA[i : i + 500_000] for i in range(1, 40, 2))
    assert all(isinstance(r, asyncio.CancelledError) for r in results[::2])
    assert await reader.aread(0, 3, 5) == DATA[3:8]


@pytest.mark.parametrize("from_thread", [False, True])
async def test_closing_ends_every_await(reader: Reader, from_thread: bool) -> None:
    tasks = [asyncio.create_task(reader.aread(0, i, 700_000)) for i in range(60)]
    await asyncio.sleep(0)
    if from_thread:
        await asyncio.to_thread(reader.close)
    else:
        reader.close()
    for i, result in enumerate(await asyncio.gather(*tasks, return_exceptions=True)):
        if isinstance(result, bytes):
            assert result == DATA[i : i + 700_000]
        else:
            assert isinstance(result, DeviceReadError)
            assert "closed" in str(result)


async def test_one_event_loop_at_a_time(reader: Reader) -> None:
    pending = asyncio.create_task(reader.aread(0, 0, 2_000_000))
    await asyncio.sleep(0)
    refused: list[BaseException] = []

    def other_loop() -> None:
        try:
            asyncio.run(reader.aread(0, 0, 10))
        except RuntimeError as e:
            refused.append(e)

    thread = threading.Thread(target=other_loop)
    thread.start()
    thread.join()  # this loop does not run meanwhile, so the first read is still awaited
    assert len(await pending) == 2_000_000
    assert "another event loop" in str(refused[0])
