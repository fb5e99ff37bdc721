"""Prefixes that are found in the KV cache: the same bytes as without, and less to compute."""

from __future__ import annotations

import asyncio

import pytest
from engine_models import GREEDY, Logits, opened, prompt, settle
from oracle.make_checkpoints import make

from mer import SamplingParams
from mer.model.kv import BLOCK

LOGGED = SamplingParams(temperature=0, max_tokens=20, logprobs=20, ignore_eos=True)


class Steps:
    """How many tokens were computed."""

    def __init__(self) -> None:
        self.tokens = 0

    def step(self, tokens, requests, stats) -> None:
        self.tokens += tokens

    def __getattr__(self, name):
        return lambda *facts: None


RECURRENT = ("qwen3_next", "lfm2_moe")


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3", "mixtral", *RECURRENT])
def model(request, tmp_path_factory):
    """One of each kind of attention: grouped, latent, with a window; and those with a recurrent state."""
    path = tmp_path_factory.mktemp(request.param)
    more = {"sliding_window": 45} if request.param == "mixtral" else {}
    make(path, request.param, **more)
    return path


@pytest.fixture
def logits(monkeypatch):
    return Logits(monkeypatch)


async def conversation(engine, logits):
    """Three turns, each of which begins with all of those before; and one that only begins like them."""
    found, ids = [], prompt(50)
    for turn in range(3):
        result = await engine.generate(ids, LOGGED)
        found.append((result.token_ids, result.logprobs, logits.take(ids)))
        yield result.usage, found
        ids = [*ids, *result.token_ids, *prompt(7, seed=turn)]
    other = prompt(50)[:40] + prompt(9, seed=9)
    result = await engine.generate(other, LOGGED)
    found.append((result.token_ids, result.logprobs, logits.take(other)))
    yield result.usage, found


@pytest.mark.parametrize(
    "settings", [{}, {"cache_experts": 3}, {"step_tokens": 5}, {"threads": 1, "kv_dtype": "q8_0"}]
)
async def test_turns_of_a_conversation(model, logits, settings):
    usages, found = [], []
    for cached in (False, True):
        async with opened(model, prefix_cache=cached, **settings) as engine:
            turns = [turn async for turn in conversation(engine, logits)]
            usages.append([usage.cached_tokens for usage, _ in turns])
            found.append(turns[-1][1])
            if cached:
                # All but the last token of an answer has been computed: 69, 96 and 123 tokens.
                # The last one leaves a prompt before its end, where nobody kept a state.
                recurrent = engine.spec.family in RECURRENT
                assert usages[1] == [0, 64, 96 - 96 % BLOCK, 0 if recurrent else 32]
                snapshot = engine.snapshot()
                assert snapshot.prefix_hit_tokens == sum(usages[1])
                assert snapshot.prefix_query_tokens == sum(u.prompt_tokens for u, _ in turns)
                assert snapshot.kv_blocks_cached > 0
    assert usages[0] == [0] * 4
    assert found[0] == found[1]


@pytest.mark.parametrize("settings", [{}, {"step_tokens": 7, "cache_experts": 3}])
async def test_a_system_prompt_of_several_chats(model, logits, settings):
    prompts = [prompt(70) + prompt(25, seed=n) for n in range(4)]
    found, usages = [], []
    for cached in (False, True):
        async with opened(model, prefix_cache=cached, **settings) as engine:
            results = [(await engine.generate(ids, LOGGED), logits.take(ids)) for ids in prompts]
            found.append([(each.token_ids, each.logprobs, rows) for each, rows in results])
            usages.append([each.usage.cached_tokens for each, _ in results])
            recurrent = engine.spec.family in RECURRENT
    assert found[0] == found[1]
    # Where they part, the second leaves a copy of its state for those behind it.
    assert usages == [[0] * 4, [0, 0 if recurrent else 64, 64, 64]]


async def test_the_same_prompt_many_times_at_once(model, logits):
    """n answers to one prompt: it is computed once, and each is what it is alone."""
    ids = prompt(70)
    wanted = [SamplingParams(temperature=1, seed=n, max_tokens=9, ignore_eos=True) for n in range(5)]
    async with opened(model, prefix_cache=False) as engine:
        expected = [(await engine.generate(ids, each)).token_ids for each in wanted]
    async with opened(model) as engine:
        steps = Steps()
        engine.observe(steps)
        found = await asyncio.gather(*(engine.generate(ids, each) for each in wanted))
        assert steps.tokens == 70 + 4 * 6 + 5 * 8
    assert [each.token_ids for each in found] == expected
    assert sorted(each.usage.cached_tokens for each in found) == [0, 64, 64, 64, 64]


async def test_a_preempted_one_finds_its_own_blocks(model, logits):
    expected = []
    prompts = [prompt(n) for n in (60, 35)]
    async with opened(model, prefix_cache=False) as engine:
        for ids in prompts:
            expected.append((await engine.generate(ids, LOGGED)).token_ids)
    computed = {}
    for cached in (False, True):
        # Both begin in one step, and grow to nine blocks, of seven.
        async with opened(model, context=112, prefix_cache=cached, speculate="off") as engine:
            steps = Steps()
            engine.observe(steps)
            engine.pause()
            asked = [asyncio.create_task(engine.generate(ids, LOGGED)) for ids in prompts]
            while engine.snapshot().waiting < len(asked):  # noqa: ASYNC110 (it happens elsewhere)
                await asyncio.sleep(0.001)
            engine.resume()
            found = await asyncio.gather(*asked)
            computed[cached] = steps.tokens
            assert engine.snapshot().preemptions > 0
            assert [each.usage.cached_tokens for each in found] == [0, 0], "its own do not count"
        assert [each.token_ids for each in found] == expected
    assert computed[True] < computed[False]


async def test_memory_for_few(model, logits):
    """Blocks fall out of the cache all the time, and come back by being computed."""
    prompts = [[*prompt(40, seed=n % 3), *prompt(10 + n, seed=n)] for n in range(8)]
    expected = {}
    async with opened(model, prefix_cache=False) as engine:
        for n, ids in enumerate(prompts):
            expected[n] = (await engine.generate(ids, LOGGED)).token_ids, logits.take(ids)
    async with opened(model, context=128, cache_experts=3) as engine:
        for _ in range(2):
            results = await asyncio.gather(*(engine.generate(ids, LOGGED) for ids in prompts))
            for n, ids in enumerate(prompts):
                assert (results[n].token_ids, logits.take(ids)) == expected[n]
        for _ in range(2):
            result = await engine.generate(prompts[0], LOGGED)
            assert (result.token_ids, logits.take(prompts[0])) == expected[0]
        assert engine.snapshot().prefix_hit_tokens > 0


async def test_all_of_a_prompt_is_computed_where_all_is_wanted(model):
    ids = prompt(50)
    detailed = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=4, ignore_eos=True)
    async with opened(model) as engine:
        first = await engine.generate(ids, detailed)
        mean = await engine.embed(ids)
        await engine.generate(ids, GREEDY)
        again = await engine.generate(ids, detailed)
        assert (again.prompt_logprobs, again.token_ids) == (first.prompt_logprobs, first.token_ids)
        assert again.usage.cached_tokens == 0
        assert (await engine.embed(ids)).tobytes() == mean.tobytes()
        assert (await engine.generate(ids, GREEDY)).usage.cached_tokens == 48
        await settle(engine)
