"""What a request may ask for, and how requests get along: order, time, room, slow readers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from contextlib import aclosing
from typing import Any, cast

import attrs
import numpy as np
import pytest
import torch
import uvloop
from engine_models import GREEDY, check_idle, gated, opened, prompt, settle, write_text_model
from oracle.make_checkpoints import make

from mer import Engine, QueueFullError, RequestTimeoutError, SamplingParams, Structure
from mer.engine.mailbox import FULL
from mer.engine.request import Embedding
from mer.engine.sampling import Sampler
from mer.engine.stats import StepStats
from mer.errors import RequestError, TooLongError


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True} | changes)


LONG = params(max_tokens=300)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    return path, make(path, "qwen3_moe", num_hidden_layers=2)


@pytest.fixture(scope="module")
def model(made):
    return made[0]


def test_biases_are_looked_at_once():
    """There may be a hundred thousand of them, and each of n answers has parameters of its own."""
    given = {5: 4.0, 7: -100}
    once = params(logit_bias=given)
    given[8] = 1000
    again = attrs.evolve(once, seed=3)
    assert again.logit_bias is once.logit_bias
    assert again.logit_bias == {5: 4.0, 7: -100}
    assert (again.logit_bias[7], 8 in again.logit_bias, repr(again.logit_bias)) == (
        -100, False, "Biases({5: 4.0, 7: -100.0})",
    )  # fmt: skip


def test_stop_tokens_are_not_too_many():
    assert len(SamplingParams(stop_token_ids=range(4096)).stop_token_ids) == 4096
    with pytest.raises(RequestError, match="stop_token_ids: 4097 of them; at most 4096") as error:
        SamplingParams(stop_token_ids=range(4097))
    assert error.value.param == "stop_token_ids"
    with pytest.raises(RequestError) as error:
        SamplingParams(stop_token_ids=[-1] * 100_000)
    assert len(str(error.value)) < 200


def test_refused_parameters_are_named():
    for name, bad in {
        "logit_bias": {1: 101},
        "prompt_logprobs": 21,
        "speculative": 1,
        "priority": 0.5,
        "timeout": 0,
        "structure": "json",
        "max_tokens": 0,
    }.items():
        with pytest.raises(RequestError, match=name) as error:
            SamplingParams(**{name: bad})
        assert error.value.param == name
    for bias in ({-1: 0}, {2**63: 0}, {"1": 0}, {1: True}, {1: float("nan")}, [1], {1: "2"}):
        with pytest.raises(RequestError, match="logit_bias") as error:
            SamplingParams(logit_bias=bias)
        assert error.value.param == "logit_bias"
    for make_structure, bad in (
        (Structure.json_schema, "{"),
        (Structure.json_schema, 3),
        (Structure.json_schema, {"a": object()}),
        (Structure.regex, ""),
        (Structure.choice, []),
        (Structure.choice, "yes"),
        (Structure.choice, ["", "a"]),
    ):
        with pytest.raises(RequestError, match="structure") as error:
            make_structure(bad)
        assert error.value.param == "structure"


def test_a_bias_comes_before_everything_else():
    logits = np.array([3.0, 2.0, 1.0, 0.0], np.float32)
    biased = SamplingParams(temperature=0, logit_bias={3: 5, 0: -1}, logprobs=1, repetition_penalty=2.0)
    sampler = Sampler(biased, [3], 4)
    # 3 - 1, 2, 1, (0 + 5) / 2
    drawn = sampler.sample(logits)
    assert drawn.token == 3
    assert drawn.top[0][0] == 0, "log-probabilities are the model's own"
    assert logits.tolist() == [3, 2, 1, 0]
    with pytest.raises(RequestError, match="outside the vocabulary"):
        Sampler(SamplingParams(logit_bias={4: 1}), [], 4)


async def test_biases_in_the_engine(model):
    async with opened(model) as engine:
        plain = (await engine.generate([1, 2], params())).token_ids
        forced = await engine.generate([1, 2], params(logit_bias={17: 100}))
        assert forced.token_ids == (17,) * 12
        assert (await engine.generate([1, 2], params(logit_bias={5: 0.0}))).token_ids == plain
        with pytest.raises(RequestError, match="outside the vocabulary") as error:
            await engine.generate([1], params(logit_bias={211: 1}))
        assert error.value.param == "logit_bias"


@pytest.mark.parametrize("settings", [{}, {"step_tokens": 7, "cache_experts": 3}, {"max_running": 1}])
async def test_logprobs_of_the_prompt(made, settings):
    path, oracle = made
    ids = prompt(33)
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
    async with opened(path, **settings) as engine:
        plain = await engine.generate(ids, GREEDY)
        other = asyncio.create_task(engine.generate(prompt(20), params(max_tokens=30)))
        for count in (0, 3):
            result = await engine.generate(ids, params(prompt_logprobs=count, logprobs=0))
            assert result.token_ids == plain.token_ids
            first, *found = result.prompt_logprobs
            assert first is None
            for at, each in enumerate(found, 1):
                assert (each.token_id, len(each.top)) == (ids[at], count)
                assert each.logprob == pytest.approx(expected[at - 1, ids[at]], abs=1e-3)
                likeliest = np.sort(expected[at - 1])[::-1][:count]
                assert [p for _, _, p in each.top] == pytest.approx(likeliest, abs=1e-3)
            nothing = await engine.generate(ids, params(prompt_logprobs=count, max_tokens=0))
            assert nothing.prompt_logprobs == result.prompt_logprobs
            assert (nothing.token_ids, nothing.text, nothing.finish_reason) == ((), "", "length")
            assert (nothing.usage.prompt_tokens, nothing.usage.completion_tokens) == (33, 0)
        pieces = [piece async for piece in engine.stream(ids, params(prompt_logprobs=1, max_tokens=3))]
        assert [piece.prompt_logprobs is None for piece in pieces] == [False, True, True]
        assert len((await other).token_ids) == 30
        one = await engine.generate([5], params(prompt_logprobs=1, max_tokens=0))
        assert one.prompt_logprobs == (None,)


async def test_embeddings(made):
    """The mean over positions of transformers' last hidden state, whatever else is computed."""
    path, oracle = made
    prompts = [prompt(n) for n in (1, 16, 50)]
    found = []
    for settings in ({}, {"step_tokens": 7, "cache_experts": 3}, {"context": 64}):
        async with opened(path, **settings) as engine:
            others = [asyncio.create_task(engine.generate(prompt(9, seed=n), params())) for n in range(3)]
            found.append([mean.tobytes() for mean in await asyncio.gather(*map(engine.embed, prompts))])
            await asyncio.gather(*others)
            for ids in prompts:
                with torch.no_grad():
                    expected = oracle.model(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
                mean = await engine.embed(ids)
                assert (mean.dtype, mean.shape) == (np.float32, (64,))
                np.testing.assert_allclose(mean, expected, atol=2e-3)
            with pytest.raises(RequestError, match="empty"):
                await engine.embed([])
            with pytest.raises(RequestError, match="513 tokens"):
                await engine.embed([1] * 513)
            tasks = [asyncio.create_task(engine.embed(prompt(60, seed=n))) for n in range(4)]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    assert found[0] == found[1] == found[2], "byte for byte"


async def test_priorities(model):
    """Among those that wait the urgent ones come first, and the answers are the same."""
    ended = []

    async def ask(engine, n, priority):
        result = await engine.generate(prompt(5, seed=n), params(priority=priority))
        ended.append((priority, n))
        return result.token_ids

    async with opened(model, max_running=1) as engine:
        expected = [(await engine.generate(prompt(5, seed=n), params())).token_ids for n in range(6)]
        come = threading.Event()  # none begins before all have come
        engine._worker._send(come.wait)
        tasks = [asyncio.create_task(ask(engine, n, n % 3)) for n in range(6)]
        await asyncio.sleep(0)
        come.set()
        assert [await task for task in tasks] == expected
    assert ended == [(0, 0), (0, 3), (1, 1), (1, 4), (2, 2), (2, 5)]


async def test_timeouts(model):
    async with opened(model, max_running=2) as engine:
        expected = (await engine.generate(prompt(9), params())).token_ids
        slow = [
            asyncio.create_task(engine.generate(prompt(30, seed=n), params(max_tokens=400, timeout=0.05)))
            for n in range(4)  # two run, two wait
        ]
        good = asyncio.create_task(engine.generate(prompt(9), params(timeout=600)))
        for task in slow:
            with pytest.raises(RequestTimeoutError, match=r"0\.05 seconds"):
                await task
        assert (await good).token_ids == expected
        # Of one that nobody computes: its reader is slow, and then its time is over.
        stream = engine.stream(prompt(5), params(max_tokens=300, timeout=600))
        await anext(stream)
        await _until(lambda: engine.snapshot().waiting == 1)
        [job] = engine._worker.jobs
        engine._worker.call(lambda: engine._scheduler._deadlines.update({job: time.perf_counter()}))
        await _until(lambda: not engine._worker._jobs)
        with pytest.raises(RequestTimeoutError):
            async for _ in stream:
                pass


async def _until(true) -> None:
    while not true():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def test_a_full_queue(model):
    async def ask(asking):
        with gated() as go:  # none ends before all have come
            tasks = [asyncio.ensure_future(each) for each in asking]
            await _until(lambda: sum(task.done() for task in tasks) == 4)
            go.set()
            return await asyncio.gather(*tasks, return_exceptions=True)

    async with opened(model, max_running=2, max_waiting=3) as engine:
        done = await ask(engine.generate(prompt(5, seed=n), params()) for n in range(9))
        refused = [each for each in done if isinstance(each, QueueFullError)]
        assert len(refused) == 4, "two run and three wait"
        assert all(isinstance(each, QueueFullError) for each in done[5:])
        assert all(1 <= each.retry_after <= 60 for each in refused)
        assert [len(each.token_ids) for each in done[:5]] == [12] * 5
        done = await ask(engine.embed(prompt(5, seed=n)) for n in range(9))
        assert [isinstance(each, QueueFullError) for each in done] == [False] * 5 + [True] * 4
        assert len((await engine.generate(prompt(5), params())).token_ids) == 12


async def test_a_slow_reader_is_held_up_and_loses_nothing(model):
    async with opened(model, max_running=1, context=512) as engine:
        expected = (await engine.generate(prompt(5), LONG)).token_ids
        slow = engine.stream(prompt(5), LONG)
        found = list((await anext(slow)).token_ids)
        await _until(lambda: engine.snapshot().waiting == 1)
        [job] = engine._worker._jobs
        assert len(job.mailbox._items) == FULL
        tokens = len(job.tokens)
        other = await engine.generate(prompt(8), LONG)
        assert len(other.token_ids) == 300, "it is in nobody's way"
        assert len(job.tokens) == tokens, "and nothing is computed for it"
        # One that needs all the memory takes its blocks.
        await engine.generate(prompt(495), params(max_tokens=10))
        assert not job.blocks
        async for piece in slow:
            found += piece.token_ids
        assert tuple(found) == expected


async def test_many_slow_readers(model):
    """More than may run: each reads now and then, some go away."""
    async with opened(model, max_running=4, context=1024) as engine:
        expected = {n: (await engine.generate(prompt(5, seed=n), LONG)).token_ids for n in range(3)}

        async def read(n):
            found = []
            async for piece in engine.stream(prompt(5, seed=n % 3), LONG):
                found += piece.token_ids
                if len(found) % 90 == 0:
                    await asyncio.sleep(0.05)
                if n % 5 == 4 and len(found) == 150:
                    return
            assert tuple(found) == expected[n % 3]

        await asyncio.gather(*map(read, range(15)))


async def test_draining_waits_for_no_reader(model):
    engine = await Engine.open(model, context=512)
    stream = engine.stream(prompt(5), LONG)
    found = list((await anext(stream)).token_ids)
    await _until(lambda: engine.snapshot().waiting == 1)
    await asyncio.wait_for(engine.close(), 60)
    async for piece in stream:
        found += piece.token_ids
    assert len(found) == 300
    check_idle(engine)


class Seen:
    """An observer that writes everything down."""

    def __init__(self) -> None:
        self.events = defaultdict(list)
        self.threads = set()

    def __getattr__(self, name):
        def event(*facts):
            self.threads.add(threading.current_thread().name)
            self.events[name].append(facts)
            if name == "queued":
                raise ValueError("an observer's own trouble")

        return event


async def test_what_is_observed(model):
    async with opened(model, cache_experts=4, max_running=4) as engine:
        seen = Seen()
        engine.observe(seen)
        await asyncio.gather(*(engine.generate(prompt(5, seed=n), params()) for n in range(3)))
        with pytest.raises(RequestTimeoutError):
            await engine.generate(prompt(7), params(max_tokens=400, timeout=0.02))
        async with aclosing(engine.stream(prompt(8), LONG)) as deltas:
            await anext(deltas)
        await settle(engine)
        events = seen.events
        assert seen.threads == {"mer-step"}
        queued, started = len(events["queued"]), len(events["started"])
        assert queued == len(set(events["queued"])) >= 6
        firsts = [first for first, _ in events["token"]].count(True)
        assert queued - 1 <= firsts <= started <= queued  # one may have run out of time before it began
        assert min(seconds for (seconds,) in events["started"]) >= 0
        assert min(seconds for _, seconds in events["token"]) > 0
        reasons = [reason for reason, _ in events["ended"]]
        assert reasons[:3] == ["length"] * 3
        assert (reasons.count("timeout"), reasons.count("cancelled")) == (1, 1)
        assert [usage.completion_tokens for reason, usage in events["ended"][:3]] == [12] * 3
        totals = sum((stats for _, _, stats in events["step"][1:]), events["step"][0][2])
        snapshot = engine.snapshot()
        assert totals.misses == snapshot.steps.misses
        assert snapshot.experts == 16
        assert (snapshot.waiting, snapshot.running, snapshot.pinned) == (0, 0, 0)
        assert snapshot.cache_slots == snapshot.resident == 4
        assert snapshot.evictions > 0
        assert snapshot.kv_blocks == snapshot.kv_blocks_free
        assert 0 < snapshot.resident_bytes < snapshot.ram_budget_bytes


def test_under_uvloop(model):
    async def use():
        async with opened(model, cache_experts=4) as engine:
            assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
            expected = (await engine.generate([1, 2], params())).token_ids
            tasks = [asyncio.create_task(engine.generate([1, 2], params())) for _ in range(20)]
            tasks[7].cancel()
            tasks[7] = asyncio.create_task(engine.generate([1, 2], LONG))
            stream = engine.stream([3], LONG)
            await anext(stream)
            tasks[7].cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert [each.token_ids for n, each in enumerate(done) if n != 7] == [expected] * 19
            assert isinstance(done[7], asyncio.CancelledError)
            await stream.aclose()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(engine.generate([4], LONG), 0.01)
            assert (await engine.embed([1, 2])).shape == (64,)
        return engine

    engine = uvloop.run(use())
    check_idle(engine)

    async def abandon():
        engine = await Engine.open(model)
        asyncio.create_task(engine.generate([1, 2], LONG))  # noqa: RUF006
        await anext(engine.stream([3], params()))
        return engine

    engine = uvloop.run(abandon())
    uvloop.run(engine.close())
    check_idle(engine)


async def test_a_prompt_is_refused_by_its_length_alone(tmp_path, monkeypatch):
    """Megabytes are not cut into tokens to find out that they are too many."""
    async with opened(write_text_model(tmp_path / "model", chat=True), context=64) as engine:
        monkeypatch.setattr(engine.tokenizer, "encode", None)
        with pytest.raises(RequestError, match=r"the prompt has at least \d+ tokens; 64 is the most"):
            await engine.generate("x" * 1_000_000)
        with pytest.raises(RequestError, match="the prompt has at least"):
            engine.chat_prompt([{"role": "user", "content": "x" * 1_000_000}])
        with pytest.raises(RequestError, match="the prompt has 1000000 tokens"):
            await engine.generate([-1] * 1_000_000)


async def test_a_prompt_of_too_many_tokens_is_refused_before_they_are_a_list(tmp_path, monkeypatch):
    """A million of Python's integers would take milliseconds to be made, with everybody waiting."""
    async with opened(write_text_model(tmp_path / "model", chat=True), context=64) as engine:
        text, made = "word " * 60, []
        vocabulary = engine.tokenizer._vocabulary
        raw = vocabulary._tokenizer

        class Watched:
            def __init__(self, encoding):
                self._encoding = encoding

            def __len__(self):
                return len(self._encoding)

            @property
            def ids(self):
                made.append(len(self))
                return self._encoding.ids

        class Watching:
            def __getattr__(self, name):
                return getattr(raw, name)

            def encode(self, *args, **more):
                return Watched(raw.encode(*args, **more))

        monkeypatch.setattr(vocabulary, "_tokenizer", Watching())
        for ask in (
            lambda: engine.generate(text),
            lambda: engine.embed(text),
            lambda: asyncio.to_thread(engine.chat_prompt, [{"role": "user", "content": text}]),
        ):
            with pytest.raises(TooLongError, match=r"the prompt has \d+ tokens; 64 is the most") as error:
                await ask()
            assert error.value.tokens > 64
        assert made == []
        await engine.generate("word", params(max_tokens=1))
        assert len(made) == 1


def test_a_job_has_the_steps_that_it_took_part_in() -> None:
    """It was paused twice, and others' steps went on."""
    job = Embedding(tokens=[1], id=0, mailbox=cast(Any, None))
    total = StepStats()
    for step, here in enumerate((0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0)):
        before, total = total, total + StepStats(hits=10**step)
        if here:
            job.end_step(before, total)
    assert job.steps == StepStats(hits=1_110_010_110)
