"""How many drafted tokens a step verifies: by what drafts were worth and what steps cost so far.

A step over more tokens takes longer: there is more to compute, and each token routes to experts of its own,
which may have to be read. So both sides are measured: of drafts, how often their tokens were right; of steps,
the seconds by the number of tokens; of draft engines, the seconds that a token takes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from attrs import define

from mer._ext.costs import Costs, StepCosts, best_lengths

_REFRESH: Final = 32  # steps until one without drafts is measured again
# An engine is tried with so many short drafts. One that was left alone for so many steps is tried anew, as a
# few unlucky ones may have silenced it. Each time it is left alone for twice as long, up to a bound.
_PAUSE: Final = 64
_LONGEST_PAUSE: Final = 4096
_PROBES: Final = 8
# A draft or look that took so many times as long as usual: somebody else had the processor meanwhile.
_ACCIDENT: Final = 2.0
# What may be lost, by prompt lookup and by all engines: so many plain steps at once, and this part of the
# time that they take. What the last draft loses comes on top of it.
_TRIES: Final = (0.75, 0.75)
_LOSS: Final = (0.005, 0.0025)
_GAINED: Final = 8.0  # of what was gained, as much may be lost at once
_EARNING: Final = 8  # plain steps of which that is counted at once
# Of the time of steps, what looks for drafts that found none may take. A step with a look is longer by so
# many times what a clock around the look says: its code and data take the place of the step's in the
# processor's cache, and of some such steps Speculation is told. Plain steps of which that time is saved at
# most, and at the start.
_LOOKING: Final = 0.005
_AROUND: Final = 2.0
_SAVED_LOOKS: Final = (1.0, 0.25)

LOOKUP: Final = 0  # of what drafts come from; engines follow


@define
class Ledger:
    """Gains and losses of drafts, beside what plain steps take, seconds.

    tries: what may be lost at once, plain steps. part: of their time, that may be lost in the long run. left,
    saved: what is left of both. Once it was used up nothing is tried until there is enough for something.
    """

    tries: float
    part: float
    left: float = 0.0
    saved: float = 0.0
    is_open: bool = True

    def gain(self, seconds: float, plain: float) -> None:
        """By drafts. plain: what a plain step takes. One long wrong draft silences nobody for ever."""
        most = self.tries * plain
        self.saved += seconds
        self.left = min(max(self.left + seconds, -most), self.saved, _GAINED * plain)
        self.is_open = self.left >= (0.0 if self.is_open else 0.5 * most)

    def earn(self, seconds: float, plain: float) -> None:
        """Plain steps took so long."""
        self.gain(min(self.part * seconds, max(self.tries * plain - self.left, 0.0)), plain)


class Offer(NamedTuple):
    """What can be drafted of one sequence: see Acceptance.chances, empty where there is nothing.

    lookup: of the draft that prompt lookup has found. engines: of what each engine would draft, in order; ():
    none drafts for any sequence.
    """

    lookup: tuple[float, ...]
    engines: tuple[tuple[float, ...], ...] = ()


class Choice(NamedTuple):
    """How many tokens of one sequence to draft. engine: which one is to; None: prompt lookup has done it."""

    length: int
    engine: int | None


class Verdict(NamedTuple):
    """Of one sequence's draft: where it came from (LOOKUP or 1 + engine), its tokens, how many were right."""

    source: int
    drafted: int
    right: int


_NONE: Final = Choice(0, None)


class Speculation:
    """Decides for steps that compute answers alone. Pure arithmetic.

    Whatever it believes, it can't lose more than a hundredth of the time beyond its first tries: prompt
    lookup and each engine have a ledger, of gains and losses of steps with their drafts beside what plain
    ones took, and of the time that drafting takes. Whose is used up drafts nothing until plain steps have
    earned a little for it.
    """

    def __init__(self, engines: int = 0, experts: int = 0) -> None:
        """engines: how many draft engines there are beside prompt lookup. experts: of all layers."""
        self.drafted = 0
        self.accepted = 0
        self._costs = StepCosts(experts)
        # Of each engine, the seconds of one more drafted token by the number of sequences.
        self._prices = [Costs() for _ in range(engines)]
        self._proposed = [False] * engines
        self._asked = [0] * engines  # the step of its last draft
        self._pause = [_PAUSE] * engines
        self._probes = [_PROBES] * engines  # short drafts that are left to try it with
        self._ledgers = [
            Ledger(_TRIES[0], _LOSS[0]),
            *(Ledger(_TRIES[1] / engines, _LOSS[1] / engines) for _ in range(engines)),
        ]
        self._plain = 0.0  # seconds of the last plain step; 0: there was none
        self._since_plain = 0
        self._unearned = 0.0  # seconds of plain steps that no ledger has seen
        self._steps = 0
        self._credit = 0.0  # seconds that looks may take
        self._look = 0.0  # that one takes where nobody else has the processor

    def affordable(self, source: int) -> bool:
        """Whether there is time to lose by what comes from there."""
        return self._ledgers[source].is_open

    def ready(self, sequences: int) -> bool:
        """Whether the next step, of so many sequences, may verify drafts."""
        return sequences in self._costs and self._since_plain < _REFRESH

    def choose(self, offers: list[Offer], room: int) -> list[Choice]:
        """What to verify of each sequence in the next step: 0 to MOST_DRAFTED tokens, `room` in all.

        At most one engine is chosen: prompt lookup costs nothing, but each engine takes its time for every
        token.
        """
        n = len(offers)
        if not self.ready(n):
            return [_NONE] * n
        engines = range(len(self._prices) if all(offer.engines for offer in offers) else 0)
        rate, lengths = best_lengths(self._costs, [offer.lookup for offer in offers], room)
        found = [Choice(length, None) for length in lengths]
        # What would bring more than one token each is not given up for a trial.
        good = (
            sum(sum(offer.lookup[: choice.length]) for offer, choice in zip(offers, found, strict=True)) > n
        )
        for each in engines:
            if good or room < n or not any(offer.engines[each] for offer in offers) or not self._due(each):
                continue
            return [Choice(1, each) if offer.engines[each] else _NONE for offer in offers]
        for each in engines:
            better = [_worth(offer.engines[each]) > _worth(offer.lookup) for offer in offers]
            if any(better):
                chains = [
                    offer.engines[each] if asked else offer.lookup
                    for offer, asked in zip(offers, better, strict=True)
                ]
                other, lengths = best_lengths(self._costs, chains, room, better, self._prices[each])
                if other > rate:
                    rate = other
                    found = [
                        Choice(length, each if asked else None)
                        for length, asked in zip(lengths, better, strict=True)
                    ]
        return found

    def _due(self, engine: int) -> bool:
        """Whether it is to be tried anew."""
        if self._steps - self._asked[engine] >= self._pause[engine]:
            self._asked[engine] = self._steps
            self._pause[engine] = min(2 * self._pause[engine], _LONGEST_PAUSE)
            self._probes[engine] = _PROBES
        return self._probes[engine] > 0

    def may_catch_up(self, engine: int) -> bool:
        """Whether there is time for an engine to look at what it is behind.

        The first time there is: what it is worth can't be known before. That belongs to warming up.
        """
        return self._ledgers[1 + engine].saved > 0.0 or not self._proposed[engine]

    def caught_up(self, engine: int, seconds: float) -> None:
        """It took so long to."""
        if self._proposed[engine]:
            self.spend(1 + engine, seconds)

    def proposed(self, engine: int, sequences: int, depth: int, seconds: float) -> None:
        """It took so long to draft `depth` tokens of each of so many sequences."""
        if self._proposed[engine]:  # the first time its weights may not be in memory yet: that is warming up
            prices = self._prices[engine]
            prices.observe(sequences, seconds / depth)
            self.spend(1 + engine, min(seconds, _ACCIDENT * depth * prices(sequences)))
        self._proposed[engine] = True
        self._asked[engine] = self._steps
        self._probes[engine] = max(self._probes[engine] - 1, 0)

    def spend(self, source: int, seconds: float) -> None:
        """What comes from there took so long to make."""
        self._ledgers[source].gain(-seconds, self._plain)

    def observe(
        self,
        sequences: int,
        seconds: float,
        verdicts: Sequence[Verdict] = (),
        *,
        alone: bool = True,
        wait: float = 0.0,
        experts: int = 0,
    ) -> None:
        """A step computed the next token of so many and verified drafts, and took `seconds`.

        alone: it computed no prompts, beside which nothing is verified. wait, experts: see StepCosts.
        """
        if not alone:
            self._earn(seconds)
            return
        self._steps += 1
        for prices in self._prices:
            prices.age()
        if verdicts:
            self._verified(sequences, seconds, verdicts, wait, experts)
            return
        self._costs.observe(sequences, seconds, wait, experts, sequences)
        self._since_plain = 0
        if not self._plain:
            for ledger in self._ledgers:
                ledger.gain(ledger.tries * seconds, seconds)
            self._credit = _SAVED_LOOKS[1] * seconds
        self._plain = self._costs(sequences)
        self._earn(self._plain)  # not `seconds`: what somebody else took of it is not to be lost once more

    def _verified(
        self, sequences: int, seconds: float, verdicts: Sequence[Verdict], wait: float, experts: int
    ) -> None:
        drafted = sum(verdict.drafted for verdict in verdicts)
        plain = self._costs(sequences) if sequences in self._costs else seconds
        # To verify takes no longer than to compute each by itself; what is above that is some accident.
        seconds = min(seconds, plain * (sequences + drafted) / sequences)
        self._costs.observe(sequences + drafted, seconds, min(wait, seconds), experts, sequences)
        self.drafted += drafted
        self._since_plain += 1
        for verdict in verdicts:
            self.accepted += verdict.right
            gained = verdict.right * plain / sequences - (seconds - plain) * verdict.drafted / drafted
            self._ledgers[verdict.source].gain(gained, plain)
            self._save(gained)

    def rested(self, steps: int) -> None:
        """So many plain steps went by of which `observe` was not told."""
        self._steps += steps
        self._earn(steps * self._plain)

    def looked(self, seconds: float) -> int:
        """To find nothing worth verifying took so long: how many steps shall go by without a look.

        So looks take no more than a part of the time, and of what drafts have gained.
        """
        usual = self._look or seconds
        seconds = min(seconds, _ACCIDENT * usual)
        self._look = usual + (seconds - usual) * (0.1 if seconds > usual else 0.5)
        self._credit -= _AROUND * seconds
        if self._credit >= 0.0 or not self._plain:
            return 0
        return math.ceil(-self._credit / (_LOOKING * self._plain))

    def _save(self, seconds: float) -> None:
        """For looks."""
        if seconds > 0.0:
            most, self._credit = _SAVED_LOOKS[0] * self._plain, self._credit + seconds
            if self._credit > most:
                self._credit = most

    def _earn(self, seconds: float) -> None:
        self._save(_LOOKING * seconds)
        self._unearned += seconds
        if self._unearned > _EARNING * self._plain:
            for ledger in self._ledgers:
                ledger.earn(self._unearned, self._plain)
            self._unearned = 0.0


def _worth(chain: tuple[float, ...]) -> float:
    """Of a draft, as much as a short one has."""
    return sum(chain[:4])
