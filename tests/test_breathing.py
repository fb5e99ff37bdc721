"""The expert cache shrinks and grows while it is used: memory really goes, bytes and answers stay."""

from __future__ import annotations

import asyncio
import itertools
import threading

import numpy as np
import pytest
from engine_models import Logits, convert_to, opened, prompt
from oracle.make_checkpoints import make
from test_prefault import touched

from mer import Engine, SamplingParams
from mer._ext.cache import POLICIES, ExpertCache
from mer.engine.budget import resident_bytes
from mer.errors import BudgetError, ConfigError, EngineClosedError

MIB = 1 << 20
SLOT = 2 * MIB + 4096
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
PROMPTS = [prompt(n) for n in (40, 5, 17)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """12 experts in 2 layers, 2 a token."""
    path = tmp_path_factory.mktemp("breathing")
    make(path / "hf", "qwen3_moe", num_hidden_layers=2, num_experts=6)
    return convert_to(path / "hf", path / "store", None, None)


def filled(n_slots: int, policy: str = "lru", **options) -> ExpertCache:
    """A cache of 16 experts with `n_slots` of them in it, each full of its own number."""
    cache = ExpertCache(16, n_slots, SLOT, policy=policy, n_layers=2, huge_pages=False, **options)
    for expert in range(n_slots):
        read(cache, expert)
    return cache


def read(cache: ExpertCache, expert: int) -> None:
    found, slot = cache.acquire_py(expert)
    if found == "miss":
        cache.slot_view(slot)[:] = expert
        cache.publish_py(expert)
    assert (cache.slot_view(slot) == expert).all()
    cache.release_py(expert)


def resident(cache: ExpertCache) -> list[int]:
    return [expert for expert in range(cache.n_experts) if cache.state_py(expert) == "resident"]


@pytest.mark.parametrize("policy", POLICIES)
def test_slots_that_go_give_their_memory_back_and_come_again(policy):
    cache = filled(16, policy)
    assert touched(cache) == 16 * SLOT
    assert cache.resize(5) == cache.n_slots == 5
    assert resident(cache) == [11, 12, 13, 14, 15]  # those used last
    assert touched(cache) == 5 * SLOT
    for expert in range(11, 16):
        read(cache, expert)
    read(cache, 0)
    assert len(resident(cache)) == 5
    assert cache.resize(16) == 16
    for expert in range(16):
        read(cache, expert)
    assert resident(cache) == list(range(16))
    assert touched(cache) == 16 * SLOT


def test_what_was_touched_ahead_goes_as_well():
    cache = ExpertCache(16, 16, SLOT, huge_pages=False)
    assert cache.prefault(1 << 40)
    read(cache, 3)
    assert cache.resize(2) == 2
    assert touched(cache) <= 2 * SLOT
    assert resident(cache) == [3]


def test_room_beyond_the_slots_takes_no_memory_until_they_are_used():
    cache = filled(3, max_slots=16)
    assert (cache.n_slots, cache.max_slots) == (3, 16)
    assert cache.acquire_py(9)[0] == "miss"
    cache.fail_py(9)
    cache.release_py(9)
    assert touched(cache) == 3 * SLOT
    assert cache.resize(4) == 4
    for expert in (1, 2, 10, 11):
        read(cache, expert)
    assert touched(cache) == 4 * SLOT
    for wrong in (0, 17, -1):
        with pytest.raises(ValueError, match="16 slots at most"):
            cache.resize(wrong)


def test_what_is_in_use_or_pinned_stays():
    cache = filled(8, max_slots=16)
    cache.acquire_py(0)
    cache.pin_set([1])
    assert cache.resize(1) == 2
    assert resident(cache) == [0, 1]
    cache.release_py(0)
    assert cache.resize(1) == 1
    assert resident(cache) == [1]


async def answers(engine: Engine, logits: Logits) -> list[tuple]:
    results = await asyncio.gather(*(engine.generate(ids, GREEDY) for ids in PROMPTS))
    return [(result.token_ids, logits.take(ids)) for ids, result in zip(PROMPTS, results, strict=True)]


@pytest.mark.parametrize("io", ["uring", "preadv"])
async def test_answers_do_not_depend_on_it(model, monkeypatch, io):
    logits = Logits(monkeypatch)
    async with opened(model) as engine:
        expected = [(await engine.generate(ids, GREEDY)).token_ids for ids in PROMPTS]
        expected = list(zip(expected, [logits.take(ids) for ids in PROMPTS], strict=True))
    async with opened(model, io_backend=io, ram=resident_bytes() + (1 << 30)) as engine:
        budget = engine.budget
        assert budget.slots == budget.experts == 12
        seen = set()

        async def breathe():
            for slots in itertools.cycle((2, 12, 3, 7, 2, 5)):
                now = await engine.set_ram(budget.floor + (slots - 2) * budget.slot * 513 // 512)
                seen.add(now.slots)
                assert engine.budget == now
                assert engine.snapshot().cache_slots == now.slots
                await asyncio.sleep(0.002)

        breathing = asyncio.create_task(breathe())
        rounds = 0
        while rounds < 3 or (rounds < 100 and not {2, 12} < seen):
            assert await answers(engine, logits) == expected
            rounds += 1
        breathing.cancel()
        assert {2, 12} < seen


@pytest.mark.parametrize("io", ["uring", "preadv"])
async def test_in_the_middle_of_a_step(model, monkeypatch, io):
    """A prompt's chunk may take seconds: memory goes between its layers, while experts are on their way."""
    logits = Logits(monkeypatch)
    async with opened(model) as engine:
        expected = (await engine.generate(PROMPTS[0], GREEDY)).token_ids, logits.take(PROMPTS[0])
    async with opened(model, io_backend=io, ram=resident_bytes() + (1 << 30)) as engine:
        worker, forward, seen = engine._worker, engine._runner._forward, []
        asked, obey, arrived = threading.Event(), forward.between, threading.Event()

        def between():
            """Before the second layer of the first step, and the first and the second of the second one."""
            seen.append(engine.budget.slots)
            if len(seen) in (2, 3, 4):
                arrived.set()
                assert asked.wait(60)
                asked.clear()
            obey()

        forward.between = between
        task = asyncio.create_task(engine.generate(PROMPTS[0], GREEDY))
        for slots in (2, 7, 3):
            assert await asyncio.to_thread(arrived.wait, 60)
            arrived.clear()
            ram = engine.budget.floor + (slots - 2) * engine.budget.slot * 513 // 512
            asking = asyncio.create_task(engine.set_ram(ram))
            while not worker._urgent:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            asked.set()
            assert (await asking).slots == slots
        assert ((await task).token_ids, logits.take(PROMPTS[0])) == expected
        # Of the fourth call on: what was asked for within the first two steps was there at once.
        assert seen[:5] == [12, 12, 2, 7, 3]


async def test_a_full_cache_of_fixed_buffers_lets_them_go_first(model):
    """The ring would go on reading into pages that the cache no longer has."""
    async with opened(model) as engine:
        expected = (await engine.generate(PROMPTS[0], GREEDY)).token_ids
    async with opened(model, cache_experts=6, io_backend="uring") as engine:
        reader = engine._runner.reader
        assert (await engine.generate(PROMPTS[0], GREEDY)).token_ids == expected
        if not reader.stats()["registered_bytes"]:
            pytest.skip(f"no fixed buffers here: {reader.buffers_note}")
        wide = engine.budget.ram
        assert (await engine.set_ram(engine.budget.floor)).slots == 2
        assert reader.stats()["registered_bytes"] == 0
        assert (await engine.generate(PROMPTS[0], GREEDY)).token_ids == expected
        assert (await engine.set_ram(wide)).slots == 6  # as many as were asked for, and no more
        assert (await engine.generate(PROMPTS[0], GREEDY)).token_ids == expected


async def test_pinned_experts_and_room_beside_them_stay(model):
    async with Engine.open(model, context=512) as engine:
        await engine.generate(PROMPTS[0], GREEDY)
        assert engine.pin(0) == 6
        small = await engine.set_ram(engine.budget.floor)
        assert small.slots == 6 + small.least_slots
        assert (await engine.generate(PROMPTS[0], GREEDY)).token_ids
        engine.pin(0, on=False)
        assert (await engine.set_ram(small.floor)).slots == small.least_slots


async def test_less_than_the_least_is_refused_and_nothing_changes(model):
    async with Engine.open(model, context=512) as engine:
        before = engine.budget
        with pytest.raises(BudgetError, match="too little for the model that is running"):
            await engine.set_ram(before.floor - before.slot)
        with pytest.raises(ConfigError, match="not a size"):
            await engine.set_ram("much")
        assert engine.budget == before
    with pytest.raises(EngineClosedError):
        await engine.set_ram("1GiB")


def test_bytes_of_the_arena_are_those_of_all_slots():
    assert np.frombuffer(ExpertCache(16, 2, SLOT, max_slots=9), np.uint8).nbytes == 9 * SLOT
