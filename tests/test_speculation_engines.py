"""Speculation with draft engines, simulated: what drafts cost, and that nobody is silenced for ever."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_speculation import note

from mer._ext.acceptance import DRAFT_MODEL, MOST_DRAFTED, TIED, Acceptance
from mer.engine.drafting import Drafting
from mer.engine.speculation import LOOKUP, Choice, Offer, Speculation, Verdict

KINDS = (TIED, DRAFT_MODEL)


def live(
    slope: float,
    lookup: float,
    engines: list[tuple[float, float]],
    *,
    steps: int,
    sequences: int,
    seed: int,
    unlucky: int = 0,
) -> tuple[float, float, Speculation, list[int]]:
    """(Seconds that it took, that plain steps would have taken, it, tokens drafted by each engine).

    slope: of one more token in a step, in plain steps of one. lookup: chance of its drafted tokens to be
    right. engines: of each such a chance, and the seconds of a drafted token. unlucky: drafts that are wrong
    at the start, whatever their chance.
    """
    speculation, draws = Speculation(len(engines)), random.Random(seed)
    records, everybody = [Acceptance() for _ in range(sequences)], Acceptance()
    drafted = [0] * len(engines)
    took = plain = 0.0
    for _ in range(steps):
        offers = [
            Offer(
                record.chances(0, everybody) if lookup >= 0 and speculation.affordable(LOOKUP) else (),
                tuple(
                    record.chances(kind, everybody) if speculation.affordable(1 + at) else ()
                    for at, kind in enumerate(KINDS[: len(engines)])
                ),
            )
            for record in records
        ]
        choices = speculation.choose(offers, 24)
        for at, (_, price) in enumerate(engines):
            asked = [choice.length for choice in choices if choice.engine == at and choice.length]
            if asked:
                seconds = max(asked) * price * draws.uniform(0.9, 1.1)
                speculation.proposed(at, len(asked), max(asked), seconds)
                took += seconds
                drafted[at] += sum(asked)
        right, verdicts = 0, []
        for record, choice in zip(records, choices, strict=True):
            chance = lookup if choice.engine is None else engines[choice.engine][0]
            accepted = next((i for i in range(choice.length) if draws.random() >= chance), choice.length)
            if choice.length and unlucky:
                unlucky, accepted = unlucky - 1, 0
            if choice.length:
                kind = 0 if choice.engine is None else KINDS[choice.engine]
                note(record, everybody, kind, choice.length, accepted)
                source = LOOKUP if choice.engine is None else 1 + choice.engine
                verdicts.append(Verdict(source, choice.length, accepted))
            right += accepted
        more = sum(choice.length for choice in choices)
        seconds = (1 + slope * (sequences + more - 1)) * draws.uniform(0.9, 1.1)
        speculation.observe(sequences, seconds, verdicts)
        took += seconds
        plain += (1 + slope * (sequences - 1)) * (1 + right / sequences)
    return took, plain, speculation, drafted


chances = st.floats(0, 1)
drafters = st.lists(st.tuples(chances, st.floats(0.001, 3)), min_size=1, max_size=2)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 1.2), st.just(-1.0) | chances, drafters, st.integers(1, 4), st.integers(0, 100))
@example(0.01, 0.0, [(0.0, 3.0), (0.0, 3.0)], 1, 0)
@example(0.01, -1.0, [(0.0, 0.001), (0.0, 0.001)], 1, 0)
@example(0.3, 0.5, [(0.5, 0.3), (0.6, 0.3)], 2, 1)
def test_draft_engines_never_cost_much(slope, lookup, engines, sequences, seed):
    took, plain, *_ = live(slope, lookup, engines, steps=2000, sequences=sequences, seed=seed)
    # One part in fifty, and what the first tries take: of verifying, and of each engine.
    tries = 12 * (1 + slope * (sequences + MOST_DRAFTED)) + 2 * MOST_DRAFTED * sum(p for _, p in engines)
    assert took < 1.02 * plain + tries


@pytest.mark.parametrize("chance", [0.0, 0.3])
@pytest.mark.parametrize("slope", [0.1, 0.4, 0.8])
def test_the_first_short_answer_costs_little(chance, slope):
    """128 steps of an engine that knows nothing yet, with bad drafts of every kind that look good."""
    lost = [
        took / plain - 1
        for seed in range(10)
        for took, plain, *_ in [live(slope, chance, [(chance, 0.15)], steps=128, sequences=1, seed=seed)]
    ]
    assert sum(lost) / len(lost) < 0.04
    assert max(lost) < 0.06


def test_what_a_head_loses_silences_no_lookup():
    took, plain, _, drafted = live(0.2, 0.9, [(0.0, 0.5)], steps=600, sequences=1, seed=0)
    assert plain / took > 1.7
    assert drafted[0] < 60


def test_a_head_is_tried_where_lookup_has_little_to_offer():
    """Not in place of a draft that would bring several tokens, however long it was left alone."""
    speculation = Speculation(1)
    for _ in range(20):
        speculation.observe(1, 1.0)
    for _ in range(4):
        speculation.observe(1, 1.5, [Verdict(LOOKUP, 8, 8)])
    good, poor = ((chance, chance**2, chance**3, chance**4) for chance in (0.9, 0.4))
    head = ((0.7, 0.49),)
    assert [choice.engine for choice in speculation.choose([Offer(good, head)], 16)] == [None]
    assert speculation.choose([Offer(poor, head)], 16) == [Choice(1, 0)]
    assert speculation.choose([Offer((), head)], 16) == [Choice(1, 0)]


@pytest.mark.parametrize("seed", range(8))
def test_a_good_head_is_used(seed):
    took, plain, speculation, _ = live(0.1, -1.0, [(0.9, 0.05)], steps=1500, sequences=1, seed=seed)
    assert plain / took > 1.7
    assert speculation.accepted > 2000


@pytest.mark.parametrize("seed", range(8))
def test_a_few_unlucky_drafts_do_not_silence_a_head_for_ever(seed):
    took, plain, speculation, _ = live(
        0.25, -1.0, [(0.9, 0.15)], steps=4000, sequences=1, seed=seed, unlucky=5
    )
    assert speculation.accepted > 2000
    assert plain / took > 1.2


def test_a_draft_that_somebody_else_delayed_is_not_held_against_drafts():
    speculation = Speculation(1)
    for _ in range(20):
        speculation.observe(1, 1.0)
    for seconds in (0.1, 0.1, 0.1, 5.0):
        speculation.proposed(0, 1, 2, seconds)
    assert speculation.affordable(1)
    for _ in range(8):  # but one that is slow is
        speculation.proposed(0, 1, 2, 5.0)
    assert not speculation.affordable(1)


def test_time_that_others_had_is_no_cost_of_looking_on():
    class Looking:
        kind, name = TIED, "one that waits for the processor"

        def observe(self, chunks, hidden):
            time.sleep(0.02)

    speculation = Speculation(1)
    drafting = Drafting([Looking()], speculation)
    for _ in range(20):
        speculation.observe(1, 0.005)
    for _ in range(5):
        drafting.observe([], SimpleNamespace(states=None))
    assert speculation.affordable(1)
