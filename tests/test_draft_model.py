"""A draft model changes no byte of an answer, and drafts what it would have said itself."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import attrs
import numpy as np
import pytest
from drafted import ASKED, GREEDY, always, ask
from engine_models import make, opened, prompt, runnable, write_text_model
from hypothesis import given, settings
from hypothesis import strategies as st

from mer import Engine, SamplingParams
from mer.demo import model_path
from mer.engine.blocks import extend_keys
from mer.engine.budget import resident_bytes
from mer.engine.draft_model import DraftModel
from mer.engine.runner import Runner
from mer.engine.scheduler import Sequence
from mer.errors import BudgetError, ConfigError, DeviceReadError
from mer.model.kv import BLOCK

assert always

OTHER = {"num_hidden_layers": 1}


# --- what it follows


class Remembering:
    """A Runner whose keys are the tokens themselves, and whose next token is a sum over what blocks hold."""

    vocab = 10

    def __init__(self, n_blocks: int, step_tokens: int) -> None:
        self.budget = SimpleNamespace(kv_blocks=n_blocks, step_tokens=step_tokens)
        self.spec = SimpleNamespace(vocab=self.vocab, max_positions=400)
        self.checkpoint = SimpleNamespace(path=SimpleNamespace(name="it"))
        self._memory = np.full((n_blocks, BLOCK), -1)
        self.computed = 0

    @classmethod
    def next(cls, tokens: list[int]) -> int:
        return sum((i + 1) * token for i, token in enumerate(tokens)) % cls.vocab

    def step(self, chunks):
        rows = []
        assert sum(chunk.width for chunk in chunks) <= self.budget.step_tokens
        for chunk in chunks:
            text = chunk.sequence
            end = text.computed + chunk.count
            for at, token in enumerate(chunk.tokens, text.computed):
                self._memory[text.blocks[at // BLOCK], at % BLOCK] = token
            self.computed += chunk.count
            held = [self._memory[text.blocks[at // BLOCK], at % BLOCK] for at in range(end)]
            if chunk.last:
                rows.append(np.eye(self.vocab, dtype=np.float32)[self.next(held)])
        return np.array(rows, np.float32).reshape(-1, self.vocab)


def expected(tokens: list[int], length: int) -> list[int]:
    text = list(tokens)
    for _ in range(length):
        text.append(Remembering.next(text))
    return text[len(tokens) :]


GROWTH = st.tuples(
    st.integers(0, 2),  # whose text
    st.sampled_from(["right", "wrong", "end", "alone"]),
    st.integers(1, 8),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 70), min_size=3, max_size=3),
    st.booleans(),
    st.lists(GROWTH, max_size=25),
    st.sampled_from([8, 14, 40]),
)
def test_it_drafts_what_it_would_have_said(lengths, alike, growth, n_blocks):
    """Whatever of its drafts was right, whoever shares a beginning, and whoever gave up blocks for others."""
    runner = Remembering(n_blocks, 16)
    model = DraftModel(runner, runner.vocab)
    rng = np.random.default_rng(lengths)
    common = rng.integers(0, runner.vocab, 80).tolist()

    def begin(i: int, length: int) -> Sequence:
        return Sequence(common[:length] if alike else rng.integers(0, runner.vocab, length).tolist())

    texts = [begin(i, length) for i, length in enumerate(lengths)]
    for who, what, length in growth:
        text = texts[who]
        if what == "end":
            model.forget(text)
            texts[who] = text = begin(who, lengths[who])
        asked = [text] if what == "alone" else texts
        for each in asked:
            extend_keys(each.keys, each.tokens)
        able = [each for each in asked if model.behind(each) is not None]
        drafts = model.propose(able, [length] * len(able))
        for each, draft in zip(able, drafts, strict=True):
            assert draft == expected(each.tokens, length)
            right = length if what == "right" else length // 2
            each.tokens += [*draft[:right], (draft[-1] + 1) % runner.vocab]
        model.observe([SimpleNamespace(sequence=each) for each in asked[:2]], lambda: None)
        assert n_blocks < 40 or able == asked
    for text in texts:
        model.forget(text)
    assert model._pool.free == n_blocks


def test_a_text_is_caught_up_with_in_pieces():
    runner = Remembering(40, 16)
    model = DraftModel(runner, runner.vocab)
    text = Sequence(list(np.arange(50) % 10))
    found = []
    while (behind := model.behind(text)) > 1:
        found.append(behind)
        model.catch_up(text)
    assert found == [50, 34, 18, 2]
    assert model.propose([text], [3]) == [expected(text.tokens, 3)]
    assert runner.computed == 50 + 2


def test_beginnings_are_computed_once():
    runner = Remembering(40, 64)
    model = DraftModel(runner, runner.vocab)
    for more in (1, 2):
        text = Sequence([*range(10), *range(10), *range(10), *range(10), more])
        extend_keys(text.keys, text.tokens)
        assert model.behind(text) == 41 if more == 1 else 41 - 2 * BLOCK
        assert model.propose([text], [2]) == [expected(text.tokens, 2)]
        text.tokens.append(3)
        model.behind(text)


@pytest.mark.parametrize("tokens", [[3, 10], [1] * 393])
def test_what_it_can_not_follow_it_leaves_alone(tokens):
    runner = Remembering(40, 16)
    assert DraftModel(runner, runner.vocab).behind(Sequence(tokens)) is None


# --- in the engine


@pytest.mark.parametrize("asked", ASKED)
async def test_answers_are_the_same(asked, tmp_path, always):
    path = write_text_model(tmp_path / "model", chat=False)
    prompts = [prompt(n, vocab=256) for n in (5, 33, 60)]
    async with opened(path, cache_experts=4, speculate="off") as engine:
        expected = await ask(engine, prompts, ASKED[asked])
    for more in ({"context": 160}, {"max_running": 2, "speculate": "draft"}, {"prefix_cache": False}):
        async with opened(path, cache_experts=4, draft_model=path, **more) as engine:
            assert await ask(engine, prompts, ASKED[asked]) == expected
            assert await ask(engine, prompts[:1], ASKED[asked]) == expected[:1]
            check_forgotten(engine)
    assert sum(each.drafted for each in always) > 100
    assert sum(each.accepted for each in always) > (100 if ASKED[asked].temperature == 0 else 0)


def check_forgotten(engine) -> None:
    (model,) = engine._drafting._engines
    assert model._pool.free == model._pool.n_blocks


async def test_preempted_texts_go_on_where_they_were(tmp_path, always):
    make(tmp_path, "llama")
    prompts = [prompt(40, seed) for seed in range(3)]
    params = attrs.evolve(GREEDY, max_tokens=60)
    async with opened(tmp_path, speculate="off") as engine:
        expected = await ask(engine, prompts, params)
    async with opened(tmp_path, context=144, draft_model=tmp_path, speculate="draft") as engine:
        assert await ask(engine, prompts, params) == expected
        assert engine.snapshot().preemptions
        check_forgotten(engine)
    assert always[0].accepted > 10  # there is hardly any room


@pytest.mark.parametrize(
    ("family", "drafter"), [("mixtral", "llama"), ("llama", "mixtral"), ("gpt_oss", "gpt_oss")]
)
async def test_a_model_is_its_own_best_draft_model(family, drafter, tmp_path, always):
    make(tmp_path / "it", family)
    path = runnable(tmp_path / "it", family)
    make(tmp_path / "other", drafter, **(OTHER if drafter != "gpt_oss" else {}), seed=7)
    other = runnable(tmp_path / "other", drafter)
    async with opened(path, speculate="off") as engine:
        expected = await ask(engine, [prompt(9), prompt(30)], GREEDY)
    for draft in (path, other):
        async with opened(path, draft_model=draft, speculate="draft") as engine:
            assert await ask(engine, [prompt(9), prompt(30)], GREEDY) == expected
    same, random = always
    assert same.accepted == same.drafted > 40
    assert random.drafted > 200
    assert random.accepted < 0.1 * random.drafted


async def test_requests_choose_how_they_are_drafted(tmp_path, always):
    make(tmp_path, "mixtral", num_hidden_layers=1)
    given = prompt(6) * 4
    async with opened(tmp_path, draft_model=tmp_path) as engine:
        drafted = {}
        for how in (False, "off", "ngram", "draft", "auto", True):
            before = always[0].drafted
            (model,) = engine._drafting._engines
            steps = model._runner.stats.step_s
            await engine.generate(given, attrs.evolve(GREEDY, speculative=how))
            drafted[how] = always[0].drafted > before, model._runner.stats.step_s > steps
    assert drafted.pop(False) == drafted.pop("off") == (False, False)
    assert drafted.pop("ngram") == (True, False)
    assert drafted.pop("draft") == (True, True)
    assert drafted.pop("auto")[0]


@pytest.mark.parametrize("error", [DeviceReadError("an expert"), ZeroDivisionError("mer")])
async def test_its_errors_are_nobodys_failure(error, tmp_path, always, monkeypatch, caplog):
    make(tmp_path, "mixtral")
    async with opened(tmp_path, speculate="off") as engine:
        expected = await ask(engine, [prompt(9), prompt(40)], GREEDY)
    async with opened(tmp_path, draft_model=tmp_path, speculate="draft") as engine:
        (model,) = engine._drafting._engines
        compute, calls = Runner.step, []

        def step(self, chunks):
            if self is model._runner:
                calls.append(chunks)
                if len(calls) > 24:
                    raise error
            return compute(self, chunks)

        monkeypatch.setattr(Runner, "step", step)
        with caplog.at_level(logging.WARNING, "mer"):
            assert await ask(engine, [prompt(9), prompt(40)], GREEDY) == expected
        assert len(calls) == 25
        drafted = always[0].drafted
        assert await ask(engine, [prompt(9)], GREEDY) == expected[:1]
        assert always[0].drafted == drafted > 0
    assert f"nothing is drafted by the draft model {tmp_path.name} any more" in caplog.text


async def test_who_is_cancelled_is_forgotten(tmp_path, always):
    make(tmp_path, "llama")
    async with opened(tmp_path, draft_model=tmp_path) as engine:
        stream = engine.stream(prompt(20), attrs.evolve(GREEDY, max_tokens=400))
        async for _ in stream:
            if always[0].accepted:
                break
        await stream.aclose()
        await engine.generate(prompt(3), GREEDY)
        check_forgotten(engine)


async def test_by_measured_costs(tmp_path):
    """With the real Speculation, whatever it finds worth it on this machine."""
    path = write_text_model(tmp_path / "model", chat=False)
    prompts = [prompt(n, vocab=256) for n in (5, 33, 60, 200)]
    params = attrs.evolve(GREEDY, max_tokens=100)
    async with opened(path, cache_experts=4, speculate="off") as engine:
        expected = await ask(engine, prompts, params)
    async with opened(path, cache_experts=4, draft_model=path) as engine:
        assert await ask(engine, prompts, params) == expected


async def test_beside_a_head():
    model = model_path()
    async with opened(model, draft_model=model, draft_head=model / "draft") as engine:
        assert len(engine._drafting._engines) == 2


# --- what it takes, and what can't be


async def test_its_memory_is_counted(tmp_path):
    make(tmp_path, "mixtral")
    ram = resident_bytes() + (1 << 30)  # what the tests before left is there as well
    async with opened(tmp_path, ram=ram) as engine:
        alone = engine.budget
    async with opened(tmp_path, ram=ram, draft_model=tmp_path) as engine:
        budget = engine.budget
    assert alone.drafting == 0
    assert budget.drafting > budget.dense + budget.kv + budget.slot * budget.experts
    assert budget.total <= budget.ram
    with pytest.raises(BudgetError, match=r"drafting \d+ MiB.*leave out --draft-model"):
        await Engine.open(tmp_path, ram=budget.interpreter + (50 << 20), draft_model=tmp_path)


async def refused(match: str, path, error=ConfigError, **given) -> None:
    with pytest.raises(error, match=match):
        async with Engine.open(path, **given):
            pass


async def test_what_can_not_be(tmp_path):
    make(tmp_path / "it", "mixtral")
    make(tmp_path / "few", "llama", **OTHER | {"vocab_size": 100})
    make(tmp_path / "state", "qwen3_next", vocab_size=211)
    state = runnable(tmp_path / "state", "qwen3_next")
    text = write_text_model(tmp_path / "text")
    it = tmp_path / "it"
    await refused("100 token ids, the main model 211", it, draft_model=tmp_path / "few")
    await refused("the main model came without a tokenizer", it, draft_model=text)
    await refused("draft_model .*: it came without a tokenizer", text, draft_model=it)
    await refused("which can't be set back", it, draft_model=state)
    await refused(
        "speculate draft: there is nothing to draft with; name a draft_model", it, speculate="draft"
    )
    await refused("speculate ngram: draft_model is of no use", it, speculate="ngram", draft_model=it)
    await refused("while a routing trace", it, draft_model=it, trace=tmp_path / "trace")
    await refused("no such path|nowhere", it, error=Exception, draft_model=tmp_path / "nowhere")


async def test_tokens_are_compared(tmp_path):
    text = write_text_model(tmp_path / "text")
    other = write_text_model(tmp_path / "other")
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"!"', '"§§"'))
    await refused(r"token \d+ is '.+' there and '!' in the main model", text, draft_model=other)


async def test_ids_that_only_pad_are_never_drafted(tmp_path, always):
    """Vocabularies are padded differently: what only the draft model has is nothing to the main one."""
    text = write_text_model(tmp_path / "text")
    make(
        tmp_path / "padded",
        "qwen3_moe",
        vocab_size=400,
        num_hidden_layers=1,
        num_experts=6,
        eos_token_id=0,
        seed=3,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "padded" / name).write_bytes((text / name).read_bytes())
    async with opened(text, draft_model=tmp_path / "padded", speculate="draft") as engine:
        await engine.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    assert always[0].drafted > 50
