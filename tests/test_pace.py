"""How prompts share steps with streams: against machines whose costs are formulas."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable

import pytest
from engine_models import opened, write_text_model
from grpc_client import until

from mer import SamplingParams
from mer.engine.pace import Pace, round_log2
from mer.engine.runner import Runner
from mer.engine.scheduler import Scheduler, Sequence

Cost = Callable[[int], float]


def memory_bound(tokens: int) -> float:
    """All resident: 20 ms to read what one token needs, less and less per token as experts are shared."""
    shared = 1 - (1 - 8 / 128) ** tokens
    return 0.02 + 0.15 * shared + 0.004 * tokens


def even(tokens: int) -> float:
    return 0.02 + 0.005 * tokens


def disk_bound(tokens: int) -> float:
    """A sweep over all experts takes 7.5 s, and a few hundred tokens need all of them."""
    return 7.5 * (1 - (1 - 8 / 128) ** tokens) + 0.002 * tokens


def run(cost: Cost, steps: int = 300, most: int = 512) -> tuple[list[int], float, float]:
    """One stream beside an endless prompt: chunks, seconds in steps with one, and in steps without."""
    pace, chunks, beside, alone = Pace(most), [], 0.0, 0.0
    for _ in range(5):
        pace.observe(1, 0, cost(1))
    for _ in range(steps):
        room = pace.room
        seconds = cost(1 + room)
        pace.observe(1, room, seconds)
        if room:
            chunks.append(room)
            beside += seconds
        else:
            alone += seconds
    return chunks, beside, alone


def test_chunks_are_small_where_that_costs_little():
    chunks, _, _ = run(even)
    assert chunks[0] == 512, "nothing is known yet"
    assert set(chunks[-20:]) == {16}, "any size has the same price: the largest whose step is short enough"
    chunks, _, _ = run(memory_bound)
    assert set(chunks[-20:]) <= {32, 64}
    assert memory_bound(chunks[-1]) < memory_bound(512) / 4
    price = memory_bound(chunks[-1]) / chunks[-1]
    assert price < 2.5 * memory_bound(512) / 512, "and its prompt pays not much more for that"


def test_chunks_stay_whole_where_cutting_them_would_read_everything_again():
    chunks, _, _ = run(disk_bound)
    assert chunks.count(512) > 0.9 * len(chunks), "some others are tried"


@pytest.mark.parametrize("cost", [even, memory_bound, disk_bound])
def test_streams_get_half_of_what_was_too_long(cost: Cost):
    chunks, beside, alone = run(cost, steps=3000)
    aim = max(4 * cost(1), 0.1)
    assert alone == pytest.approx((beside - aim * len(chunks)) / 2, rel=0.25)
    assert alone < beside


def test_a_fast_machine_is_left_alone():
    chunks, _, alone = run(lambda tokens: 0.001 + 0.0001 * tokens)
    assert set(chunks) == {512}
    assert not alone


def test_it_follows_a_cache_that_warms_up():
    pace = Pace(512)
    pace.observe(1, 0, 0.5)
    for cost in (disk_bound, even):
        for _ in range(2000):
            room = pace.room
            pace.observe(1, room, cost(1 + room))
    assert pace.room <= 32


def test_nothing_is_owed_to_those_who_are_gone():
    pace = Pace(512)
    pace.observe(1, 0, 0.02)
    pace.observe(1, 512, 5.0)
    assert pace.room == 0
    pace.observe(0, 512, 5.0)
    assert pace.room > 0


def test_sizes_are_rounded_by_ratio():
    assert [round_log2(n) for n in (1, 2, 3, 5, 6, 11, 12, 22, 23, 512)] == [0, 1, 2, 2, 3, 3, 4, 4, 5, 9]


def test_the_scheduler_keeps_to_the_room_only_beside_others():
    scheduler = Scheduler(n_blocks=100, step_tokens=64, max_running=8)
    a, b = Sequence([1] * 20), Sequence([2] * 40)
    scheduler.add(a)
    chunks = scheduler.schedule(4)
    assert [chunk.count for chunk in chunks] == [20], "nobody waits for it"
    scheduler.commit(chunks)
    a.tokens.append(0)
    scheduler.add(b)
    counts = []
    for room in (0, 16, 0, 24):
        chunks = scheduler.schedule(room)
        counts.append([chunk.count for chunk in chunks])
        scheduler.commit(chunks)
        a.tokens.append(0)
    assert counts == [[1], [1, 16], [1], [1, 24]]


def test_a_prompt_with_priority_over_all_others_is_not_held_back():
    scheduler = Scheduler(n_blocks=100, step_tokens=64, max_running=8)
    a, b = Sequence([1] * 20, priority=1), Sequence([2] * 40)
    scheduler.add(a)
    scheduler.commit(scheduler.schedule())
    a.tokens.append(0)
    scheduler.add(b)
    assert sorted(chunk.count for chunk in scheduler.schedule(0)) == [1, 40]


async def test_an_engine_keeps_its_streams_going(tmp_path, monkeypatch):
    """Steps that take 2 ms a token: a prompt of 600 comes in chunks, and no answer is another for that."""
    step, seen = Runner.step, []

    def slow(self, chunks):
        count = sum(chunk.count for chunk in chunks)
        seen.append((len(chunks), count))
        begun = time.perf_counter()
        logits = step(self, chunks)
        rest = max(0.002 * count - (time.perf_counter() - begun), 0)
        time.sleep(rest)
        self._step_s += rest
        return logits

    params = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    prompts = [[5, 6, 7], [i % 250 + 3 for i in range(600)]]
    async with opened(write_text_model(tmp_path, max_position_embeddings=2048), context=2048) as engine:
        alone = [await engine.generate(prompt, params) for prompt in prompts]
    async with opened(tmp_path, context=2048, prefix_cache=False) as engine:
        monkeypatch.setattr(Runner, "step", slow)
        # What a whole chunk costs is known from a first one.
        await engine.generate(prompts[1], SamplingParams(max_tokens=1))
        seen.clear()
        stream = asyncio.create_task(engine.generate(prompts[0], params))
        await until(lambda: len(seen) > 20, "the stream is on its way")
        late = await engine.generate(prompts[1], params)
        first = await stream
        assert [first.token_ids, late.token_ids] == [each.token_ids for each in alone]
    beside = [count - 1 for requests, count in seen if requests == 2 and count > 2]
    assert sum(beside) >= 600 - 1
    assert statistics.median(beside) <= 64
    assert max(beside) < 300
