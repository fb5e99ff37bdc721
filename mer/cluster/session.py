"""What an engine knows of a peer, and how they talk. Pure logic: no I/O, no clock, no locks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from math import ceil
from typing import Final

from attrs import define, field, frozen

from mer._ext.remote import Ask
from mer.cluster.identity import Identity
from mer.cluster.pace import Pace
from mer.cluster.state import ANSWER_BOUNDS, Condition, PeerState
from mer.cluster.wire import WIRES, WireError, cut, make_rows, outputs_checksum
from mer.config import ExpertWire
from mer.v1 import expert_pb2 as pb

# After a failure it is tried again: seconds, doubled with each one that follows.
FIRST_DELAY: Final = 0.25
LAST_DELAY: Final = 30.0
# Who has not answered for so long is late, and lost: seconds.
LATE: Final = 1.0
LOST: Final = 20.0
# Who was late so many times in a row is left alone for a while: seconds, doubled with each time that follows.
_OFTEN: Final = 3
_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 5.0
# What is wanted for longer is always wanted: ms.
_LONGEST_PATIENCE: Final = 1e9
# Who would be slower than the own drive is asked for the measurement's sake alone: every so many seconds.
PROBE: Final = 1.0


@frozen
class Answer:
    """Of what a layer wanted. rows: [sum of their counts, hidden], bytes as in the Hello; None: none come."""

    turn: int
    experts: list[int]
    rows: bytes | None


@frozen
class News:
    """What has become of a message. changed: it has come, or what it holds or who decides is another."""

    changed: bool = False
    answer: Answer | None = None


@define(eq=False)
class _Asked:
    """What one layer wants of a peer, in some messages; their answers come in order."""

    ask: Ask
    at: float
    sizes: dict[int, int] = field(factory=dict)  # bytes that each message's answer has, by its number
    rows: list[bytes] = field(factory=list)
    missing: bool = False
    late: bool = False  # for the peer to compute it

    def over(self) -> Answer:
        rows = None if self.missing or self.sizes else b"".join(self.rows)
        return Answer(self.ask.turn, self.ask.experts, rows)


class Session:
    """`now` is in seconds of the monotonic clock. What a method returns as messages is to be sent, in order.

    First `begin`, for every stream to the peer; behind its end `end`.
    """

    def __init__(
        self, address: str, engine: bytes, identity: Identity, n_keys: int, wire: ExpertWire = "f32"
    ) -> None:
        """engine, wire: see Hello."""
        self.address, self._wire = address, wire
        self._hello = pb.Hello(
            protocol=identity.protocol, version=identity.version, model=identity.model,
            arithmetic=identity.arithmetic, probe=identity.probe, engine=engine,
            wire=wire,
        )  # fmt: skip
        self._n_keys = n_keys
        self._condition: Condition = "connecting"
        self._asked: _Asked | None = None
        self._number = 0
        self._waiting_since: float | None = None  # for an answer of any kind
        self._late_in_a_row, self._paused_until = 0, 0.0
        self._pace = Pace()
        self.delay = FIRST_DELAY
        self.capacity, self.assigns = 0, False
        self.held: frozenset[int] = frozenset()
        self._answer_counts, self._answer_s = [0] * (len(ANSWER_BOUNDS) + 1), 0.0
        self._times = self._answers = self._late = self._failures = self._sent = self._received = 0
        self._error = ""

    @property
    def lost(self) -> bool:
        """Whether there is no stream to it, and there was one, or one was tried."""
        return self._condition == "lost"

    def begin(self, now: float) -> pb.ComputeRequest:
        """The first message of a new stream."""
        return self._sending(now, pb.ComputeRequest(hello=self._hello))

    def ask(self, now: float, ask: Ask) -> list[pb.ComputeRequest]:
        """None while it owes an answer: so nothing piles up at a slow one."""
        if self._condition != "up" or self._asked is not None or now < self._paused_until:
            return []
        self._asked = asked = _Asked(ask, now)
        self._times += 1
        messages, at, width = [], 0, ask.x.shape[1] * WIRES[self._wire].block_bytes
        patience = _patience_ms(ask.deadline, now)
        for part, (some, parts) in enumerate(cut(ask.experts, ask.counts)):
            self._number += 1
            count = sum(parts)
            rows = make_rows(
                self._number, ask.layer, ask.x, some, parts, ask.tokens[at : at + count],
                ask.weights[at : at + count], self._wire, part=part, patience_ms=patience,
            )  # fmt: skip
            asked.sizes[self._number] = count * width
            messages.append(self._sending(now, pb.ComputeRequest(rows=rows)))
            at += count
        return messages

    def expected(self, rows: int) -> float:
        """Seconds until it answers for so many rows, as it did lately; 0: it is not known."""
        return self._pace.expected(rows)

    def probe(self, now: float, ask: Ask) -> list[pb.ComputeRequest]:
        """The same as `ask`, now and then, for an answer that nobody waits for."""
        return self.ask(now, ask) if self._pace.age(now, len(ask.tokens)) >= PROBE else []

    def assign(self, now: float, experts: Iterable[int]) -> list[pb.ComputeRequest]:
        """Tell it what to hold, if that is ours to decide."""
        if self._condition != "up" or not self.assigns:
            return []
        return [self._sending(now, pb.ComputeRequest(assign=pb.Assign(experts=sorted(experts))))]

    def ping(self, now: float) -> list[pb.ComputeRequest]:
        """Now and then: asks for a sign of life, where none is owed."""
        if self._condition != "up" or self._waiting_since is not None:
            return []
        return [self._sending(now, pb.ComputeRequest(ping=pb.Ping()))]

    def silent(self, now: float) -> bool:
        """Whether it has given no sign of life for so long that it is to be given up."""
        since = self._waiting_since
        return self._condition != "lost" and since is not None and now - since > LOST

    def take(self, now: float, response: pb.ComputeResponse) -> News:
        """What came by the stream. Raises WireError for what may not come."""
        self._received += response.ByteSize()
        kind = response.WhichOneof("kind")
        if (kind == "welcome") == (self._condition == "up"):
            raise WireError(f"{kind} is not expected here")
        self._waiting_since = now if self._asked is not None else None
        if kind == "welcome":
            if response.welcome.capacity > self._n_keys:
                raise WireError(f"room for {response.welcome.capacity} experts, there are {self._n_keys}")
            self._take_held(response.welcome.held)
            self.capacity = response.welcome.capacity
            self._condition, self.delay, self._error = "up", FIRST_DELAY, ""
            return News(changed=True)
        if kind == "held":
            return News(changed=self._take_held(response.held))
        if kind == "outputs":
            return News(answer=self._put_together(now, response.outputs))
        raise WireError(f"{kind} is not expected here")

    def end(self, why: str) -> tuple[Answer | None, bool]:
        """The stream has ended, or there was none: what it owed, and whether `why` is new."""
        owed = self._asked.over() if self._asked is not None else None
        self._asked = self._waiting_since = None
        self.held, self.capacity, self.assigns = frozenset(), 0, False
        first = self._condition != "lost" or why != self._error
        self._condition, self._error = "lost", why
        self._failures += 1
        self._pace.forget()
        return owed, first

    def next_delay(self) -> float:
        """Seconds until it is tried again."""
        delay, self.delay = self.delay, min(2 * self.delay, LAST_DELAY)
        return delay

    def state(self, now: float) -> PeerState:
        """Of it."""
        since, condition = self._waiting_since, self._condition
        if condition == "up" and since is not None and now - since > LATE:
            condition = "late"
        return PeerState(
            address=self.address,
            condition=condition,
            capacity=self.capacity,
            held=len(self.held),
            decides=self.assigns,
            asked=self._times,
            answers=self._answers,
            late=self._late,
            failures=self._failures,
            sent=self._sent,
            received=self._received,
            answer_counts=tuple(self._answer_counts),
            answer_s=self._answer_s,
            error=self._error,
        )

    def _sending(self, now: float, message: pb.ComputeRequest) -> pb.ComputeRequest:
        if self._waiting_since is None:
            self._waiting_since = now
        self._sent += message.ByteSize()
        return message

    def _put_together(self, now: float, outputs: pb.Outputs) -> Answer | None:
        """What was asked, with all rows, once they are there; without any: it had not what was asked for."""
        asked = self._asked
        if asked is None or outputs.id != next(iter(asked.sizes), None):
            raise WireError("an answer to what was not asked")
        if outputs_checksum(outputs.id, outputs.rows) != outputs.checksum:
            raise WireError("the checksum of an answer is wrong: it was damaged on its way")
        size = asked.sizes[outputs.id]
        if outputs.rows and len(outputs.rows) != size:
            raise WireError(f"an answer of {len(outputs.rows)} bytes, there should be {size}")
        del asked.sizes[outputs.id]
        asked.missing = asked.missing or not outputs.rows
        asked.late = asked.late or outputs.late
        asked.rows.append(outputs.rows)
        if asked.sizes:
            return None
        self._asked = self._waiting_since = None
        if not asked.missing or asked.late:
            self._note_time(now, asked)
        return asked.over()

    def _note_time(self, now: float, asked: _Asked) -> None:
        self._answers += 1
        self._answer_counts[bisect_left(ANSWER_BOUNDS, now - asked.at)] += 1
        self._answer_s += now - asked.at
        self._pace.note(now, len(asked.ask.tokens), max(now - asked.at, 1e-6))
        if now * 1e9 <= asked.ask.deadline:
            self._late_in_a_row = 0
            return
        self._late += 1
        self._late_in_a_row = min(self._late_in_a_row + 1, 16)
        if self._late_in_a_row >= _OFTEN:
            pause = min(_PAUSE * 2 ** (self._late_in_a_row - _OFTEN), _LONGEST_PAUSE)
            self._paused_until = now + pause

    def _take_held(self, held: pb.Held) -> bool:
        """Whether it was news."""
        if len(held.experts) > self._n_keys or max(held.experts, default=0) >= self._n_keys:
            raise WireError(f"experts are held that there are not: there are {self._n_keys}")
        before = self.held, self.assigns
        self.held, self.assigns = frozenset(held.experts), held.decides
        return before != (self.held, self.assigns)


def _patience_ms(deadline: int, now: float) -> int:
    """See Rows. Behind its deadline the own drive is asked, which is expected to take as long once more."""
    left = 2 * (deadline / 1e6 - now * 1e3)
    return max(1, ceil(left)) if left < _LONGEST_PATIENCE else 0
