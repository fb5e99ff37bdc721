"""How many drafted tokens a step verifies: by what drafts were worth and what steps cost so far.

A step over more tokens takes longer: there is more to compute, and each token routes to experts of its own,
which may have to be read. So both sides are measured: of drafts, how often the next token was the drafted
one; of steps, the seconds by the number of tokens.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Final

from attrs import define, field

MOST_DRAFTED: Final = 8  # tokens of one request in one step

_MEMORY: Final = 0.97  # of what drafts were worth, what is left after one more
_BELIEF: Final = 4.0  # drafted tokens that the first guess of a chance is worth
_FIRST: Final = (0.7, 0.5, 0.4)  # that guess, by kind of draft
_LATEST: Final = 5  # measurements of a step, whose median counts
_FORGOTTEN: Final = 100  # steps until a price is tried anew: what was dear in a cold cache, or by accident
_SLOPE: Final = 0.6  # one more token, in steps of one token, as long as nothing else is known
_WORTH: Final = 1.03  # a step with drafts must look this much better than one without
_REFRESH: Final = 32  # steps until one without drafts is measured again
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
        self._steps += 1
        latest = self._latest.setdefault(tokens, deque(maxlen=_LATEST))
        latest.append(seconds)
        self._seconds[tokens] = median(latest)
        self._at[tokens] = self._steps
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

    def chance(self, kind: int) -> float:
        """That the next drafted token is the one that comes, when all before it were."""
        return (self.right[kind] + _BELIEF * _FIRST[kind]) / (self.tried[kind] + _BELIEF)

    def note(self, kind: int, drafted: int, accepted: int) -> None:
        """Those behind the first wrong one say nothing."""
        tried = min(accepted + 1, drafted)
        keep = _MEMORY**tried
        self.tried[kind] = self.tried[kind] * keep + tried
        self.right[kind] = self.right[kind] * keep + accepted


class Speculation:
    """Decides for steps that compute answers alone. Pure arithmetic.

    Whatever it believes, it can't lose more than a hundredth of the time beyond its first tries: gains and
    losses of steps with drafts, beside what plain ones took, are added up, and where they are used up no
    draft is verified until plain steps have earned a little.
    """

    def __init__(self) -> None:
        self.drafted = 0
        self.accepted = 0
        self._costs = Costs()
        self._balance: float | None = None
        self._since_plain = 0

    def lengths(self, chances: list[float]) -> list[int]:
        """How many drafted tokens to verify of each sequence in the next step, 0 to MOST_DRAFTED.

        chances: see Record; 0 for one that has no draft.
        """
        n = len(chances)
        none = [0] * n
        if n not in self._costs or self._since_plain >= _REFRESH or (self._balance or 0.0) < 0.0:
            return none
        # Each next token of a draft is wanted less than the one before: the best first, and all that pay.
        wanted = sorted(
            ((chance ** (i + 1), at) for at, chance in enumerate(chances) for i in range(MOST_DRAFTED)),
            key=lambda each: -each[0],
        )
        expected, best, take = float(n), _WORTH * n / self._costs(n), 0
        for count, (chance, _) in enumerate(wanted, 1):
            if chance <= 0.0:
                break
            expected += chance
            if expected / self._costs(n + count) > best:
                best, take = expected / self._costs(n + count), count
        for _, at in wanted[:take]:
            none[at] += 1
        return none

    def observe(self, sequences: int, drafted: int, accepted: int, seconds: float) -> None:
        """A step computed the next token of so many, verified drafted tokens, and took `seconds`."""
        plain = self._costs(sequences) if sequences in self._costs else seconds
        if self._balance is None:
            self._balance = _TRIES * seconds
        # To verify takes no longer than to compute each by itself; what is above that is some accident.
        seconds = min(seconds, plain * (sequences + drafted) / sequences) if drafted else seconds
        self._costs.observe(sequences + drafted, seconds)
        if drafted:
            self.drafted += drafted
            self.accepted += accepted
            self._since_plain += 1
            self._balance += plain + accepted * plain / sequences - seconds
        else:
            self._since_plain = 0
            self._balance += _LOSS * seconds
        self._balance = min(self._balance, _TRIES * plain)
