"""How many drafted tokens a step verifies: by what drafts were worth and what steps cost so far.

A step over more tokens takes longer: there is more to compute, and each token routes to experts of its own,
which may have to be read. So both sides are measured: of drafts, how often the next token was the drafted
one; of steps, the seconds by the number of tokens; of draft engines, the seconds that a token takes them.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Final

from attrs import define, field, frozen

MOST_DRAFTED: Final = 8  # tokens of one request in one step

# Kinds of drafts: prompt lookup has one for each length of what stood there before, the longest is 0.
LOOKUPS: Final = 3
DRAFT_MODEL: Final = 3
TIED: Final = 4

_MEMORY: Final = 0.97  # of what drafts were worth, what is left after one more
_BELIEF: Final = 4.0  # drafted tokens that the first guess of a chance is worth
_FIRST: Final = (0.7, 0.5, 0.4, 0.7, 0.7)  # that guess, by kind of draft
_LATEST: Final = 5  # measurements of a step, whose median counts
_FORGOTTEN: Final = 100  # steps until a price is tried anew: what was dear in a cold cache, or by accident
_SLOPE: Final = 0.6  # one more token, in steps of one token, as long as nothing else is known
_WORTH: Final = 1.03  # a step with drafts must look this much better than one without
_REFRESH: Final = 32  # steps until one without drafts is measured again
# An engine that was left alone for so many steps is tried anew with so many short drafts, as a few unlucky
# ones may have silenced it. Each time it is left alone for twice as long, up to a bound.
_PAUSE: Final = 64
_LONGEST_PAUSE: Final = 4096
_PROBES: Final = 8
# A draft that took so many times as long as usual: somebody else had the processor meanwhile.
_ACCIDENT: Final = 2.0
# What may be lost: so many plain steps at first, and this part of the time that they take.
_TRIES: Final = 4.0
_LOSS: Final = 0.01


class Costs:
    """Seconds of a step by its tokens, as measured; between and beyond by a straight line."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._latest: dict[int, deque[float]] = {}
        self._at: dict[int, int] = {}
        self._steps = 0

    def observe(self, tokens: int, seconds: float) -> None:
        self.age()
        latest = self._latest.setdefault(tokens, deque(maxlen=_LATEST))
        latest.append(seconds)
        self._seconds[tokens] = median(latest)
        self._at[tokens] = self._steps

    def age(self) -> None:
        """One more step: what was measured long ago is forgotten."""
        self._steps += 1
        for old in [each for each, at in self._at.items() if self._steps - at > _FORGOTTEN]:
            del self._seconds[old], self._latest[old], self._at[old]

    def __contains__(self, tokens: int) -> bool:
        return tokens in self._seconds

    def __call__(self, tokens: int) -> float:
        """Of a step of so many. Needs one measurement."""
        known = sorted(self._seconds)
        below = [each for each in known if each <= tokens]
        above = [each for each in known if each >= tokens]
        if below and above:
            low, high = below[-1], above[0]
            share = (tokens - low) / (high - low) if high > low else 0.0
            return self._seconds[low] + share * (self._seconds[high] - self._seconds[low])
        near = below[-1] if below else above[0]
        return max(self._seconds[near] + self._slope(known) * (tokens - near), 0.0)

    def guess(self, tokens: int) -> float:
        """The same; nothing where nothing was measured, so that it is tried."""
        return self(tokens) if self._seconds else 0.0

    def _slope(self, known: list[int]) -> float:
        first, last = known[0], known[-1]
        if first == last:
            return _SLOPE * self._seconds[first] / first
        return max((self._seconds[last] - self._seconds[first]) / (last - first), 0.0)


@define
class Record:
    """What became of a request's drafts, by kind."""

    tried: list[float] = field(factory=lambda: [0.0] * len(_FIRST))
    right: list[float] = field(factory=lambda: [0.0] * len(_FIRST))
    belief: list[float] = field(factory=lambda: [_BELIEF] * len(_FIRST))  # left of it

    def chance(self, kind: int, first: float | None = None) -> float:
        """That the next drafted token is the one that comes, when all before it were. first: as guessed."""
        guess = _FIRST[kind] if first is None else first
        belief = self.belief[kind]
        return (self.right[kind] + belief * guess) / (self.tried[kind] + belief)

    def note(self, kind: int, drafted: int, accepted: int) -> None:
        """Those behind the first wrong one say nothing."""
        tried = min(accepted + 1, drafted)
        keep = _MEMORY**tried
        self.tried[kind] = self.tried[kind] * keep + tried
        self.right[kind] = self.right[kind] * keep + accepted
        self.belief[kind] *= keep


@frozen
class Offer:
    """What can be drafted of one sequence: the chance of each next token to be right, 0 where there is none.

    lookup: of the draft that prompt lookup has found. engines: of what each engine would draft, in order.
    """

    lookup: float
    engines: tuple[float, ...] = ()


@frozen
class Choice:
    """How many tokens of one sequence to draft. engine: which one is to; None: prompt lookup has done it."""

    length: int
    engine: int | None


class Speculation:
    """Decides for steps that compute answers alone. Pure arithmetic.

    Whatever it believes, it can't lose more than a hundredth of the time beyond its first tries: gains and
    losses of steps with drafts, beside what plain ones took, are added up with what drafting itself took,
    and where they are used up nothing is drafted until plain steps have earned a little.
    """

    def __init__(self, engines: int = 0) -> None:
        """engines: how many draft engines there are beside prompt lookup."""
        self.drafted = 0
        self.accepted = 0
        self._costs = Costs()
        # Of each engine, the seconds of one more drafted token by the number of sequences.
        self._prices = [Costs() for _ in range(engines)]
        self._proposed = [False] * engines
        self._silent = [0] * engines  # steps since its last draft
        self._pause = [_PAUSE] * engines
        self._probes = [0] * engines  # short drafts that are left to try it with
        self._all = Record()
        # What may be lost: at once, and in all.
        self._balance = 0.0
        self._saved = 0.0
        self._begun = False
        self._affordable, self._enough = True, 0.0
        self._since_plain = 0

    def chance(self, record: Record, kind: int) -> float:
        """That a drafted token of this kind is right, for the request with this record."""
        return record.chance(kind, (_FIRST[kind] + self._all.chance(kind)) / 2)

    def note(self, record: Record, kind: int, drafted: int, accepted: int) -> None:
        """What became of a draft of the request with this record."""
        for each in (record, self._all):
            each.note(kind, drafted, accepted)

    @property
    def affordable(self) -> bool:
        """Whether there is time to spend on what engines need before they can draft.

        Once it was used up not before there is enough for a draft, too: else that alone would use it up.
        """
        self._affordable = self._balance >= (0.0 if self._affordable else self._enough)
        return self._affordable

    def ready(self, sequences: int) -> bool:
        """Whether the next step, of so many sequences, may verify drafts: else there is no need to look."""
        return sequences in self._costs and self._since_plain < _REFRESH and self._balance >= 0.0

    def choose(self, offers: list[Offer], room: int) -> list[Choice]:
        """What to verify of each sequence in the next step: 0 to MOST_DRAFTED tokens, `room` in all.

        At most one engine is chosen: prompt lookup costs nothing, but each engine takes its time for every
        token.
        """
        n = len(offers)
        if not self.ready(n):
            return [Choice(0, None)] * n
        for each in range(len(self._prices)):
            if room >= n and any(offer.engines[each] for offer in offers) and self._due(each):
                return [Choice(1, each) if offer.engines[each] else Choice(0, None) for offer in offers]
        rate, take, wanted, engine = self._best(offers, None, room)
        for each in range(len(self._prices)):
            if any(offer.engines[each] > offer.lookup for offer in offers):
                found = self._best(offers, each, room)
                if found[0] > rate:
                    rate, take, wanted, engine = found
        lengths = [0] * n
        for _, _, at in wanted[:take]:
            lengths[at] += 1
        return [
            Choice(length, engine if engine is not None and offer.engines[engine] > offer.lookup else None)
            for length, offer in zip(lengths, offers, strict=True)
        ]

    def _due(self, engine: int) -> bool:
        """Whether it is to be tried anew."""
        if self._silent[engine] >= self._pause[engine]:
            self._silent[engine] = 0
            self._pause[engine] = min(2 * self._pause[engine], _LONGEST_PAUSE)
            self._probes[engine] = _PROBES
        return self._probes[engine] > 0

    def _best(
        self, offers: list[Offer], engine: int | None, room: int
    ) -> tuple[float, int, list[tuple[float, int, int]], int | None]:
        """(Tokens per second, how many of the wanted ones, (chance, depth, sequence) of all, engine)."""
        n = len(offers)
        made = [0.0 if engine is None else offer.engines[engine] for offer in offers]
        # Each next token of a draft is wanted less than the one before: the best first, and all that pay.
        wanted = sorted(
            (
                (max(offer.lookup, other) ** depth, depth, at)
                for at, (offer, other) in enumerate(zip(offers, made, strict=True))
                for depth in range(1, MOST_DRAFTED + 1)
                if offer.lookup > 0.0 or other > 0.0
            ),
            key=lambda each: -each[0],
        )
        expected, best, take = float(n), _WORTH * n / self._costs(n), 0
        deepest, asked = 0, 0
        for count, (chance, depth, at) in enumerate(wanted[:room], 1):
            expected += chance
            if made[at] > offers[at].lookup:
                deepest = max(deepest, depth)
                asked += depth == 1
            seconds = self._costs(n + count)
            if engine is not None and asked:
                seconds += deepest * self._prices[engine].guess(asked)
            if expected / seconds > best:
                best, take = expected / seconds, count
        return best, take, wanted, engine

    def may_catch_up(self, engine: int) -> bool:
        """Whether there is time for an engine to look at what it is behind.

        The first time there is: what it is worth can't be known before. That belongs to warming up.
        """
        return self._saved > 0.0 or not self._proposed[engine]

    def caught_up(self, engine: int, seconds: float) -> None:
        """It took so long to."""
        if self._proposed[engine]:
            self.spend(seconds)

    def proposed(self, engine: int, sequences: int, depth: int, seconds: float) -> None:
        """It took so long to draft `depth` tokens of each of so many sequences."""
        if self._proposed[engine]:  # the first time its weights may not be in memory yet: that is warming up
            prices = self._prices[engine]
            prices.observe(sequences, seconds / depth)
            self.spend(min(seconds, _ACCIDENT * depth * prices(sequences)))
        self._proposed[engine] = True
        self._silent[engine] = 0
        self._probes[engine] = max(self._probes[engine] - 1, 0)

    def spend(self, seconds: float) -> None:
        """Drafting took so long."""
        self._gain(-seconds)

    def observe(
        self, sequences: int, drafted: int, accepted: int, seconds: float, *, alone: bool = True
    ) -> None:
        """A step computed the next token of so many, verified drafted tokens, and took `seconds`.

        alone: it computed no prompts, beside which nothing is verified.
        """
        if not alone:
            self._gain(_LOSS * seconds)
            return
        plain = self._costs(sequences) if sequences in self._costs else seconds
        if not self._begun:
            self._begun = True
            self._gain(_TRIES * seconds)
        # To verify takes no longer than to compute each by itself; what is above that is some accident.
        seconds = min(seconds, plain * (sequences + drafted) / sequences) if drafted else seconds
        self._costs.observe(sequences + drafted, seconds)
        for prices in self._prices:
            prices.age()
        self._silent = [steps + 1 for steps in self._silent]
        if drafted:
            self.drafted += drafted
            self.accepted += accepted
            self._since_plain += 1
            self._gain(plain + accepted * plain / sequences - seconds)
        else:
            self._since_plain = 0
            self._gain(_LOSS * seconds)
        self._balance = min(self._balance, _TRIES * plain)
        self._enough = plain

    def _gain(self, seconds: float) -> None:
        self._saved += seconds
        self._balance = min(self._balance + seconds, self._saved)
