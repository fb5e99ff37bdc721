"""What drafted tokens will want is read before it is wanted."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from drafted import GREEDY, always, ask, tell
from engine_models import Logits, make, opened, prompt

from mer._ext.prefetch import EARLY_LAYERS
from mer.engine.likely import LikelyExperts

assert always


def test_a_token_will_want_what_it_wanted_last():
    spec = SimpleNamespace(vocab=10, n_moe_layers=6, top_k=2)
    likely = LikelyExperts(spec)
    assert LikelyExperts.nbytes(spec) == 2 * 10 * EARLY_LAYERS * 2
    routes = np.arange(6 * 3 * 2, dtype=np.int32).reshape(6, 3, 2)
    likely.learn(np.array([4, 7], np.int32), routes)
    likely.learn(np.array([7], np.int32), routes + 100)
    found = likely.of([7, 3, 4], 3)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found[:, 0], routes[:3, 0] + 100)
    np.testing.assert_array_equal(found[:, 1], -1)
    np.testing.assert_array_equal(found[:, 2], routes[:3, 0])


@pytest.mark.parametrize("engine", ["ngram", "draft"])
async def test_logits_are_the_same_whatever_is_read_ahead(engine, tmp_path, monkeypatch, always):
    """Streamed with drafts, wrong ones among them, under each I/O back end, against resident without."""
    make(tmp_path, "qwen3_moe", num_experts_per_tok=3)
    logits, prompts = Logits(monkeypatch), [prompt(n) for n in (6, 30)]
    settings = {"draft_model": tmp_path} if engine == "draft" else {}
    async with opened(tmp_path, speculate="off") as reference:
        expected = await ask(reference, prompts, GREEDY)
        rows = [logits.take(ids) for ids in prompts]
    tell(monkeypatch, {tuple(p): r.token_ids for p, r in zip(prompts, expected, strict=True)}, wrong=5)
    for back_end in ("uring", "preadv", "buffered"):
        for experts in (3, "50%"):
            more = settings | {"speculate": engine, "cache_experts": experts, "io_backend": back_end}
            async with opened(tmp_path, **more) as it:
                assert await ask(it, prompts, GREEDY) == expected
                assert [logits.take(ids) for ids in prompts] == rows
                assert it._runner.experts.streamer.stats()["prefetched_early"] > 0
    assert all(each.accepted > 20 for each in always)


async def test_reads_for_drafts_are_counted_for_whom_they_are(tmp_path, monkeypatch, always):
    """They begin between two steps; what two requests did, one after the other, is what the engine did."""
    make(tmp_path, "qwen3_moe", num_experts_per_tok=3)
    prompts = [prompt(n) for n in (6, 30)]
    async with opened(tmp_path, speculate="off") as reference:
        expected = await ask(reference, prompts, GREEDY)
    tell(monkeypatch, {tuple(p): r.token_ids for p, r in zip(prompts, expected, strict=True)}, wrong=5)
    async with opened(tmp_path, speculate="ngram", cache_experts=3) as engine:
        one, other = [(await engine.generate(ids, GREEDY)).timings.steps for ids in prompts]
        assert engine._runner.experts.streamer.stats()["prefetched_early"] > 0
        assert (one + other).prefetched == engine.stats.prefetched
        assert (one + other).bytes_read == engine.stats.bytes_read


async def test_what_tokens_want_is_noted_for_drafts_alone(tmp_path, monkeypatch, always):
    make(tmp_path, "qwen3_moe", num_experts_per_tok=3)
    ids, learnt = prompt(6), []
    learn = LikelyExperts.learn
    monkeypatch.setattr(LikelyExperts, "learn", lambda self, *a: (learnt.append(1), learn(self, *a)))
    async with opened(tmp_path, speculate="off") as reference:
        (expected,) = await ask(reference, [ids], GREEDY)
    for answer, drafts in (((), False), (expected.token_ids, True)):
        tell(monkeypatch, {tuple(ids): answer}, wrong=5)
        async with opened(tmp_path, speculate="ngram", cache_experts=3) as engine:
            assert (await engine.generate(ids, GREEDY)).token_ids == expected.token_ids
        assert bool(learnt) == drafts
