"""How much is verified: it pays where drafts are good, and costs next to nothing where they are wrong."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from drafted import GREEDY
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_scheduler import sequence, step

from mer._ext.acceptance import MOST_DRAFTED, TIED, Acceptance
from mer._ext.costs import Costs
from mer._ext.lookup import NgramDrafter
from mer.engine.drafting import Drafting
from mer.engine.scheduler import Scheduler
from mer.engine.speculation import LOOKUP, Choice, Offer, Speculation, Verdict
from mer.engine.stats import StepStats
from mer.model.kv import BLOCK


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
            room=MOST_DRAFTED,
            drafter=NgramDrafter(tokens),
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


def test_what_did_not_pay_is_not_weighed_again_at_once():
    """But now and then, and where more of the text is the same as before."""
    weighed = []

    class Never(Speculation):
        def ready(self, sequences):
            return True

        def choose(self, offers, room):
            weighed.append(len(text.tokens))
            return [Choice(0, None)]

    kinds = iter([4] * 12 + [3] * 4 + [4] * 8)
    text = SimpleNamespace(tokens=[], drafts=Acceptance(), passed={}, room=9, params=GREEDY, engines=False)
    text.drafter = SimpleNamespace(look=lambda own, everybody: next(kinds))
    looking = Drafting([], Never())
    for _ in range(24):
        assert looking.prepare([text], 8) is None
        text.tokens.append(0)
    assert weighed == [0, 8, 12, 16]


class Looks:
    """A text in which drafts are worth it where `pays` says so; steps take a second, looks `price`."""

    def __init__(self, monkeypatch, price: float):
        self.now, self.price, self.pays = 0.0, price, False
        clock = SimpleNamespace(perf_counter=lambda: self.now, thread_time=lambda: self.now)
        monkeypatch.setattr("mer.engine.drafting.time", clock)
        told = self

        class Told(Speculation):
            def ready(self, sequences):
                told.now += told.price
                return True

            def choose(self, offers, room):
                return [Choice(2 if told.pays else 0, None)]

        self.text = SimpleNamespace(
            tokens=[], drafts=Acceptance(), passed={}, room=9, params=GREEDY, engines=False, draft_kind=0
        )
        self.text.drafter = SimpleNamespace(
            look=lambda own, everybody: 0, draft=lambda most: [7] * most, verified=lambda: None
        )
        self.drafting = Drafting([], Told())

    def steps(self, count: int) -> list[int]:
        """So many: those of them that were looks."""
        looks = []
        for at in range(count):
            self.text.passed.clear()
            began, drafts = self.now, None
            if not self.drafting.rests():
                looks.append(at)
                drafts = self.drafting.prepare([self.text], 8)
            self.now += 1.0
            if drafts is not None:
                self.drafting.judge(self.text, 2, 2)
            self.drafting.end_step(1, self.now - began, StepStats(), alone=True)
        return looks


@pytest.mark.parametrize("price", [0.02, 0.05, 0.2])
def test_looks_that_find_nothing_take_a_small_part_of_the_time(price, monkeypatch):
    text = Looks(monkeypatch, price)
    looks = text.steps(4000)
    assert looks[:3] == [0, 1, 2]
    # A clock around a look says half of what it costs.
    assert 2 * price * len(looks) == pytest.approx(0.005 * 4000 + 0.25, rel=0.1)


def test_looks_that_are_cheap_are_never_left_out(monkeypatch):
    assert len(Looks(monkeypatch, 0.002).steps(500)) == 500


def test_what_drafts_gain_pays_for_looks(monkeypatch):
    text = Looks(monkeypatch, 0.05)
    text.steps(1000)
    text.pays = True
    text.steps(20)
    text.pays = False
    assert text.steps(10) == list(range(10))
    assert len(text.steps(1000)) < 170


def test_steps_without_a_look_earn_what_drafts_may_lose():
    speculation = Speculation()
    speculation.observe(1, 1.0)
    while speculation.affordable(LOOKUP):
        speculation.spend(LOOKUP, 0.1)
    for _ in range(400):
        speculation.rested(1.0)
    assert speculation.affordable(LOOKUP)


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
