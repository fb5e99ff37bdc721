"""The same request gives the same bytes, however it is streamed, cut, batched, interrupted or threaded.

Compared are the raw logits that every token was drawn from, the tokens, and the log-probabilities. The
reference is the engine with all experts resident and each request alone, on a checkpoint that transformers
wrote; that this reference is right is for tests/oracle.
"""

from __future__ import annotations

import asyncio

import pytest
import torch
from engine_models import Logits, convert_to, opened, prompt, runnable
from oracle.make_checkpoints import DENSE, FAMILY, IN_PLACE, make

from mer import SamplingParams

# With two experts a token the order in which they are added would not show.
TOP_K = 3
ONLY = {"phimoe": 2}  # families that know but one number
GREEDY = SamplingParams(temperature=0, max_tokens=20, logprobs=20, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, seed=11, max_tokens=20, logprobs=20, ignore_eos=True)
PROMPTS = [prompt(n) for n in (70, 5, 33)]

CACHES = {
    "one-layers-experts": {"cache_experts": TOP_K},
    "five-experts": {"cache_experts": 5},
    "half": {"cache_experts": "50%"},
    "half, lru": {"cache_experts": "50%", "cache_policy": "lru"},
    "five, lru, nothing ahead": {"cache_experts": 5, "cache_policy": "lru", "prefetch": 0},
}
BACKENDS = {
    back_end: {"cache_experts": TOP_K, "io_backend": back_end} for back_end in ("uring", "preadv", "buffered")
}
CUTS = {
    "token-by-token": {"step_tokens": 1, "cache_experts": 4},
    "sixteen": {"step_tokens": 16, "cache_experts": TOP_K},
    "seven": {"step_tokens": 7},
    "one-thread": {"threads": 1},
    "three-threads": {"threads": 3, "cache_experts": 4},
    "one-at-a-time": {"max_running": 1},
    "shallow-queue": {"queue_depth": 1, "cache_experts": TOP_K},
}


async def alone(path, params, logits, **settings):
    """What each prompt gets, one after the other."""
    found = []
    async with opened(path, **settings) as engine:
        for ids in PROMPTS:
            result = await engine.generate(ids, params)
            found.append((result.token_ids, result.logprobs, logits.take(ids)))
    return found


async def together(path, params, logits, **settings):
    """What each prompt gets when the second joins after three tokens of the first, the third after five."""
    async with opened(path, **settings) as engine:
        gates = [asyncio.Event() for _ in PROMPTS]

        async def ask(number):
            if number:
                await gates[number].wait()
            pieces = []
            async for piece in engine.stream(PROMPTS[number], params):
                pieces.append(piece)
                if number == 0:
                    for late, tokens in ((1, 3), (2, 5)):
                        if len(pieces) == tokens:
                            gates[late].set()
            ids = tuple(token for piece in pieces for token in piece.token_ids)
            return ids, tuple(each for piece in pieces for each in piece.logprobs)

        answers = await asyncio.gather(*map(ask, range(len(PROMPTS))))
    return [(*a, logits.take(ids)) for a, ids in zip(answers, PROMPTS, strict=True)]


async def preempted(model, params, logits, expected, **settings):
    """Asserts that requests that are paused and computed again answer as ``expected``."""
    # All begin in one step. 90, 25 and 53 tokens in the end, of 112: while the first two run, there are seven
    # blocks for eight, unless a right draft ends one before that.
    async with opened(model, context=112, speculate="off", **settings) as engine:
        engine.pause()
        asked = [asyncio.create_task(engine.generate(ids, params)) for ids in PROMPTS]
        while engine.snapshot().waiting < len(asked):  # noqa: ASYNC110 (it happens elsewhere)
            await asyncio.sleep(0.001)
        engine.resume()
        answers = await asyncio.gather(*asked)
        assert engine.snapshot().preemptions
    found = [(a.token_ids, a.logprobs, logits.take(ids)) for a, ids in zip(answers, PROMPTS, strict=True)]
    assert found == expected, settings


@pytest.fixture
def logits(monkeypatch):
    return Logits(monkeypatch)


@pytest.fixture(scope="module", params=FAMILY)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family, tmp_path_factory):
    path = tmp_path_factory.mktemp(family)
    more = {"sliding_window": 45} if family in ("mixtral", "mistral") else {}
    make(path, family, num_experts_per_tok=ONLY.get(family, TOP_K), **more)
    return runnable(path, family)


@pytest.fixture(scope="module")
def expected(model):
    """All resident, each alone."""
    with pytest.MonkeyPatch.context() as patch:
        return asyncio.run(alone(model, GREEDY, Logits(patch)))


async def test_streamed_cut_batched_and_threaded(family, model, expected, logits):
    for tokens, logprobs, rows in expected:
        assert (len(tokens), len(logprobs), len(rows)) == (20, 20, 20 * 211 * 4)
    # A dense model has nothing to stream.
    for name, settings in (CUTS if family in DENSE else CACHES | BACKENDS | CUTS).items():
        if name in CACHES:
            assert await alone(model, GREEDY, logits, **settings) == expected, name
        found = await together(model, GREEDY, logits, **settings)
        assert found == expected, f"{name}, in a batch"


async def test_drawn_tokens(model, expected, logits):
    greedy, expected = expected, await alone(model, DRAWN, logits)
    assert expected[0][0] != greedy[0][0], "a draw at temperature 1 of a random model"
    for settings in ({"cache_experts": TOP_K, "step_tokens": 5}, {"cache_experts": TOP_K, "context": 96}):
        found = await together(model, DRAWN, logits, **settings)
        assert found == expected, settings


async def test_preempted(model, expected, logits):
    await preempted(model, GREEDY, logits, expected, cache_experts=3)


async def test_a_full_cache_of_other_requests_leaves_no_trace(model, expected, logits):
    """The same engine again and again, with whatever the cache and freed KV blocks hold by then."""
    async with opened(model, cache_experts="50%", context=112) as engine:
        for _ in range(3):
            for ids, wanted in zip(PROMPTS, expected, strict=True):
                result = await engine.generate(ids, GREEDY)
                assert (result.token_ids, result.logprobs, logits.take(ids)) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("family", IN_PLACE)
async def test_in_place_and_converted(family, dtype, tmp_path, logits):
    make(tmp_path / "hf", family, num_experts_per_tok=ONLY.get(family, TOP_K), dtype=dtype)
    expected = await alone(tmp_path / "hf", GREEDY, logits)
    store = convert_to(tmp_path / "hf", tmp_path / "store", None, None)
    assert await together(store, GREEDY, logits) == expected
    assert await together(store, GREEDY, logits, cache_experts=TOP_K) == expected
    assert await together(tmp_path / "hf", GREEDY, logits, cache_experts=TOP_K) == expected
    if dtype is torch.bfloat16:  # widening is exact
        wide = convert_to(tmp_path / "hf", tmp_path / "wide", "f32", None)
        assert [a[0] for a in await alone(wide, GREEDY, logits)] == [a[0] for a in expected]


WIDE = {"hidden_size": 256, "num_hidden_layers": 2, "num_experts_per_tok": TOP_K}
INTER = {
    "mixtral": {"intermediate_size": 256},
    "qwen3_moe": {"moe_intermediate_size": 256},
    "gpt_oss": {"intermediate_size": 256},
}


@pytest.mark.parametrize("dense", ["q8_0", "q4_0", "q4_k", "mxfp4", "f16"])
async def test_quantised_dense_models(dense, tmp_path, logits):
    make(tmp_path / "hf", "llama", **WIDE, intermediate_size=512)
    store = convert_to(tmp_path / "hf", tmp_path / "store", None, dense)
    expected = await alone(store, GREEDY, logits)
    for settings in {"threads": 3}, {"step_tokens": 6, "threads": 1}:
        assert await together(store, GREEDY, logits, **settings) == expected, settings
    await preempted(store, GREEDY, logits, expected)


@pytest.mark.parametrize("experts", ["q8_0", "q4_0", "q4_k", "mxfp4", "f16"])
@pytest.mark.parametrize("family", INTER)
async def test_quantised_stores(family, experts, tmp_path, logits):
    make(tmp_path / "hf", family, **WIDE, **INTER[family])
    store = convert_to(tmp_path / "hf", tmp_path / "store", experts, "q8_0")
    expected = await alone(store, GREEDY, logits)
    for settings in (
        {"cache_experts": TOP_K, "io_backend": "uring"},
        {"cache_experts": TOP_K, "io_backend": "preadv", "threads": 3},
        {"cache_experts": 4, "io_backend": "buffered", "step_tokens": 6, "threads": 1},
    ):
        assert await together(store, GREEDY, logits, **settings) == expected, settings
    await preempted(store, GREEDY, logits, expected, cache_experts=TOP_K)
