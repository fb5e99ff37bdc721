"""How long requests wait for their first step: what engines are added or taken away by."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from mer.engine.observer import EndReason
from mer.engine.outputs import Usage
from mer.engine.stats import StepStats

# Seconds that are looked back on.
WINDOW: Final = 30.0


class QueueTimes:
    """An observer of an engine; `worst` may be asked on any thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """clock: seconds, such as time.monotonic."""
        self._clock = clock
        self._started: deque[tuple[float, float]] = deque(maxlen=4096)
        self._last = clock()  # when something began, or there was nothing to begin

    def worst(self, waiting: int) -> float:
        """Seconds that a request waited, of those that began in the last 30 s; waiting: how many do now.

        While none begins, those that wait have waited since one did.
        """
        now = self._clock()
        if not waiting:
            self._last = now
        recent = [waited for when, waited in list(self._started) if now - when <= WINDOW]
        return max([now - self._last, *recent])

    def queued(self, request_id: int) -> None:
        """Nothing is known of it yet."""

    def started(self, queue_s: float) -> None:
        """One more."""
        self._last = self._clock()
        self._started.append((self._last, queue_s))

    def token(self, first: bool, seconds: float) -> None:
        """Does not matter here."""

    def step(self, tokens: int, requests: int, stats: StepStats) -> None:
        """Does not matter here."""

    def ended(self, reason: EndReason, usage: Usage | None) -> None:
        """Does not matter here."""


def wanted_engines(now: int, waits: Sequence[float], running: Sequence[int], target: float, most: int) -> int:
    """How many engines there should be; there are `now`.

    waits: of each engine, as `QueueTimes.worst`, seconds; running: requests that each computes; most: such
    requests that one computes at a time. One more where the shortest wait is above `target`: no other engine
    has room either. One less where nobody waits for half as long and what runs has room in one less,
    with a quarter of that left.
    """
    if not waits:
        return now
    if min(waits) > target:
        return now + 1
    if now > 1 and max(waits) < target / 2 and sum(running) <= (now - 1) * most * 3 / 4:
        return now - 1
    return now
