"""Tokens drawn with drafts of each kind have the distribution that transformers gives them."""

from __future__ import annotations

import asyncio
from collections import Counter

import attrs
import pytest
import torch
from draft_models import write_head
from drafted import always  # noqa: F401 (a fixture)
from engine_models import begun_together, make, opened
from test_sampling import warped

from mer import SamplingParams

VOCAB, ANSWERS = 12, 400
# Whatever is drawn first stood behind a 7 before.
PROMPT = [*(token for first in range(VOCAB) for token in (7, first, (5 * first + 4) % VOCAB)), 7]
PARAMS = SamplingParams(temperature=0.7, top_p=0.95, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Its path, beside that of a head; and of its answers the chances of the second and the third token."""
    path = tmp_path_factory.mktemp("drawn") / "model"
    main = make(path, "mixtral", vocab_size=VOCAB, num_hidden_layers=1, pad_token_id=None)
    write_head(path.with_name("head"), path)
    chances, texts = [torch.ones(1, dtype=torch.float64)], torch.tensor([PROMPT])
    for _ in range(3):
        with torch.no_grad():
            logits = main(texts).logits[:, -1]
        after = torch.stack([warped(row.numpy(), PARAMS).softmax(0) for row in logits])
        chances.append((chances[-1][:, None] * after).flatten())
        texts = torch.cat(
            [texts.repeat_interleave(VOCAB, 0), torch.arange(VOCAB).repeat(len(texts))[:, None]], 1
        )
    return path, [of.reshape(-1, VOCAB).sum(0) for of in chances[2:]]


@pytest.mark.parametrize("kind", ["ngram", "head", "model"])
async def test_the_distribution_is_the_models(kind, model, always):  # noqa: F811
    path, wanted = model
    more = {
        "ngram": {"speculate": "ngram"},
        "head": {"speculate": "draft", "draft_head": path.with_name("head")},
        "model": {"speculate": "draft", "draft_model": path},
    }[kind]
    async with opened(path, max_waiting=ANSWERS, **more) as engine:
        asked = asyncio.gather(
            *(engine.generate(PROMPT, attrs.evolve(PARAMS, seed=seed)) for seed in range(ANSWERS))
        )
        answers = await begun_together(engine, asked, ANSWERS)  # else prompts that come leave drafts no room
    assert always[0].accepted > 0
    assert always[0].drafted - always[0].accepted > 50
    for place, chances in enumerate(wanted, 1):
        counts = Counter(answer.token_ids[place] for answer in answers)
        assert all(chances[token] > 0 for token in counts)
        likely = [token for token in range(VOCAB) if chances[token] * ANSWERS >= 5]
        expected = chances[likely] * ANSWERS
        seen = torch.tensor([counts[token] for token in likely], dtype=torch.float64)
        statistic = float(((seen - expected) ** 2 / expected).sum())
        freedom = len(likely) - 1
        assert freedom > 3
        # Mean and 3 standard deviations of chi-square. Seeds are fixed: each run draws the same.
        assert statistic < freedom + 3 * (2 * freedom) ** 0.5
