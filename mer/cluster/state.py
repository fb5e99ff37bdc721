"""What an engine knows of a peer at a moment."""

from __future__ import annotations

from typing import Literal

from attrs import frozen

# connecting: not spoken with yet; late: no answer for more than a second; lost: it is tried again.
Condition = Literal["connecting", "up", "late", "lost"]


@frozen(kw_only=True)
class PeerState:
    """Totals are since the engine was opened. Sizes in bytes."""

    address: str
    condition: Condition
    capacity: int  # experts that it has room for
    held: int  # experts that it can be asked for now
    answers: int  # total: times it computed what it was asked for
    late: int  # total: those that came after the own drive had been asked
    failures: int  # total: streams that broke or were refused
    sent: int  # total
    received: int  # total
    error: str  # the last one's words; empty: there was none
