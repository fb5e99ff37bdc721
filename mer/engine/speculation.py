"""How many drafted tokens a step verifies: by what drafts were worth and what steps cost so far.

A step over more tokens takes longer: there is more to compute, and each token routes to experts of its own,
which may have to be read. So both sides are measured: of drafts, how often their tokens were right; of steps,
the seconds by the number of tokens; of draft engines, the seconds that a token takes them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from attrs import define, frozen

_LATEST: Final = 7  # measurements of a step, whose median counts
_FORGOTTEN: Final = 200  # steps until a price is tried anew: what was dear in a cold cache, or by accident
_SLOPE: Final = 0.4  # one more token, in steps of one token, as long as nothing else is known
_MOVED: Final = 0.02  # a median that changed by less changes nothing
_WORTH: Final = 1.03  # a step with drafts must look this much better than one without
_REFRESH: Final = 32  # steps until one without drafts is measured again
# An engine is tried with so many short drafts. One that was left alone for so many steps is tried anew, as a
# few unlucky ones may have silenced it. Each time it is left alone for twice as long, up to a bound.
_PAUSE: Final = 64
_LONGEST_PAUSE: Final = 4096
_PROBES: Final = 8
# A draft that took so many times as long as usual: somebody else had the processor meanwhile.
_ACCIDENT: Final = 2.0
# What may be lost, by prompt lookup and by all engines: so many plain steps at once, and this part of the
# time that they take. What the last draft loses comes on top of it.
_TRIES: Final = (0.75, 0.75)
_LOSS: Final = (0.005, 0.005)
_GAINED: Final = 8.0  # of what was gained, as much may be lost at once
_EARNING: Final = 8  # plain steps of which that is counted at once
# Of what is known of waits, the part that one more step replaces; and a wait that is none, seconds.
_PRESENT: Final = 0.2
_NO_WAIT: Final = 1e-6

LOOKUP: Final = 0  # of what drafts come from; engines follow


class Costs:
    """Seconds of a step by its tokens, as measured; between and beyond by a straight line."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._latest: dict[int, deque[float]] = {}
        self._at: dict[int, int] = {}
        self._steps = 0
        self._next = _FORGOTTEN  # when something may be forgotten
        self._curve: list[float] = []  # by tokens, as far as anybody has asked

    def observe(self, tokens: int, seconds: float) -> None:
        self.age()
        latest = self._latest.get(tokens)
        if latest is None:
            latest = self._latest[tokens] = deque(maxlen=_LATEST)
            if self._seconds:  # the first one may touch memory that no other has
                latest.append(self(tokens))
        latest.append(seconds)
        self._at[tokens] = self._steps
        middle, known = sorted(latest)[(len(latest) - 1) // 2], self._seconds.get(tokens, 0.0)
        if abs(middle - known) > _MOVED * known:
            self._seconds[tokens] = middle
            self._curve.clear()

    def age(self) -> None:
        """One more step: what was measured long ago is forgotten."""
        self._steps += 1
        if self._steps <= self._next:
            return
        for old in [each for each, at in self._at.items() if self._steps - at > _FORGOTTEN]:
            del self._seconds[old], self._latest[old], self._at[old]
            self._curve.clear()
        self._next = min(self._at.values(), default=self._steps) + _FORGOTTEN

    def __contains__(self, tokens: int) -> bool:
        return tokens in self._seconds

    def __call__(self, tokens: int) -> float:
        """Of a step of so many; 0 where nothing was measured."""
        return self._seconds[tokens] if tokens in self._seconds else self.curve(tokens)[tokens]

    def curve(self, most: int) -> list[float]:
        """Of steps of 0, 1, ..., at least `most` tokens; 0 where nothing was measured."""
        if len(self._curve) <= most:
            known = sorted(self._seconds)
            if not known:
                return [0.0] * (most + 1)
            slope = self._slope(known)
            low, at = known[0], self._seconds[known[0]]
            curve = [max(at - slope * (low - tokens), 0.0) for tokens in range(low)]
            for high in known[1:]:
                step = (self._seconds[high] - at) / (high - low)
                curve += [at + step * more for more in range(high - low)]
                low, at = high, self._seconds[high]
            curve += [at + slope * more for more in range(most + 1 - low)]
            self._curve = curve or [at]
        return self._curve

    def _slope(self, known: list[int]) -> float:
        """Seconds of one more token, beyond what was measured."""
        first, last = known[0], known[-1]
        if first == last:
            return _SLOPE * self._seconds[first] / first
        return max((self._seconds[last] - self._seconds[first]) / (last - first), 0.0)


class StepCosts:
    """Seconds of a step by its tokens: what is computed, and what is waited for.

    The wait is that of the latest steps for an expert that they wanted, whatever their width, times the
    experts that a step of that width wants. So a cache that fills, or shrinks, changes all widths at once,
    also those that were not measured since. What reads take while something is computed is no wait.
    """

    def __init__(self) -> None:
        self._compute = Costs()
        self._experts = Costs()  # not seconds but experts of all layers
        self._waited = 0.0  # seconds of a step, and
        self._wanted = 0.0  # its experts: of the latest ones

    def observe(self, tokens: int, seconds: float, wait: float, experts: int) -> None:
        """A step of so many took `seconds`, of them `wait` for reads, and wanted so many experts."""
        self._compute.observe(tokens, max(seconds - wait, 0.0))
        if wait or self._waited > _NO_WAIT:
            self._experts.observe(tokens, experts)
            self._waited += _PRESENT * (wait - self._waited)
            self._wanted += _PRESENT * (experts - self._wanted)

    def __contains__(self, tokens: int) -> bool:
        return tokens in self._compute

    def __call__(self, tokens: int) -> float:
        """Of a step of so many; 0 where nothing was measured."""
        if self._waited <= _NO_WAIT:
            return self._compute(tokens)
        return self._compute(tokens) + self._rate * self._experts(tokens)

    def curve(self, most: int) -> list[float]:
        """Of steps of 0, 1, ..., at least `most` tokens; 0 where nothing was measured."""
        compute = self._compute.curve(most)
        if self._waited <= _NO_WAIT:
            return compute
        rate = self._rate
        return [a + rate * b for a, b in zip(compute, self._experts.curve(most), strict=False)]

    @property
    def _rate(self) -> float:
        return self._waited / max(self._wanted, 1.0)


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


@frozen
class Offer:
    """What can be drafted of one sequence: see Acceptance.chances, empty where there is nothing.

    lookup: of the draft that prompt lookup has found. engines: of what each engine would draft, in order.
    """

    lookup: tuple[float, ...]
    engines: tuple[tuple[float, ...], ...] = ()


@frozen
class Choice:
    """How many tokens of one sequence to draft. engine: which one is to; None: prompt lookup has done it."""

    length: int
    engine: int | None


@frozen
class Verdict:
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

    def __init__(self, engines: int = 0) -> None:
        """engines: how many draft engines there are beside prompt lookup."""
        self.drafted = 0
        self.accepted = 0
        self._costs = StepCosts()
        # Of each engine, the seconds of one more drafted token by the number of sequences.
        self._prices = [Costs() for _ in range(engines)]
        self._proposed = [False] * engines
        self._silent = [0] * engines  # steps since its last draft
        self._pause = [_PAUSE] * engines
        self._probes = [_PROBES] * engines  # short drafts that are left to try it with
        self._ledgers = [
            Ledger(_TRIES[0], _LOSS[0]),
            *(Ledger(_TRIES[1] / engines, _LOSS[1] / engines) for _ in range(engines)),
        ]
        self._plain = 0.0  # seconds of the last plain step; 0: there was none
        self._since_plain = 0
        self._unearned = 0.0  # seconds of plain steps that no ledger has seen
        self._rests = 0  # steps that `observe` was not told of, since it was called

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
        for each in range(len(self._prices)):
            if room >= n and any(offer.engines[each] for offer in offers) and self._due(each):
                return [Choice(1, each) if offer.engines[each] else _NONE for offer in offers]
        rate, lengths = self._best([offer.lookup for offer in offers], [False] * n, None, room)
        found = [Choice(length, None) for length in lengths]
        for each in range(len(self._prices)):
            better = [_worth(offer.engines[each]) > _worth(offer.lookup) for offer in offers]
            if any(better):
                chains = [
                    offer.engines[each] if asked else offer.lookup
                    for offer, asked in zip(offers, better, strict=True)
                ]
                other, lengths = self._best(chains, better, each, room)
                if other > rate:
                    rate = other
                    found = [
                        Choice(length, each if asked else None)
                        for length, asked in zip(lengths, better, strict=True)
                    ]
        return found

    def _due(self, engine: int) -> bool:
        """Whether it is to be tried anew."""
        if self._silent[engine] >= self._pause[engine]:
            self._silent[engine] = 0
            self._pause[engine] = min(2 * self._pause[engine], _LONGEST_PAUSE)
            self._probes[engine] = _PROBES
        return self._probes[engine] > 0

    def _best(
        self, chains: list[tuple[float, ...]], asked: list[bool], engine: int | None, room: int
    ) -> tuple[float, list[int]]:
        """(Tokens per second, how many of each chain). asked: whose is the engine's."""
        n = len(chains)
        lengths = [0] * n
        most = min(room, sum(map(len, chains)))
        seconds = self._costs.curve(n + most)
        expected, best, take = float(n), _WORTH * n / seconds[n], 0
        if not most or n + sum(map(sum, chains)) <= best * seconds[n + 1]:
            return best, lengths
        # Each next token of a draft is wanted less than the one before: the best first, and all that pay.
        wanted = [
            (chance, depth, at) for at, chain in enumerate(chains) for depth, chance in enumerate(chain, 1)
        ]
        if n > 1:
            wanted.sort(key=lambda each: (-each[0], each[1]))
        deepest = texts = 0
        for count, (chance, depth, at) in enumerate(wanted[:room], 1):
            expected += chance
            took = seconds[n + count]
            if engine is not None:
                if asked[at]:
                    deepest = max(deepest, depth)
                    texts += depth == 1
                if texts:
                    took += deepest * self._prices[engine](texts)
            if expected > best * took:
                best, take = expected / took, count
        for _, _, at in wanted[:take]:
            lengths[at] += 1
        return best, lengths

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
        self._silent[engine] = 0
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
        drafted = right = 0
        for verdict in verdicts:
            drafted += verdict.drafted
            right += verdict.right
        for prices in self._prices:
            prices.age()
        if self._silent:
            self._silent = [steps + 1 + self._rests for steps in self._silent]
            self._rests = 0
        if not drafted:
            self._costs.observe(sequences, seconds, wait, experts)
            self._since_plain = 0
            if not self._plain:
                for ledger in self._ledgers:
                    ledger.gain(ledger.tries * seconds, seconds)
            self._plain = self._costs(sequences)
            self._earn(seconds)
            return
        plain = self._costs(sequences) if sequences in self._costs else seconds
        # To verify takes no longer than to compute each by itself; what is above that is some accident.
        seconds = min(seconds, plain * (sequences + drafted) / sequences)
        self._costs.observe(sequences + drafted, seconds, min(wait, seconds), experts)
        self.drafted += drafted
        self.accepted += right
        self._since_plain += 1
        for verdict in verdicts:
            gained = verdict.right * plain / sequences - (seconds - plain) * verdict.drafted / drafted
            self._ledgers[verdict.source].gain(gained, plain)

    def rested(self, seconds: float) -> None:
        """A step without drafts took so long, of which `observe` is not told."""
        self._rests += 1
        self._earn(seconds)

    def _earn(self, seconds: float) -> None:
        self._unearned += seconds
        if self._unearned > _EARNING * self._plain:
            for ledger in self._ledgers:
                ledger.earn(self._unearned, self._plain)
            self._unearned = 0.0


def _worth(chain: tuple[float, ...]) -> float:
    """Of a draft, as much as a short one has."""
    return sum(chain[:4])
