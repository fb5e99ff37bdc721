"""bench/replicas.py: who is asked, on replicas that are made up."""

from __future__ import annotations

import asyncio

import pytest

from bench import replicas
from bench.faces import Record

PLAN = replicas.Plan(groups=3, each=4, beginning=200, end=2, tokens=2, streams=1)


class Replica:
    """Finds what begins as one before did."""

    def __init__(self):
        self.seen, self.asked = set(), 0

    async def ask(self, prompt, tokens):
        start = tuple(prompt[: PLAN.beginning])
        record = Record(0.0, [1.0], tokens, cached=PLAN.beginning if start in self.seen else 0)
        self.seen.add(start)
        self.asked += 1
        await asyncio.sleep(0)
        return record


@pytest.mark.parametrize(
    ("way", "count", "found"), [(replicas.ONE, 1, 9), (replicas.AFFINITY, 2, 9), (replicas.IN_TURN, 2, None)]
)
async def test_what_is_found(way, count, found):
    """With affinity as much as by one alone: of each beginning all but the first."""
    running = [Replica() for _ in range(count)]
    prompts = PLAN.prompts(1000, 1)
    load = await replicas.run(way, running, prompts, PLAN)
    times = round(load.cached * sum(map(len, prompts)) / PLAN.beginning)
    assert sum(each.asked for each in running) == 12
    if found is not None:
        assert times == found
    else:
        assert times < 9
        assert [each.asked for each in running] == [6, 6]


async def test_many_streams_are_spread():
    running = [Replica() for _ in range(2)]
    plan = replicas.Plan(groups=1, each=20, beginning=200, end=2, tokens=2, streams=10)
    load = await replicas.run(replicas.AFFINITY, running, plan.prompts(1000, 1), plan)
    assert min(each.asked for each in running) > 0, "who knows the beginning has much more to do"
    assert load.requests_per_s > 0


async def test_a_request_that_fails():
    class Broken(Replica):
        async def ask(self, prompt, tokens):
            return Record(0.0, error="503")

    with pytest.raises(RuntimeError, match="503"):
        await replicas.run(replicas.ONE, [Broken()], PLAN.prompts(1000, 1), PLAN)
