"""Drafts change no byte of an answer, and cost next to nothing where they are wrong."""

from __future__ import annotations

import asyncio
import random
import string
from types import SimpleNamespace

import attrs
import msgspec
import numpy as np
import pytest
import torch
from engine_models import Logits, begun_together, make, opened, prompt, runnable, write_text_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_scheduler import sequence, step

from mer import SamplingParams
from mer._ext.lookup import TextIndex
from mer._ext.prefetch import EARLY_LAYERS
from mer.api.http.answers import UsageAnswer
from mer.api.http.anthropic import AnthropicUsage
from mer.api.http.responses_types import ResponseUsage
from mer.engine import drafting
from mer.engine import engine as engines
from mer.engine.acceptance import MOST_DRAFTED, TIED, Acceptance
from mer.engine.draft import Draft, NgramDrafter
from mer.engine.drafting import Drafting
from mer.engine.likely import LikelyExperts
from mer.engine.outputs import Usage
from mer.engine.routed import extra_experts
from mer.engine.runner import Runner
from mer.engine.scheduler import Scheduler
from mer.engine.speculation import LOOKUP, Choice, Costs, Offer, Speculation, Verdict
from mer.engine.structure import Structure
from mer.errors import DeviceReadError
from mer.model.kv import BLOCK

# --- what is drafted


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [
        ("abcdefg", 4, None),
        ("abcdxab", 3, ("cdx", 4)),
        ("xabcyabczabc", 2, ("za", 3)),  # the latest
        ("12345a12345b12345", 1, ("b", 2)),
        ("x12345a92345b12345", 1, ("a", 2)),  # the longest
        ("5a12345b2345", 1, ("b", 3)),
        ("ababab", 5, ("ababa", 3)),  # beyond its end it goes on as it went
        ("aaaaaaa", 3, ("aaa", 2)),
        ("abcdefgh1abcdefgh", 1, ("1", 1)),
        (2 * ("x" + string.ascii_lowercase), 2, ("xa", 0)),
        ("abcab", 0, None),
        ("a", 3, None),
    ],
)
def test_what_stood_there_before_is_drafted(text, most, expected):
    found = NgramDrafter([ord(letter) for letter in text]).propose(most)
    assert (found and ("".join(map(chr, found.tokens)), found.kind)) == expected


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 60))
def test_it_does_not_matter_when_it_looks(tokens, first):
    grown = tokens[:first]
    early = NgramDrafter(grown)
    early.propose(4)
    grown += tokens[first:]
    assert early.propose(4) == NgramDrafter(list(tokens)).propose(4)


@given(st.lists(st.integers(0, 2), max_size=80), st.integers(0, 40))
def test_the_longest_match_is_found(tokens, repeated):
    """By trying all places, the latest first."""
    tokens = tokens + tokens[: repeated % (len(tokens) + 1)]
    best = (0, 0)
    for start in range(len(tokens) - 1, 1, -1):
        length = next((n for n in range(start) if tokens[start - 1 - n] != tokens[-1 - n]), start)
        if min(length, 64) > max(best[1], 1):
            best = start, min(length, 64)
    assert TextIndex(tokens).find() == best


def test_long_texts_are_looked_at_as_they_grow():
    draws = random.Random(3)
    tokens = [draws.randrange(200_000) for _ in range(5000)]
    index, text = TextIndex(grown := tokens[:3]), tokens[:3]
    for token in tokens[3:]:
        grown.append(token)
        index.find()
    grown += tokens[1000:1100]
    assert index.find() == (1100, 64)
    assert text == tokens[:3]


# --- how much is verified


def test_costs_between_and_beyond_what_was_measured():
    costs = Costs()
    costs.observe(2, 4.0)
    assert 2 in costs
    assert 3 not in costs
    assert costs(4) == pytest.approx(4.0 + 2 * 0.4 * 4.0 / 2)
    for _ in range(3):
        costs.observe(6, 8.0)
    assert [costs(n) for n in (1, 3, 4, 6, 8)] == pytest.approx([3.0, 5.0, 6.0, 8.0, 10.0])
    costs.observe(6, 3.0)
    costs.observe(6, 100.0)
    assert costs(6) == 8.0, "the median"
    for _ in range(200):
        costs.observe(2, 4.0)
    assert costs(6) == 8.0
    costs.observe(2, 4.0)
    assert costs(6) == pytest.approx(4.0 + 4 * 0.4 * 4.0 / 2), "forgotten"


def test_a_width_that_is_slow_for_the_first_time_is_tried_again():
    costs = Costs()
    costs.observe(1, 1.0)
    costs.observe(2, 50.0)
    assert costs(2) == pytest.approx(1.4), "as was guessed"
    costs.observe(2, 50.0)
    assert costs(2) == 50.0


def test_chances_by_position():
    """A draft head may be surer of its later tokens; nobody's experience is everybody's."""
    everybody, own = Acceptance(), Acceptance()
    for _ in range(300):
        for position, right in enumerate((0.5, 0.75, 1.0)):
            everybody.note(TIED, position, right == 1.0 or _ % 4 < 4 * right)
    chances = own.chances(TIED, everybody)
    assert chances[:3] == pytest.approx([0.5, 0.375, 0.375], rel=0.15)
    assert chances[3] == pytest.approx(chances[2], rel=0.1), "what nobody knows is as before"
    for _ in range(100):
        own.note(TIED, 0, False)
    assert own.chances(TIED, everybody)[0] < 0.1
    assert own.chances(0, everybody) == Acceptance().chances(0, Acceptance())


def test_what_is_not_verified_is_watched():
    """Prompt lookup's chances are known without a step that verifies anything."""
    draws = random.Random(0)
    tokens = [draws.randrange(50) for _ in range(40)]

    def text(tokens):
        return SimpleNamespace(
            tokens=tokens,
            drafts=Acceptance(),
            watched=None,
            propose=NgramDrafter(tokens).propose,
            params=GREEDY,
        )

    repeating, other = text(2 * tokens[:12]), text(2 * tokens[:12])
    looking = Drafting([], Speculation(0))
    for at in range(16):
        looking._look_up(repeating)
        looking._look_up(other)
        repeating.tokens.append(tokens[at % 12])
        other.tokens.append(100 + at)
    kind = 1  # behind 12 tokens
    nobody = Acceptance()
    assert repeating.drafts.chances(kind, nobody)[0] > 0.8 > 0.7 > other.drafts.chances(kind, nobody)[0]
    assert repeating.drafts.chances(kind, nobody)[9] > 0.15 > nobody.chances(kind, nobody)[9]


# --- simulated texts


def test_one_slow_step_is_not_held_against_drafts_for_ever():
    slow = iter([1.0, 1.0, 50.0])
    *_, speculation = live(lambda tokens: next(slow, 1 + 0.05 * tokens), 0.95, steps=3000)
    assert speculation.accepted > 2000


def note(own, everybody, kind, drafted, right):
    for position in range(min(right + 1, drafted)):
        own.note(kind, position, position < right)
        everybody.note(kind, position, position < right)


def live(
    seconds, chance: float, *, steps: int = 1500, sequences: int = 1, seed: int = 0
) -> tuple[float, float, Speculation]:
    """(Seconds that it took, seconds that plain steps would have taken, it) for so many steps.

    seconds(tokens): of a step. chance: of each drafted token to be right.
    """
    speculation, record, draws = Speculation(), [Acceptance() for _ in range(sequences)], random.Random(seed)
    took, plain, everybody = 0.0, 0.0, Acceptance()
    for _ in range(steps):
        offer = [each.chances(0, everybody) if speculation.affordable(LOOKUP) else () for each in record]
        choices = speculation.choose([Offer(each) for each in offer], 99)
        lengths = [choice.length for choice in choices]
        right, verdicts = 0, []
        for each, length in zip(record, lengths, strict=True):
            accepted = next((i for i in range(length) if draws.random() >= chance), length)
            note(each, everybody, 0, length, accepted)
            if length:
                verdicts.append(Verdict(LOOKUP, length, accepted))
            right += accepted
        cost = seconds(sequences + sum(lengths)) * draws.uniform(0.9, 1.1)
        speculation.observe(sequences, cost, verdicts)
        took += cost
        plain += seconds(sequences) * (1 + right / sequences)
    return took, plain, speculation


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1), st.floats(0.01, 1.2), st.integers(1, 4), st.integers(0, 100))
@example(0.0, 0.01, 1, 0)
@example(0.0, 1.2, 1, 0)
@example(1.0, 1.2, 1, 0)
def test_it_never_costs_much(chance, slope, sequences, seed):
    """Verifying a token takes as long as computing it by itself, at most: more is taken for an accident."""
    took, plain, _ = live(
        lambda tokens: 1 + slope * (tokens - 1), chance, sequences=sequences, seed=seed, steps=2000
    )
    # One part in fifty, and what the first tries take.
    assert took < 1.02 * plain + 12 * (1 + slope * (sequences + MOST_DRAFTED))


def test_it_pays_where_drafts_are_good_and_steps_cheap():
    took, plain, speculation = live(lambda tokens: 1 + 0.1 * tokens, 0.9)
    assert plain / took > 2.5
    assert speculation.accepted / speculation.drafted == pytest.approx(0.6, abs=0.15)


def test_nothing_is_drafted_where_each_token_costs_a_step():
    *_, speculation = live(lambda tokens: float(tokens), 0.9)
    assert speculation.drafted < 100  # of 1500 steps: now and then the price is looked at again


def test_the_best_drafts_get_the_room():
    speculation = Speculation()

    def lengths(*chances, room=99):
        offers = [Offer(tuple(each**depth for depth in range(1, 9) if each)) for each in chances]
        return [choice.length for choice in speculation.choose(offers, room)]

    assert lengths(0.9, 0.9) == [0, 0], "nothing is known yet"
    speculation.observe(2, 1.0)
    speculation.observe(2, 1.5, [Verdict(LOOKUP, 6, 0)])
    speculation.observe(2, 1.0)
    first, second = lengths(0.95, 0.5)
    assert first > second > 0
    assert lengths(0.0, 0.95)[0] == 0
    assert lengths(0.95, 0.5, room=3) == [3, 0]


# --- the scheduler


def test_drafts_take_what_is_left():
    scheduler = Scheduler(n_blocks=4, step_tokens=12, max_running=8)
    a, b = sequence(BLOCK - 1, 1), sequence(3, 2)
    for each in (a, b):
        scheduler.add(each)
        step(scheduler)
        step(scheduler)
    drafts = [[7] * 5, [8] * 5]
    chunks = scheduler.schedule()
    assert scheduler.draft_room(chunks) == 6
    chunks = scheduler.with_drafts(chunks, drafts)
    assert [(chunk.sequence, chunk.tokens[1:], chunk.rows) for chunk in chunks] == [
        (a, [7] * 5, 6),
        (b, [8], 2),  # eight rows of logits in all
    ]
    before = a.computed
    scheduler.commit(chunks)
    assert a.computed == before + 1, "a draft counts when it was right"
    scheduler.advance(a, 1)
    assert a.computed == before + 2
    scheduler.add(sequence(5, 3))
    a.tokens += [0, 0]
    b.tokens += [0]
    assert not scheduler.draft_room(scheduler.schedule()), "a prompt has the step to itself"


def test_nobody_gives_up_blocks_for_a_draft():
    scheduler = Scheduler(n_blocks=2, step_tokens=64, max_running=8)
    a, b = sequence(BLOCK - 2, 1), sequence(BLOCK - 2, 2)
    for each in (a, b):
        scheduler.add(each)
    step(scheduler)
    chunks = scheduler.with_drafts(scheduler.schedule(), [[7] * 5, [8]])
    assert [(chunk.sequence, chunk.draft) for chunk in chunks] == [(a, ()), (b, (8,))]
    assert scheduler.preemptions == 0


# --- the engine

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_tokens=40, ignore_eos=True)
ASKED = {
    "greedy": GREEDY,
    "drawn": DRAWN,
    "penalties": attrs.evolve(DRAWN, repetition_penalty=1.2, presence_penalty=0.5, logit_bias={5: 4.0}),
    "logprobs": attrs.evolve(GREEDY, logprobs=3, prompt_logprobs=1),
    "schema": attrs.evolve(
        DRAWN,
        ignore_eos=False,
        structure=Structure.json_schema('{"type": "array", "items": {"type": "integer"}, "maxItems": 8}'),
    ),
    "stop": attrs.evolve(DRAWN, stop=("a", "e"), max_tokens=60),
}


class Told:
    """A drafter that knows the answer, but for every `wrong`th token."""

    def __init__(self, tokens: list[int], answer: tuple[int, ...], wrong: int) -> None:
        self._tokens, self._start, self._answer, self._wrong = tokens, len(tokens), answer, wrong

    def propose(self, most: int) -> Draft | None:
        at = len(self._tokens) - self._start
        rest = self._answer[at : at + most]
        return Draft([t + (i % self._wrong == 0) for i, t in enumerate(rest, at + 1)], 0) if rest else None


@pytest.fixture
def always(monkeypatch):
    """Whatever is drafted is verified; returns the Speculations that were made."""
    made = []

    class Always(Speculation):
        def __init__(self, n_engines):
            super().__init__(n_engines)
            made.append(self)

        def affordable(self, source):
            return True

        def ready(self, sequences):
            return True

        def choose(self, offers, room):
            return [
                Choice(MOST_DRAFTED, None) if each.lookup else Choice(MOST_DRAFTED * any(each.engines), 0)
                for each in offers
            ]

    monkeypatch.setattr(drafting, "Speculation", Always)
    return made


def tell(monkeypatch, answers: dict[tuple[int, ...], tuple[int, ...]], wrong: int) -> None:
    monkeypatch.setattr(
        engines, "NgramDrafter", lambda tokens: Told(tokens, answers.get(tuple(tokens), ()), wrong)
    )


def essence(result):
    """Without what may differ: times, and what a second answer found in the prefix cache."""
    usage = attrs.evolve(result.usage, cached_tokens=0)
    return attrs.evolve(result, timings=None, seed=0, usage=usage)


async def ask(engine, prompts, params):
    return list(map(essence, await asyncio.gather(*(engine.generate(each, params) for each in prompts))))


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


# --- what drafted tokens will want is read before it is wanted


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


async def test_one_request_alone_has_room_for_a_draft(tmp_path, always):
    """As `mer run` has it, for which the engine computes one request at a time."""
    make(tmp_path, "mixtral", num_hidden_layers=1)
    async with opened(tmp_path, max_running=1) as engine:
        await engine.generate(prompt(6) * 4, attrs.evolve(GREEDY, max_tokens=100))
    assert always[0].drafted > 0
