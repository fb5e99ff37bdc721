"""All that can go wrong for some requests, at once: the others get the right bytes, nothing is left."""

from __future__ import annotations

import asyncio
import os
import random
import threading

import pytest
from engine_models import check_idle, opened, prompt, settle, write_single_choice
from test_engine_faults import break_expert

from mer import Engine, EngineConfig, QueueFullError, RequestTimeoutError, SamplingParams
from mer.errors import DeviceReadError, EngineClosedError, RequestError

PARAMS = SamplingParams(temperature=0, max_tokens=10, logprobs=3, ignore_eos=True)
# Of all lengths, and beginning alike: what one leaves in the prefix cache, others use.
PROMPTS = [prompt(40)[: 20 + n % 20] + prompt(1 + n % 5, seed=n) for n in range(12)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_single_choice(tmp_path_factory.mktemp("load"), PROMPTS, 10)


@pytest.fixture(scope="module")
def expected(made):
    async def ask():
        async with opened(made[0], prefix_cache=False) as engine:
            return [await _answer(engine, ids) for ids in PROMPTS]

    return asyncio.run(ask())


async def _answer(engine, ids, params=PARAMS):
    result = await engine.generate(ids, params)
    return result.token_ids, result.logprobs


async def _until(true) -> None:
    while not true():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Watch:
    """Cancels a request when it has come to some stage, while the engine's thread stands still."""

    def __init__(self, engine) -> None:
        self.engine, self.loop = engine, asyncio.get_running_loop()
        self.stage = self.ids = self.task = None
        self.cancelled = threading.Event()

    def __getattr__(self, name):
        return lambda *facts: None

    def queued(self, id) -> None:
        self.step()

    def step(self, *facts) -> None:
        for job in self.engine._worker._jobs:
            if self.stage and job.tokens[:60] == self.ids and self.stage(job):
                self.stage, cancelled = None, self.cancelled
                self.loop.call_soon_threadsafe(self.task.cancel)
                assert cancelled.wait(60)

    async def cancel_when(self, stage, ids) -> None:
        self.cancelled = threading.Event()
        self.stage, self.ids = stage, ids
        ask = self.engine.generate(ids, SamplingParams(max_tokens=140, ignore_eos=True))
        self.task = asyncio.create_task(ask)
        with pytest.raises(asyncio.CancelledError):
            await self.task
        self.cancelled.set()
        assert self.stage is None


async def test_cancelled_at_every_stage(made, expected, tmp_path):
    """Waiting, half of a prompt computed, decoding, held up for its reader, waiting for the disk."""
    store = {"prefix_store": tmp_path, "context": 208}
    async with opened(made[0], max_running=3, step_tokens=7, cache_experts=2, **store) as engine:
        scheduler, watch = engine._scheduler, Watch(engine)
        engine.observe(watch)
        await settle(engine)
        for _ in range(2):
            others = [asyncio.create_task(_answer(engine, ids)) for ids in PROMPTS]
            await asyncio.sleep(0)
            await watch.cancel_when(lambda job: job in scheduler.waiting, prompt(60, seed=1))
            await watch.cancel_when(lambda job: 0 < job.computed < 60, prompt(60, seed=2))
            await watch.cancel_when(lambda job: len(job.tokens) == 60 == job.computed, prompt(60, seed=3))
            await watch.cancel_when(lambda job: len(job.tokens) > 62, prompt(60, seed=4))
            held = engine.stream(prompt(30), SamplingParams(max_tokens=150, ignore_eos=True))
            await anext(held)
            await _until(lambda: scheduler.paused)
            await held.aclose()
            assert await asyncio.gather(*others) == expected
            await settle(engine)
            check_idle(engine)
        # All memory for others: the first prompt's blocks are on disk now.
        await engine.generate(prompt(190, seed=6), SamplingParams(max_tokens=2, ignore_eos=True))
        await _until(lambda: not engine._store._pending)
        task = asyncio.create_task(engine.generate(PROMPTS[-1], PARAMS))
        await _until(lambda: scheduler._loading or task.done())
        task.cancel()
        await _until(lambda: not scheduler._loading)
        assert await _answer(engine, PROMPTS[-1]) == expected[-1]


async def test_reads_that_fail_under_load(made, expected):
    """In memory for a few requests only, with shared prefixes, cancelled neighbours and a full queue."""
    path, needed = made
    counts = {e: sum(e in each for each in needed) for e in range(16)}
    expert = next(e for e, count in sorted(counts.items()) if 2 <= count <= 9)
    settings = {"cache_experts": 2, "context": 96, "max_running": 4, "max_waiting": 20}
    async with opened(path, **settings) as engine:
        assert await _answer(engine, PROMPTS[0]) == expected[0]
        break_expert(engine, expert)
        for round in range(4):
            # Nothing may end, and so make room, before all have come.
            come = threading.Event()
            engine._worker._send(come.wait)
            tasks = [asyncio.create_task(_answer(engine, ids)) for ids in PROMPTS * 3]
            await asyncio.sleep(0)
            come.set()
            await asyncio.sleep(0.01 * round)
            gone = {3, 17, 20} if round % 2 else set()
            for n in gone:
                tasks[n].cancel()
            full = 0
            for n, found in enumerate(await asyncio.gather(*tasks, return_exceptions=True)):
                which = n % len(PROMPTS)
                if isinstance(found, QueueFullError):
                    full += 1
                elif n in gone and isinstance(found, asyncio.CancelledError):
                    pass
                elif expert in needed[which]:
                    # What it needs the expert for may be in the prefix cache: then it needs no read.
                    assert isinstance(found, DeviceReadError) or found == expected[which], n
                else:
                    assert found == expected[which], n
            assert full == 12, "24 may be here"
            await settle(engine)
            check_idle(engine)
        engine._runner.reader.clear_faults()
        assert [await _answer(engine, ids) for ids in PROMPTS] == expected


async def test_a_hard_day(made, expected, tmp_path):
    """Hundreds of requests of every kind, each of which may fail in its own way; then all is as before."""
    path, needed = made
    chance = random.Random(0)
    config = EngineConfig(
        context=112, cache_experts=2, max_running=5, max_waiting=30, step_tokens=16, prefix_store=tmp_path
    )
    counts = {e: sum(e in each for each in needed) for e in range(16)}
    expert = next(e for e, count in sorted(counts.items()) if 1 <= count <= 4)
    ended = {}

    async def one(engine, n):
        which = chance.randrange(len(PROMPTS))
        ids, kind = PROMPTS[which], chance.choice(["good"] * 4 + ["leave", "late", "bad", "embed", "slow"])
        await asyncio.sleep(chance.random() if n > 80 else 0)  # more at once than the queue takes
        try:
            if kind == "bad":
                await engine.generate([*ids, 10**6], PARAMS)
            elif kind == "embed":
                await engine.embed(ids)
            elif kind == "late":
                await engine.generate(ids, SamplingParams(max_tokens=60, timeout=0.01, ignore_eos=True))
            elif kind == "leave":
                async for _ in engine.stream(ids, PARAMS):
                    if chance.random() < 0.3:
                        break
            else:
                pieces = []
                async for piece in engine.stream(ids, PARAMS):
                    pieces.append(piece)
                    if kind == "slow":
                        await asyncio.sleep(0.01)
                found = sum((p.token_ids for p in pieces), ()), sum((p.logprobs for p in pieces), ())
                assert found == expected[which]
                kind = "answered"
        except (QueueFullError, RequestTimeoutError, RequestError, DeviceReadError) as error:
            # What a late one draws is not known, nor what it needs.
            if isinstance(error, DeviceReadError) and kind != "late" and expert not in needed[which]:
                raise
            kind = type(error).__name__
        ended[kind] = ended.get(kind, 0) + 1

    async with opened(path, config=config, context=112) as engine:
        await settle(engine)
        before = descriptors()
        break_expert(engine, expert, times=40)
        await asyncio.gather(*(one(engine, n) for n in range(250)))
        engine._runner.reader.clear_faults()
        await settle(engine)
        check_idle(engine)
        assert descriptors() <= before  # fewer: what tests before this one had left is closed
        assert [await _answer(engine, ids) for ids in PROMPTS] == expected
    assert ended["answered"] > 10
    assert min(ended.get(k, 0) for k in ("RequestTimeoutError", "RequestError", "QueueFullError")) > 0, ended


async def test_closed_in_the_middle_of_it_all(made):
    engine = await Engine.open(made[0], context=112, max_running=3)
    tasks = [asyncio.create_task(engine.generate(ids, PARAMS)) for ids in PROMPTS]
    tasks += [asyncio.create_task(engine.embed(ids)) for ids in PROMPTS]
    await asyncio.sleep(0.02)
    tasks[1].cancel()
    await engine.close(drain=False)
    done = await asyncio.gather(*tasks, return_exceptions=True)
    failed = [each for each in done if isinstance(each, Exception)]
    assert all(isinstance(each, EngineClosedError) for each in failed)
    check_idle(engine)
    with pytest.raises(EngineClosedError):
        await engine.generate([1])
