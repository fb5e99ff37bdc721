"""The engine as programs use it: parameters, results, errors, and many requests that come and go."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import weakref

import numpy as np
import pytest
from engine_models import GREEDY, check_idle, opened, prompt, settle, write_text_model
from grpc_client import slowed
from oracle.make_checkpoints import make

from mer import Engine, EngineConfig, MerError, SamplingParams
from mer.engine import budget as budgets
from mer.engine.request import Request
from mer.errors import BudgetError, CheckpointError, ConfigError, EngineClosedError, RequestError


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True} | changes)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Without a tokenizer."""
    path = tmp_path_factory.mktemp("plain")
    make(path, "mixtral", num_hidden_layers=2)
    return path


async def test_params_end_to_end(text_model):
    async with opened(text_model) as engine:

        async def ask(**changes):
            return await engine.generate("The old man", params(**changes))

        plain = await ask()
        tokens, text = plain.token_ids, plain.text
        assert (len(tokens), plain.finish_reason, plain.logprobs) == (12, "length", None)
        assert (await ask(max_tokens=5)).token_ids == tokens[:5]

        first = next(i for i in range(4, 12) if tokens[i] not in tokens[:i])
        ended = await ask(stop_token_ids=[tokens[first], 299])
        assert (ended.token_ids, ended.finish_reason) == (tokens[: first + 1], "stop")
        shown = [await ask(max_tokens=first), await ask(max_tokens=first + 1)]
        assert ended.text == shown[0].text, "the token that ends an answer is not shown"
        assert len(ended.text) <= len(shown[1].text)

        stopped = await ask(stop=text[6:8])
        assert (stopped.text, stopped.finish_reason) == (text[: text.index(text[6:8])], "stop")
        assert tokens[: len(stopped.token_ids)] == stopped.token_ids
        assert len(stopped.token_ids) < 12

        detailed = await ask(logprobs=3)
        assert detailed.token_ids == tokens
        for each, token in zip(detailed.logprobs, tokens, strict=True):
            assert (each.token_id, len(each.top)) == (token, 3)
            assert each.top[0] == (token, each.text, each.logprob), "greedy takes the likeliest"
            assert each.text == engine.tokenizer.token_text(token)
            assert sum(np.exp(p) for _, _, p in each.top) <= 1 + 1e-9
        assert [len(each.top) for each in (await ask(logprobs=0)).logprobs] == [0] * 12

        drawn = [await ask(temperature=1, seed=seed) for seed in (5, 5, 6)]
        assert drawn[0].token_ids == drawn[1].token_ids != drawn[2].token_ids
        assert [each.seed for each in drawn] == [5, 5, 6]
        again = await ask(temperature=1)
        assert (await ask(temperature=1, seed=again.seed)).token_ids == again.token_ids
        assert (await ask(temperature=1, top_k=1, seed=1)).token_ids == tokens
        assert (await ask(temperature=1, top_p=0, seed=1)).token_ids == tokens
        assert (await ask(temperature=1, min_p=1, seed=1)).token_ids == tokens
        assert len(set((await ask(frequency_penalty=2, presence_penalty=2)).token_ids)) >= len(set(tokens))


async def test_end_token_and_ignore_eos(text_model, tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    for file in text_model.iterdir():
        (path / file.name).symlink_to(file)
    async with opened(path) as engine:
        free = (await engine.generate("rain", params())).token_ids
    at = next(i for i in range(3, 12) if free[i] not in free[:i])
    (path / "generation_config.json").unlink()
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[at]]}))
    async with opened(path) as engine:
        ended = await engine.generate("rain", params(ignore_eos=False))
        assert (ended.token_ids, ended.finish_reason) == (free[: at + 1], "stop")
        assert (await engine.generate("rain", params())).token_ids == free


async def test_usage_timings_and_pieces(text_model):
    async with opened(text_model, cache_experts=2) as small, opened(text_model) as large:
        results = []
        for engine in (small, large):
            pieces = [piece async for piece in engine.stream("The old man", params())]
            assert [len(piece.token_ids) for piece in pieces] == [1] * 12
            assert [p.finish_reason for p in pieces] == [None] * 11 + ["length"]
            assert all((p.usage, p.timings) == (None, None) for p in pieces[:-1])
            result = await engine.generate("The old man", params())
            assert "".join(p.text for p in pieces) == result.text
            assert sum((p.token_ids for p in pieces), ()) == result.token_ids
            usage, timings = result.usage, result.timings
            assert usage.prompt_tokens == len(engine.tokenizer.encode("The old man"))
            assert (usage.completion_tokens, usage.total_tokens) == (12, usage.prompt_tokens + 12)
            seconds = (timings.queue_s, timings.prefill_s, timings.decode_s, timings.io_wait_s)
            assert min(seconds) >= 0
            assert timings.hits + timings.misses > 0
            assert timings.hit_rate == timings.hits / (timings.hits + timings.misses)
            results.append(timings)
        # Two MoE layers, 12 steps, at least two experts each, and what was read is what was missed.
        assert results[0].hits + results[0].misses >= 2 * 12 * 2
        assert results[0].bytes_read >= results[0].misses * 3 * 32 * 64 * 4 > 0
        # The large cache has seen these tokens: everything is there.
        assert (results[1].misses, results[1].bytes_read, results[1].hit_rate) == (0, 0, 1.0)
        assert small.stats.bytes_read > large.stats.bytes_read > 0


async def test_kinds_of_prompts(text_model):
    async with opened(text_model) as engine:
        ids = engine.tokenizer.encode("The sea")
        expected = (await engine.generate("The sea", params())).token_ids
        for same in (ids, tuple(ids), np.array(ids), np.array(ids, np.int32), iter(ids)):
            assert (await engine.generate(same, params())).token_ids == expected
        assert (await engine.generate("The sea", None)).finish_reason in ("stop", "length")


BAD_PROMPTS = {
    "empty list": ([], "empty"),
    "too long": ([1] * 200, "200 tokens"),
    "beyond the vocabulary": ([1, 211], "211"),
    "negative": ([-1], "-1"),
    "fraction": ([1.5], "1.5"),
    "bool": ([True], "True"),
    "words": (["a"], "'a'"),
    "bytes": (b"ab", "bytes"),
    "none": (None, "NoneType"),
    "number": (3, "int"),
    "no tokenizer": ("text", "without a tokenizer"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
async def test_bad_prompts(model, case):
    bad, said = BAD_PROMPTS[case]
    async with opened(model, context=128) as engine:
        for ask in (engine.generate(bad), anext(engine.stream(bad))):
            with pytest.raises(RequestError, match=said) as error:
                await ask
            assert error.value.param == "prompt"


async def test_the_longest_prompt_and_answer(model):
    """Prompt and answer fill the KV cache, or the model's positions, to the last token."""
    for settings, most in (({"context": 128}, 128), ({"context": 600}, 512), ({"context": 100}, 112)):
        async with opened(model, **settings) as engine:
            full = await engine.generate(prompt(most - 1), params(max_tokens=None))
            assert (len(full.token_ids), full.finish_reason) == (1, "length")
            rest = await engine.generate(prompt(most - 9), params(max_tokens=50))
            assert (len(rest.token_ids), rest.finish_reason) == (9, "length")
            with pytest.raises(RequestError, match=str(most)):
                await engine.generate(prompt(most), params())


BAD_SETTINGS = {
    "unknown": ({"rams": "1GiB"}, "rams"),
    "size": ({"ram": "much"}, "much"),
    "context": ({"context": 3}, "context"),
    "threads": ({"threads": 0}, "threads"),
    "step": ({"step_tokens": 0}, "step_tokens"),
    "running": ({"max_running": 0}, "max_running"),
    "depth": ({"queue_depth": 0}, "queue_depth"),
    "kv": ({"kv_dtype": "int8"}, "kv_dtype"),
    "share": ({"cache_experts": "110%"}, "cache_experts"),
    "no number": ({"cache_experts": "many"}, "cache_experts"),
    "no number either": ({"cache_experts": float("nan")}, "cache_experts"),
    "no experts": ({"cache_experts": 0}, "cache_experts"),
    "back end": ({"io_backend": "mmap"}, "mmap"),
    "policy": ({"cache_policy": "random"}, "random"),
    "too few experts": ({"cache_experts": 1}, "cache_experts"),
    "more context than ever": ({"context": 10**6}, "context"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
async def test_bad_settings(model, case):
    settings, said = BAD_SETTINGS[case]
    with pytest.raises(ConfigError, match=said):
        await Engine.open(model, **settings)


@pytest.mark.parametrize("name", ["temperature", "top_p", "max_tokens", "stop", "logprobs", "top_k"])
def test_bad_params_name_the_parameter(name):
    with pytest.raises(RequestError, match=name) as error:
        SamplingParams(**{name: -5})
    assert error.value.param == name


async def test_settings_over_a_config(model):
    config = EngineConfig(context=64, threads=1)
    async with Engine.open(model, config, threads=2) as engine:
        assert (engine.budget.context, engine.budget.threads) == (64, 2)
    with pytest.raises(CheckpointError, match="nowhere"):
        await Engine.open(model / "nowhere")


async def test_budget_names_the_least_that_works(model, monkeypatch):
    monkeypatch.setattr(budgets, "resident_bytes", lambda: 100 << 20)  # that of pytest may grow meanwhile
    with pytest.raises(BudgetError) as error:
        await Engine.open(model, ram="1MiB", context=64)
    said = str(error.value)
    for part in ("dense weights", "KV cache of 64 tokens", "buffers", "the program itself", "2 experts"):
        assert part in said
    least = int(said.split("at least ")[1].split(" MiB")[0].replace(",", "")) << 20
    async with opened(model, ram=least, context=64) as engine:
        assert engine.budget.total <= least
        assert (await engine.generate([1, 2], params())).usage.completion_tokens == 12
    with pytest.raises(BudgetError, match="at least"):
        await Engine.open(model, ram=least - (64 << 20), context=64)


async def test_many_requests(model):
    """Fifty at once: each gets what it gets alone."""
    prompts = [prompt(1 + n % 23, seed=n) for n in range(50)]
    wanted = [params(max_tokens=1 + n % 7, temperature=n % 2, seed=n) for n in range(50)]
    async with opened(model, context=256, cache_experts=3, step_tokens=24) as engine:
        found = await asyncio.gather(*map(engine.generate, prompts, wanted))
        for ids, given, result in zip(prompts, wanted, found, strict=True):
            assert (await engine.generate(ids, given)).token_ids == result.token_ids
            assert result.usage.completion_tokens == given.max_tokens


LONG = params(max_tokens=400)


async def test_leaving_a_stream_early(model):
    async with opened(model) as engine:
        expected = (await engine.generate(prompt(9), params(max_tokens=60))).token_ids
        others = [asyncio.create_task(engine.generate(prompt(9), params(max_tokens=60))) for _ in range(3)]
        for leave_after in (1, 2, 5):
            async for piece in engine.stream(prompt(30), LONG):
                leave_after -= len(piece.token_ids)
                if not leave_after:
                    break
        stream = engine.stream(prompt(31), LONG)
        await anext(stream)
        await stream.aclose()
        engine.stream(prompt(32), LONG)  # never begun
        held = engine.stream(prompt(33), LONG)
        await anext(held)
        del held
        for other in others:
            assert (await other).token_ids == expected
        await settle(engine)
        check_idle(engine)


async def test_cancellation_and_timeouts(model):
    async with opened(model, context=1024) as engine:
        expected = (await engine.generate(prompt(9), params(max_tokens=60))).token_ids
        other = asyncio.create_task(engine.generate(prompt(9), params(max_tokens=60)))
        tasks = [asyncio.create_task(engine.generate(prompt(40, seed=n), LONG)) for n in range(30)]
        await anext(engine.stream([5], params(max_tokens=1)))
        for task in tasks:  # running ones and waiting ones
            task.cancel()
        assert all(
            isinstance(e, asyncio.CancelledError)
            for e in await asyncio.gather(*tasks, return_exceptions=True)
        )
        for seconds in (0, 0.001, 0.02):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(_for_ever(engine), seconds)
        assert (await other).token_ids == expected
        await settle(engine)
        check_idle(engine)


async def _for_ever(engine):
    while True:
        await engine.generate(prompt(20), LONG)


async def test_close(model):
    engine = await Engine.open(model, context=512)
    expected = (await engine.generate([1, 2], params(max_tokens=50))).token_ids
    tasks = [asyncio.create_task(engine.generate([1, 2], params(max_tokens=50))) for _ in range(20)]
    await asyncio.sleep(0)
    await engine.close()
    assert [(await task).token_ids for task in tasks] == [expected] * 20, "drained"
    check_idle(engine)
    await engine.close()
    await engine.close(drain=False)
    for ask in (engine.generate([1]), anext(engine.stream([1]))):
        with pytest.raises(EngineClosedError):
            await ask
    assert engine._runner.reader.closed
    assert not engine._worker._thread.is_alive()


async def test_what_a_closed_engine_had_is_free_at_once(text_model):
    """No garbage collection is needed: its memory is what the next one needs."""
    gc.disable()
    try:
        engine = await Engine.open(text_model, context=128)
        await engine.generate("as", params(max_tokens=3))
        await engine.close()
        forward = weakref.ref(engine._runner._forward)
        del engine
        for _ in range(500):  # the loop may still have the answer in its hands
            if forward() is None:
                break
            await asyncio.sleep(0.01)
        assert forward() is None
    finally:
        gc.enable()


async def test_close_without_draining(model):
    engine = await Engine.open(model, context=512)
    tasks = [asyncio.create_task(engine.generate([1, 2], LONG)) for _ in range(20)]
    stream = engine.stream([3], LONG)
    await anext(stream)
    await engine.close(drain=False)
    for task in tasks:
        with pytest.raises(EngineClosedError):
            await task
    with pytest.raises(EngineClosedError):
        async for _ in stream:
            pass
    check_idle(engine)


async def test_dropping_what_another_close_drains(model):
    engine = await Engine.open(model, context=512)
    task = asyncio.create_task(engine.generate([1, 2], params(max_tokens=500)))
    await anext(engine.stream([5], params(max_tokens=1)))
    with slowed(0.005):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.close(), 0.001)
        await engine.close(drain=False)
    assert engine._runner.reader.closed
    check_idle(engine)
    assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], EngineClosedError)


async def test_a_body_that_raises(model):
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with Engine.open(model) as engine:
            task = asyncio.create_task(engine.generate([1, 2], LONG))
            await anext(engine.stream([3], GREEDY))
            raise ZeroDivisionError
    with pytest.raises(EngineClosedError):
        await task
    assert engine._runner.reader.closed
    check_idle(engine)


async def test_opening_is_cancelled(model):
    def steps():
        return {thread for thread in threading.enumerate() if thread.name == "mer-step"}

    before = steps()
    for _ in range(3):
        task = asyncio.ensure_future(_opened(model))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert steps() <= before


async def _opened(model):
    return await Engine.open(model)


async def test_the_arena_becomes_fixed_buffers_once_it_is_full(model):
    """Not where all experts fit: then each is read once."""
    outputs = []
    for slots in (2, 3, "100%"):
        async with opened(model, cache_experts=slots, io_backend="uring") as engine:
            outputs.append((await engine.generate(prompt(9), params())).token_ids)
            stats, arena = engine._runner.reader.stats(), engine._runner.experts.cache.arena_bytes
        assert stats["registered_bytes"] == (0 if slots == "100%" else arena)
        assert (stats["fixed_ops"] > 0) == (slots != "100%")
    assert outputs[0] == outputs[1] == outputs[2]


async def test_several_engines(model, text_model):
    async with opened(text_model) as other, opened(model, cache_experts=2) as small:
        async with Engine.open(model, context=512) as engine:
            a, b, c = await asyncio.gather(
                engine.generate([1, 2], params()),
                other.generate("sea", params()),
                small.generate([1, 2], params()),
            )
        assert a.token_ids == c.token_ids
        assert b.text
        assert (await small.generate([1, 2], params())).token_ids == a.token_ids
        with pytest.raises(EngineClosedError):
            await engine.generate([1])


def test_one_engine_in_several_event_loops(model):
    async def use(engine):
        return (await engine.generate([1, 2, 3], params())).token_ids

    engine = asyncio.run(_opened(model))
    first = asyncio.run(use(engine))
    assert asyncio.run(use(engine)) == first
    found = []
    threads = [threading.Thread(target=lambda: found.append(asyncio.run(use(engine)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [first] * 4
    asyncio.run(engine.close())
    check_idle(engine)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_event_loop_that_goes_away(model):
    engine = asyncio.run(_opened(model))

    async def abandon():
        asyncio.create_task(engine.generate([1, 2], LONG))  # noqa: RUF006
        await anext(engine.stream([3], params()))

    asyncio.run(abandon())  # cancels the task

    loop = asyncio.new_event_loop()
    task = loop.create_task(engine.generate([1, 2], params(max_tokens=500)))
    loop.run_until_complete(asyncio.sleep(0.005))
    loop.close()  # without a word to anybody

    async def after():
        result = await engine.generate([1, 2, 3], params())
        await engine.close(drain=True)
        return result

    assert len(asyncio.run(after()).token_ids) == 12
    check_idle(engine)
    assert engine._worker.failure == ""
    task._log_destroy_pending = False
    del task
    gc.collect()  # whatever it says about its loop, it says here


async def test_an_error_inside_ends_nobody_else(model, monkeypatch):
    """A bug of ours in one answer's tokens: that one fails, and is told why."""
    accept = Request.accept

    def broken(request, logits):
        if request.tokens[0] == 7:
            raise KeyError("oops")
        return accept(request, logits)

    monkeypatch.setattr(Request, "accept", broken)
    async with opened(model) as engine:
        good = [asyncio.create_task(engine.generate([n, 2], params())) for n in (1, 2, 3)]
        with pytest.raises(MerError, match="oops"):
            await engine.generate([7, 2], params())
        for each in good:
            assert len((await each).token_ids) == 12


async def test_a_thread_that_ends_leaves_nobody_waiting(model, monkeypatch):
    engine = await Engine.open(model)

    def broken(self, chunks):
        raise ValueError("oops")

    monkeypatch.setattr(type(engine._runner), "step", broken)
    for _ in range(2):
        with pytest.raises(MerError, match="oops"):
            await asyncio.wait_for(engine.generate([1, 2], params()), 60)
    await engine.close()
    check_idle(engine)
