"""The tied draft engine: a draft head beside the model whose states it reads."""

from __future__ import annotations

import asyncio
import itertools

import attrs
import pytest
import torch
from click.testing import CliRunner
from draft_models import WINDOW, write_head, write_predicting, write_predicting_v4
from drafted import ASKED, always, essence  # noqa: F401 (a fixture)
from engine_models import GREEDY, begun_together, make, opened, prompt, write_text_model
from gguf_models import write_gguf
from transformers import Qwen3MoeForCausalLM

from mer.cli.convert import convert
from mer.engine.tied import TiedEngine
from mer.errors import BudgetError, CheckpointError

LONG = attrs.evolve(GREEDY, max_tokens=60)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A mixtral with a head in its directory; and what transformers makes of both."""
    path = tmp_path_factory.mktemp("tied") / "model"
    main = make(path, "mixtral")
    return path, main, write_head(path / "draft", path)


@pytest.fixture
def proposed(monkeypatch):
    """(text, draft) of each draft."""
    found = []
    propose = TiedEngine.propose

    def spy(self, sequences, lengths):
        drafts = propose(self, sequences, lengths)
        found.extend((list(s.tokens), list(d)) for s, d in zip(sequences, drafts, strict=True))
        assert all(len(d) <= n for d, n in zip(drafts, lengths, strict=True))
        return drafts

    monkeypatch.setattr(TiedEngine, "propose", spy)
    return found


def drafted(main, head, tokens: list[int], count: int, first: int, window=WINDOW) -> list[int]:
    """What the head drafts behind a text of which it sees the states from position `first` on."""
    with torch.no_grad():
        states = head.states(main, torch.tensor([tokens]))[first:-1]
        given, out = torch.tensor(tokens[first + 1 :]), []
        for _ in range(count):
            left, logits = head(given, states, window)
            out.append(int(logits[-1].argmax()))
            states, given = torch.cat([states, left[-1:]]), torch.cat([given, torch.tensor(out[-1:])])
    return out


async def ask(engine, prompts, params=LONG):
    return list(map(essence, await asyncio.gather(*(engine.generate(each, params) for each in prompts))))


async def test_drafts_are_torchs_and_change_nothing(model, always, proposed):  # noqa: F811
    path, main, head = model
    prompts = [prompt(n) for n in (5, 20, 45)]
    async with opened(path, speculate="off") as engine:
        expected = await ask(engine, prompts)
    for settings in ({}, {"max_running": 2}, {"step_tokens": 16, "prefix_cache": False}):
        async with opened(path, **settings) as engine:
            assert await ask(engine, prompts) == expected
            assert await ask(engine, prompts[2:]) == expected[2:]
    assert len(proposed) > 100
    short = [(text, draft) for text, draft in proposed if len(text) < 32 and draft]
    assert len(short) > 20
    for text, draft in short[::5]:
        assert draft == drafted(main, head, text, len(draft), 0)


async def test_what_is_long_is_seen_from_its_end(model, always, proposed):  # noqa: F811
    path, main, head = model
    given = prompt(100)
    async with opened(path) as engine:
        await engine.generate(given, LONG)
    text, draft = next((text, draft) for text, draft in proposed if draft)
    assert draft == drafted(main, head, text, len(draft), len(text) - 1 - 32)


async def test_a_paused_life(model, always):  # noqa: F811
    """Preempted, cancelled, more requests than fit: the drafts go on, and the answers are the same."""
    path, *_ = model
    prompts = [prompt(n, seed) for seed, n in enumerate((40, 33, 17, 50, 8, 21))]
    async with opened(path, speculate="off") as engine:
        expected = await ask(engine, prompts)
    async with opened(path, context=160, max_running=4) as engine:
        assert await begun_together(engine, ask(engine, prompts), len(prompts)) == expected
        assert engine.snapshot().preemptions
        assert await ask(engine, prompts) == expected
    assert always[-1].drafted > 0


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """One with a tokenizer and a head; and what transformers makes of both."""
    path = write_text_model(tmp_path_factory.mktemp("tied") / "text")
    main = Qwen3MoeForCausalLM.from_pretrained(path, attn_implementation="eager").float().eval()
    return path, main, write_head(path / "draft", path)


@pytest.mark.parametrize("asked", ASKED)
async def test_answers_are_the_same(asked, text_model, monkeypatch, always):  # noqa: F811
    """The head drafts, and in place of that, which is hardly ever right, tokens are verified that mostly are.

    What it drafts behind right and wrong ones is torch's.
    """
    path, main, head = text_model
    prompts, params, found = [prompt(n, vocab=256) for n in (5, 33, 60)], ASKED[asked], []
    async with opened(path, cache_experts=4, speculate="off") as engine:
        expected = await ask(engine, prompts, params)
    told = {tuple(p): [*p, *r.token_ids] for p, r in zip(prompts, expected, strict=True)}
    propose = TiedEngine.propose

    def mostly_right(self, sequences, lengths):
        drafts = propose(self, sequences, lengths)
        found.extend((list(s.tokens), list(d)) for s, d in zip(sequences, drafts, strict=True))
        for sequence, draft in zip(sequences, drafts, strict=True):
            text = next(text for p, text in told.items() if sequence.tokens[: len(p)] == list(p))
            at = len(sequence.tokens)
            draft[:] = [t + (i % 5 == 0) for i, t in enumerate(text[at : at + len(draft)], at)]
        return drafts

    monkeypatch.setattr(TiedEngine, "propose", mostly_right)
    for more in ({}, {"context": 160}, {"max_running": 2}, {"prefix_cache": False, "step_tokens": 16}):
        async with opened(path, cache_experts=4, speculate="draft", **more) as engine:
            assert await ask(engine, prompts, params) == expected
            assert await ask(engine, prompts[:1], params) == expected[:1]
    assert sum(each.accepted for each in always) > 20
    assert sum(each.drafted - each.accepted for each in always) > 20
    short = [(text, draft) for text, draft in found if len(text) < 32 and draft]
    for text, draft in short[::7]:
        assert draft == drafted(main, head, text, len(draft), 0)


async def test_it_is_counted_in_the_budget(model):
    path, *_ = model
    async with opened(path, speculate="off") as plain, opened(path) as engine:
        assert plain.budget.drafting == 0
        # At least its weights: 2 * 64 * 64 of eh_proj, 2 * 64 * 64 and 2 * 64 * 32 of attention, 3 * 64 * 48.
        assert engine.budget.drafting > 4 * (4 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 48)
        assert engine.budget.total <= engine.budget.ram
    with pytest.raises(BudgetError, match="drafting"):
        async with opened(path, ram=1 << 20):
            pass


async def test_which_head_is_taken(model, tmp_path):
    path, *_ = model
    make(tmp_path / "other", "mixtral", seed=5)
    for settings in ({"draft_head": path / "draft"},):
        with pytest.raises(CheckpointError, match=r"trained for another model \(a test\)"):
            async with opened(tmp_path / "other", **settings):
                pass
    with pytest.raises(CheckpointError, match="nowhere"):
        async with opened(path, draft_head=tmp_path / "nowhere"):
            pass


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek_v3", {}),
        ("deepseek_v3", {"q_lora_rank": None}),
        # As many positions as there are: its layer sees all.
        ("deepseek_v32", {"index_topk": 64}),
        ("deepseek_v4", {}),
        ("glm4_moe", {}),
        ("glm_moe_dsa", {"index_topk": 64}),
        ("qwen3_next", {}),
        ("qwen3_5_moe_text", {}),
    ],
)
async def test_a_models_own_head(family, changes, tmp_path, always, proposed):  # noqa: F811
    """Layers for multi-token prediction: from the checkpoint, a store made of it, and a GGUF."""
    v4 = family == "deepseek_v4"
    if v4:
        main, head = write_predicting_v4(tmp_path / "model", **changes)
    else:
        main, head = write_predicting(tmp_path / "model", family, **changes)
    window = main.config.sliding_window if v4 else None
    prompts = [prompt(n) for n in (5, 20)]
    async with opened(tmp_path / "model", speculate="off") as engine:
        expected = await ask(engine, prompts)
    result = CliRunner().invoke(
        convert, [str(tmp_path / "model"), str(tmp_path / "store"), "--format", "f32"], catch_exceptions=False
    )
    assert result.exit_code == 0
    paths = [tmp_path / "model", tmp_path / "store"]
    if family == "glm4_moe":  # the one of these whose GGUF files have the layer
        main.config.num_hidden_layers -= 1
        paths.append(write_gguf(main, tmp_path / "model.gguf", predicting=1, head=head))
    for path in paths:
        proposed.clear()
        async with opened(path) as engine:
            assert await ask(engine, prompts) == expected
            assert engine.budget.drafting > 0
        short = [(text, draft) for text, draft in proposed if len(text) < 32 and draft]
        assert len(short) > 10
        for text, draft in short[::4]:
            assert draft == drafted(main, head, text, len(draft), 0, window)


async def test_states_that_were_not_kept(model, always, proposed, monkeypatch):  # noqa: F811
    """Now and then there is no time: drafts begin anew behind that, by what is known then."""
    path, main, head = model
    prompts = [prompt(n) for n in (9, 30)]
    async with opened(path, speculate="off") as engine:
        expected = await ask(engine, prompts)
    observe, calls = TiedEngine.observe, itertools.count()

    def sometimes(self, chunks, hidden):
        observe(self, chunks, hidden if next(calls) % 3 else None)

    monkeypatch.setattr(TiedEngine, "observe", sometimes)
    async with opened(path) as engine:
        assert await ask(engine, prompts) == expected
    found = [(text, draft) for text, draft in proposed if draft]
    assert len(found) > 20
    for text, draft in found[::5]:
        assert any(
            draft == drafted(main, head, text, len(draft), first) for first in reversed(range(len(text) - 1))
        )
