"""How long a peer takes to answer, by how much it is asked. Pure logic: no I/O, no clock."""

from __future__ import annotations

from math import exp, log
from typing import Final

# Of a slower answer in the average, and of a quicker one. It is an average of logarithms: a single answer
# that takes ten times as long makes it 1.8 times as large, and the next usual one takes half of that back.
_SLOWER: Final = 0.25
_QUICKER: Final = 0.5


class Pace:
    """Averages for 1, 2 to 3, 4 to 7 rows and so on."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._noted: dict[int, float] = {}

    def note(self, now: float, rows: int, seconds: float) -> None:
        """An answer of so many rows took so long."""
        size = rows.bit_length()
        before = self._seconds.get(size, seconds)
        share = _SLOWER if seconds > before else _QUICKER
        self._seconds[size] = exp(log(before) + share * (log(seconds) - log(before)))
        self._noted[size] = now

    def expected(self, rows: int) -> float:
        """Seconds until an answer of so many rows; as of fewer, where none had as many, and 0 of none."""
        known = [size for size in self._seconds if size <= rows.bit_length()]
        return self._seconds[max(known)] if known else 0.0

    def age(self, now: float, rows: int) -> float:
        """Seconds since such an answer was measured."""
        known = [size for size in self._noted if size <= rows.bit_length()]
        return now - self._noted[max(known)] if known else float("inf")

    def forget(self) -> None:
        """What was measured was of another time."""
        self._seconds.clear()
        self._noted.clear()
