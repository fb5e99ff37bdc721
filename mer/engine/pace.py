"""How many tokens of prompts a step may take while others wait for their next token: by measured costs."""

from __future__ import annotations

from typing import Final

# A step with prompts in it is aimed at this many times one without, and never below so many seconds.
_STRETCH: Final = 4
_QUICK: Final = 0.1
# A prompt's token may cost this much more than in a whole chunk; cutting finer would help nobody.
_DEARER: Final = 2.0
# Time by which a step was longer than aimed at -> how much of it goes to streams alone, behind it.
_SHARE: Final = 0.5
_LEAST: Final = 4  # log2 of the smallest chunk
_NEWS: Final = 0.5  # weight of the last measurement
_MEMORY: Final = (
    100  # steps with prompts until a price is forgotten: what was dear in a cold cache is tried again
)


class Pace:
    """Pure arithmetic: is told what steps took, and says what fits into the next one.

    A chunk makes everybody who is answered wait, by its tokens times a price. The price falls as a chunk
    grows: reading an expert, from disk or from memory, serves all of its tokens. So prices are kept for each
    power of two, and the chunk is chosen for which (time of the step) x (price) is least. Where tokens have
    the same price in any chunk that is the largest whose step is short enough. When reads from disk are what
    a step waits for, half a chunk takes nearly as long as all of it, and the whole one is taken.

    What cutting can't give, sharing does: a step that took too long is followed by steps without prompts,
    for half of the time that was too much. So a long prompt never takes more than two thirds of the time.
    """

    def __init__(self, step_tokens: int) -> None:
        """step_tokens: the largest chunk."""
        self._most = step_tokens
        self._alone = 0.0  # seconds of a step without prompts
        self._prices: dict[int, float] = {}  # log2 of a chunk's tokens -> seconds a token
        self._measured: dict[int, int] = {}  # the same -> the step in which
        self._steps = 0
        self._owed = 0.0

    def observe(self, decoding: int, prompt: int, seconds: float) -> None:
        """A step took `seconds`: `decoding` tokens of answers, `prompt` tokens of prompts."""
        if not decoding:
            self._owed = 0.0
        if not prompt:
            self._alone = _mean(self._alone, seconds)
            self._owed = max(self._owed - seconds, -self._alone / 2)
            return
        size = max(round_log2(prompt), _LEAST)
        extra = max(seconds - (self._alone if decoding else 0.0), 0.0)
        self._prices[size] = _mean(self._prices.get(size, 0.0), extra / prompt)
        self._steps += 1
        self._measured[size] = self._steps
        for old in [each for each, at in self._measured.items() if self._steps - at > _MEMORY]:
            if old != max(self._prices):
                del self._prices[old], self._measured[old]
        if decoding:
            self._owed += _SHARE * max(seconds - self._aim, 0.0)

    @property
    def room(self) -> int:
        """Tokens of prompts that the next step may take, if somebody else is being answered in it."""
        if self._owed > self._alone / 2:
            return 0
        if not self._prices:
            return self._most
        prices = self._known()
        best, least = self._most, float("inf")
        for size in sorted(prices, reverse=True):
            tokens, price = min(1 << size, self._most), prices[size]
            if price > _DEARER * prices[max(prices)]:
                break
            harm = max(self._alone + tokens * price, self._aim) * price
            if harm < least:
                best, least = tokens, harm
        return best

    @property
    def _aim(self) -> float:
        return max(_STRETCH * self._alone, _QUICK)

    def _known(self) -> dict[int, float]:
        """A price for each size. Between two that were measured the time of a chunk is taken to grow evenly,
        which is too little: so a size that may pay is tried. A larger chunk is never dearer.
        """
        prices: dict[int, float] = {}
        below, spent = 0, 0.0  # a chunk of so many tokens takes so long
        price = float("inf")
        for size in range(_LEAST, (self._most - 1).bit_length() + 1):
            tokens = 1 << size
            above = next((each for each in sorted(self._prices) if each >= size), None)
            if above is not None:
                end = 1 << above
                whole = max(min(self._prices[above], price) * end, spent)
                spent += (whole - spent) * (tokens - below) / (end - below)
            else:
                spent = price * tokens
            price = min(price, spent / tokens)
            spent, below = price * tokens, tokens
            prices[size] = price
        return prices


def round_log2(number: int) -> int:
    """The exponent of the power of two that is nearest by ratio."""
    low = number.bit_length() - 1
    return low + (number * number > 1 << (2 * low + 1))


def _mean(before: float, now: float) -> float:
    return before + _NEWS * (now - before) if before else now
