"""What a step costs, by what it computes and what it waits for: known at once where the hit rate changes."""

from __future__ import annotations

import random
import statistics

import pytest

from mer._ext.acceptance import MOST_DRAFTED, Acceptance
from mer._ext.costs import Costs, StepCosts
from mer.engine.speculation import LOOKUP, Offer, Speculation, Verdict


def test_a_cache_that_changes_changes_the_price_of_every_width():
    """Of steps of four tokens nothing is measured anew."""
    costs = StepCosts()
    for _ in range(8):
        costs.observe(1, 3.0, 2.0, 10)
        costs.observe(4, 8.5, 6.0, 30)
    assert [costs(n) for n in (1, 4)] == pytest.approx([3.0, 8.5])
    assert costs.curve(4)[2] == pytest.approx(1.5 + 0.2 * (10 + 20 / 3))
    for _ in range(60):
        costs.observe(1, 1.0, 0.0, 10)
    assert [costs(n) for n in (1, 4)] == pytest.approx([1.0, 2.5], rel=1e-3), "all experts are there"
    for _ in range(40):
        costs.observe(1, 5.0, 4.0, 10)
    assert [costs(n) for n in (1, 4)] == pytest.approx([5.0, 2.5 + 0.4 * 30], rel=1e-3), "fewer than before"
    assert costs.curve(4)[4] == costs(4)


def test_where_nothing_is_waited_for_experts_cost_nothing():
    costs = StepCosts()
    costs.observe(1, 2.0, 0.0, 16)
    costs.observe(3, 3.0, 0.0, 30)
    costs.observe(3, 3.0, 0.0, 30)
    assert costs.curve(3)[1:4] == [2.0, 2.5, 3.0]


def test_experts_of_drafted_tokens_may_be_missed_more_often():
    costs = StepCosts()
    for _ in range(60):
        costs.observe(1, 3.0, 1.2, 12, 1)
        costs.observe(3, 6.0, 3.5, 24, 1)
    assert [costs(n) for n in (1, 3)] == pytest.approx([3.0, 6.0], rel=0.02)
    for _ in range(40):
        costs.observe(1, 2.4, 0.6, 12, 1)
    assert [costs(n) for n in (1, 3)] == pytest.approx([2.4, 4.25], rel=0.02), "of these, too"


def test_there_are_no_more_experts_than_all():
    costs = Costs(48)
    for _ in range(8):
        costs.observe(1, 12)
        costs.observe(3, 24)
    curve = costs.curve(60)
    assert curve[3] - curve[2] > curve[4] - curve[3] > curve[5] - curve[4] > 0
    assert 40 < curve[60] <= 48


def test_long_drafts_are_come_to_by_steps():
    """What a width takes that nobody has seen is a guess, and a long wrong draft is dear."""
    speculation, lengths = Speculation(), []
    speculation.observe(1, 1.0)
    for _ in range(5):
        [choice] = speculation.choose([Offer((0.99,) * MOST_DRAFTED)], MOST_DRAFTED)
        lengths.append(choice.length)
        speculation.observe(1, 1 + 0.1 * choice.length, [Verdict(LOOKUP, choice.length, choice.length)])
    assert lengths == [2, 6, 14, 16, 16]


class WholeSteps(Costs):
    """Seconds of a step by its width, reads among them."""

    def observe(self, tokens, seconds, wait=0.0, experts=0, plain=0):
        super().observe(tokens, seconds)


def experts_of(width: int) -> float:
    """Distinct ones in six layers of eight, two a token, some alike in neighbours."""
    return 6 * 8 * (1 - 0.75 ** (1 + 0.7 * (width - 1)))


def speed(costs, chance: float, slope: float, miss: float, hit_rate, seed: int, steps: int = 1000) -> float:
    """Of the speed that the best length of drafts would have in each step.

    chance: of a drafted token. slope: what one more token computes, miss: what a missed expert takes, in
    plain steps.
    """
    speculation = Speculation()
    speculation._costs = costs()
    own, everybody, draws = Acceptance(), Acceptance(), random.Random(seed)
    took = best = 0.0
    for step in range(steps):
        misses = 1 - hit_rate(step)
        [choice] = speculation.choose(
            [Offer(own.chances(0, everybody) if speculation.affordable(LOOKUP) else ())], MOST_DRAFTED
        )
        right = next((i for i in range(choice.length) if draws.random() >= chance), choice.length)
        for position in range(min(right + 1, choice.length)):
            own.note(0, position, position < right)
            everybody.note(0, position, position < right)
        width = 1 + choice.length
        experts = round(experts_of(width))
        wait = miss * sum(draws.random() < misses for _ in range(experts)) * draws.uniform(0.8, 1.2)
        seconds = (1 + slope * choice.length) * draws.uniform(0.95, 1.05) + wait
        verdicts = [Verdict(LOOKUP, choice.length, right)] if choice.length else []
        speculation.observe(1, seconds, verdicts, wait=wait, experts=experts)
        took += seconds
        rates = [
            sum(chance**i for i in range(n + 1)) / (1 + slope * n + miss * misses * experts_of(1 + n))
            for n in range(MOST_DRAFTED + 1)
        ]
        best += (1 + right) / max(rates)
    return best / took


@pytest.mark.parametrize(
    ("hit_rate", "least"),
    [
        (lambda step: 0.8, -0.02),
        (lambda step: 1.0 if step // 150 % 2 else 0.3, 0.03),  # another model comes and goes, say
    ],
    ids=["steady", "in turns"],
)
def test_two_parts_are_better_where_the_hit_rate_changes(hit_rate, least):
    gains = [
        speed(StepCosts, chance, slope, 0.2, hit_rate, seed)
        - speed(WholeSteps, chance, slope, 0.2, hit_rate, seed)
        for seed in range(2)
        for chance in (0.6, 0.95)
        for slope in (0.15, 0.5)
        for case in [(chance, slope, 0.2, hit_rate, seed)]
    ]
    assert statistics.mean(gains) > least
