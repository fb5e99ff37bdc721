"""Drafts change no byte of an answer."""

from __future__ import annotations

import attrs
import msgspec
import numpy as np
import pytest
import torch
from drafted import ASKED, GREEDY, always, ask, essence, tell
from engine_models import begun_together, make, opened, prompt, runnable, write_text_model
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mer._ext.routes import extra_experts
from mer.api.http.answers import UsageAnswer
from mer.api.http.anthropic import AnthropicUsage
from mer.api.http.responses_types import ResponseUsage
from mer.engine.outputs import Usage
from mer.engine.runner import Runner
from mer.errors import DeviceReadError

assert always


@pytest.mark.parametrize("asked", ASKED)
async def test_answers_are_the_same(asked, tmp_path, monkeypatch, always):
    path = write_text_model(tmp_path / "model", chat=False)
    prompts = [prompt(n, vocab=256) for n in (5, 33, 60)]
    async with opened(path, cache_experts=4, speculate="off") as engine:
        expected = await ask(engine, prompts, ASKED[asked])
    tell(monkeypatch, {tuple(p): r.token_ids for p, r in zip(prompts, expected, strict=True)}, wrong=5)
    for more in ({}, {"context": 160}, {"max_running": 2}, {"prefix_cache": False, "step_tokens": 16}):
        async with opened(path, cache_experts=4, **more) as engine:
            together = ask(engine, prompts, ASKED[asked])
            assert await begun_together(engine, together, len(prompts)) == expected
            assert await ask(engine, prompts[:1], ASKED[asked]) == expected[:1]
            # Of 15 blocks that are wanted there are 10.
            assert asked not in ("greedy", "drawn") or "context" not in more or engine.snapshot().preemptions
    assert sum(each.accepted for each in always) > 20
    assert sum(each.drafted - each.accepted for each in always) > 20


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "llama", "qwen3_next", "lfm2_moe"])
async def test_every_kind_of_attention(family, tmp_path, monkeypatch, always):
    make(tmp_path / "model", family)
    path = runnable(tmp_path / "model", family)
    prompts = [prompt(n) for n in (7, 40)]
    async with opened(path, speculate="off") as engine:
        expected = await ask(engine, prompts, GREEDY)
    tell(monkeypatch, {tuple(p): r.token_ids for p, r in zip(prompts, expected, strict=True)}, wrong=7)
    for dtype in ("auto", "f16"):
        async with opened(path, kv_dtype=dtype, speculate="off") as engine:
            expected = await ask(engine, prompts, GREEDY)
        async with opened(path, kv_dtype=dtype) as engine:
            assert await ask(engine, prompts, GREEDY) == expected
    assert len(always) == 2
    assert all(each.accepted > 20 for each in always)


async def test_a_text_that_repeats_itself_takes_fewer_steps(tmp_path, always):
    make(tmp_path, "mixtral", num_hidden_layers=1)
    given = prompt(6) * 4
    async with opened(tmp_path, speculate="off") as engine:
        plain = await engine.generate(given, attrs.evolve(GREEDY, max_tokens=200))
    async with opened(tmp_path) as engine:
        assert essence(await engine.generate(given, attrs.evolve(GREEDY, max_tokens=200))) == essence(plain)
        off = attrs.evolve(GREEDY, max_tokens=200, speculative=False)
        before = always[0].drafted
        assert essence(await engine.generate(given, off)).token_ids == plain.token_ids
        assert always[0].drafted == before > 0


async def test_an_expert_that_only_a_draft_wants_is_nobodys_failure(tmp_path, monkeypatch, always):
    make(tmp_path, "mixtral")
    async with opened(tmp_path, speculate="off") as engine:
        expected = await ask(engine, [prompt(9)], GREEDY)
    tell(monkeypatch, {tuple(prompt(9)): expected[0].token_ids}, wrong=3)
    compute, failed = Runner.step, []

    def step(self, chunks):
        if any(chunk.draft for chunk in chunks):
            failed.append(chunks)
            raise DeviceReadError("an expert")
        return compute(self, chunks)

    monkeypatch.setattr(Runner, "step", step)
    async with opened(tmp_path) as engine:
        assert await ask(engine, [prompt(9)], GREEDY) == expected
    assert failed


# --- the experts of drafts


@given(st.data())
def test_experts_that_only_drafts_want(data):
    chunks = data.draw(st.lists(st.tuples(st.integers(1, 2), st.integers(0, 3)), min_size=1, max_size=4))
    total = sum(map(sum, chunks))
    routes = data.draw(arrays(np.int32, (2, total + 1, 2), elements=st.integers(0, 5)))
    found, in_all = extra_experts(routes, 6, chunks)
    plain, drafted, at = set(), [], 0
    for count, draft in chunks:
        cut = at + count
        plain |= {(layer, e) for layer in (0, 1) for e in routes[layer, at:cut].flat}
        drafted.append({(layer, e) for layer in (0, 1) for e in routes[layer, cut : cut + draft].flat})
        at = cut + draft
    assert found == [len(each - plain) for each in drafted]
    assert in_all == len(set.union(*drafted) - plain)


async def test_further_experts_are_counted(tmp_path, monkeypatch, always):
    """By transformers' routers: two steps, each of one token and sixteen right ones behind it."""
    model = make(tmp_path, "mixtral", num_local_experts=16)
    given, params = prompt(9), attrs.evolve(GREEDY, max_tokens=35)
    async with opened(tmp_path, speculate="off") as engine:
        answer = (await engine.generate(given, params)).token_ids
    with torch.no_grad():
        ids = torch.tensor([given + list(answer)])
        routers = model(ids, output_router_logits=True).router_logits
    chosen = [logits.reshape(-1, 16).topk(2).indices.tolist() for logits in routers]

    def wanted(rows):
        return {(layer, expert) for layer, of in enumerate(chosen) for row in rows for expert in of[row]}

    expected = sum(len(wanted(range(p + 1, p + 17)) - wanted([p])) for p in (9, 26))
    tell(monkeypatch, {tuple(given): answer}, wrong=1000)
    async with opened(tmp_path) as engine:
        result = await engine.generate(given, params)
        timings, usage = result.timings, result.usage
        assert (usage.drafted, usage.accepted, usage.draft_experts) == (32, 32, expected)
        told = msgspec.to_builtins(UsageAnswer.of([[usage, usage]]))
        assert told["drafts"] == {"drafted": 64, "accepted": 64, "draft_experts": 2 * expected}
        assert "drafts" not in msgspec.to_builtins(UsageAnswer.of([[Usage(1, 2)]]))
        told["drafts"] = {"drafted": 32, "accepted": 32, "draft_experts": expected}
        for each in (ResponseUsage.of(usage, 0), AnthropicUsage.of(usage)):
            assert msgspec.to_builtins(each)["drafts"] == told["drafts"]
        for each in (ResponseUsage.of(Usage(1, 2), 0), AnthropicUsage.of(Usage(1, 2))):
            assert "drafts" not in msgspec.to_builtins(each)
        assert timings.drafted == timings.accepted == 32
        assert timings.draft_experts == engine.snapshot().draft_experts == expected > 0


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2_moe"])
async def test_states_are_set_back_behind_wrong_drafts(family, tmp_path, monkeypatch, always):
    """In a batch, preempted, taken up from snapshots of prompts and answers; and a prompt of one token."""
    make(tmp_path / "model", family)
    path = runnable(tmp_path / "model", family)
    prompts = [prompt(n) for n in (1, 33, 60)]
    params = attrs.evolve(GREEDY, max_tokens=60)
    async with opened(path, speculate="off") as engine:
        expected = await ask(engine, prompts, params)
        longer = [p + list(r.token_ids) for p, r in zip(prompts, expected, strict=True)]
        later = await ask(engine, longer, params)
    for wrong in (2, 5):
        told = {tuple(p): r.token_ids for p, r in zip(prompts + longer, expected + later, strict=True)}
        tell(monkeypatch, told, wrong=wrong)
        for more in ({}, {"context": 192}, {"max_running": 2, "cache_experts": 4}):
            async with opened(path, **more) as engine:
                assert await ask(engine, prompts, params) == expected
                assert await ask(engine, longer, params) == later
    assert all(each.accepted > 50 and each.drafted - each.accepted > 50 for each in always)


async def test_one_request_alone_has_room_for_a_draft(tmp_path, always):
    """As `mer run` has it, for which the engine computes one request at a time."""
    make(tmp_path, "mixtral", num_hidden_layers=1)
    async with opened(tmp_path, max_running=1) as engine:
        await engine.generate(prompt(6) * 4, attrs.evolve(GREEDY, max_tokens=100))
    assert always[0].drafted > 0
