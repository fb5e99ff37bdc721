"""What an engine knows of a peer at a moment."""

from __future__ import annotations

from typing import Final, Literal

from attrs import frozen

# connecting: not spoken with yet; late: no answer for more than a second; lost: it is tried again.
Condition = Literal["connecting", "up", "late", "lost"]

# Of the histogram of how long answers took: seconds.
ANSWER_BOUNDS: Final = (
    0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0,
)  # fmt: skip


@frozen(kw_only=True)
class PeerState:
    """Totals are since the engine was opened. Sizes in bytes."""

    address: str
    condition: Condition
    capacity: int  # experts that it has room for
    held: int  # experts that it can be asked for now
    decides: bool  # whether this engine says what it holds
    asked: int  # total: times that a layer wanted something of it
    answers: int  # total: times it computed what it was asked for
    late: int  # total: those that came after the own drive had been asked
    failures: int  # total: streams that broke or were refused
    sent: int  # total
    received: int  # total
    answer_counts: tuple[int, ...]  # total: of answers that took at most ANSWER_BOUNDS[i], the last: longer
    answer_s: float  # total: of all of them
    error: str  # the last one's words; empty: there was none
