"""How much memory expert caches keep while others need some: given back at once, taken patiently."""

from __future__ import annotations

from typing import Final

from attrs import define

# Left to others: this share of what was asked for, within these bounds.
_RESERVE: Final = 1 / 32
_RESERVE_BYTES: Final = (32 << 20, 256 << 20)
# Tasks that waited for memory for this share of the time are pressure, and this share of what is held goes.
_STALLED: Final = 0.1
_GIVEN: Final = 1 / 16
# Seconds without pressure before anything is taken again, and from one time to the next.
_CALM: Final = 5.0
_AGAIN: Final = 1.0


@define
class Breath:
    """asked: bytes that an operator allows; ram: bytes to keep to now. Pure: no clock, no I/O."""

    asked: int
    ram: int
    _grow_at: float = 0.0

    @property
    def reserve(self) -> int:
        """Bytes that shall be free."""
        return int(min(max(self.asked * _RESERVE, _RESERVE_BYTES[0]), _RESERVE_BYTES[1]))

    def step(self, now: float, *, floor: int, held: int, unfilled: int, room: int, stalled: float) -> int:
        """`ram` from now (seconds) on.

        floor: the least that is possible. held: the `ram` of which there would be just enough for what is in
        the caches. unfilled: bytes that they may take beyond. room, stalled: what Gauge.read says.
        """
        short = self.reserve - room
        if stalled >= _STALLED:
            short = max(short, int(held * _GIVEN))
        if short > 0:
            # As much again beyond, so that the next small need finds it.
            self.ram = max(min(self.ram, held - short - self.reserve), min(floor, self.ram))
            self._grow_at = now + _CALM
        elif now >= self._grow_at:
            # What caches may take already will be taken. Half of the rest: others may be growing, too.
            spare = (room - unfilled - 2 * self.reserve) // 2
            missing = self.asked - self.ram
            if missing > 0 and spare >= min(missing, self.reserve):
                self.ram += min(missing, spare)
                self._grow_at = now + _AGAIN
        return self.ram
