"""One peer of an engine: the stream to it, what it has been asked, and what became of that."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Final

import grpc
import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from mer.cluster import security
from mer.cluster.identity import Identity
from mer.cluster.state import Condition, PeerState
from mer.cluster.wire import WireError, cut, make_rows, outputs_checksum
from mer.v1 import expert_pb2 as pb
from mer.v1 import expert_pb2_grpc as rpc

_log = logging.getLogger("mer")

# After a failure it is tried again: seconds, doubled with each one that follows.
FIRST_DELAY: Final = 0.25
_LAST_DELAY: Final = 30.0
# Who has not answered for so long is late, and lost: seconds.
_LATE: Final = 1.0
LOST: Final = 20.0
# Who was late so many times in a row is left alone for a while: seconds, doubled with each time that follows.
_OFTEN: Final = 3
_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 5.0

_REFUSED: Final = (
    grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED,
)  # fmt: skip


@define(eq=False)
class _Asked:
    """What one layer wants of a peer, in some messages; their answers come in order."""

    turn: int
    deadline: int
    experts: list[int]
    sizes: dict[int, int]  # bytes that each message's answer has, by its number
    rows: list[bytes] = field(factory=list)


class Peer:
    """Threads: a step asks, one of its own reads what comes, a third calls `check` now and then."""

    def __init__(
        self,
        index: int,
        address: str,
        identity: Identity,
        channel: Callable[[], grpc.Channel],
        token: str,
        n_keys: int,
        *,
        answered: Callable[[int, int, list[int], bytes], None],
        lost: Callable[[int], None],
        changed: Callable[[], None],
    ) -> None:
        """answered(turn, index, experts, rows), lost(index), changed(): told on any thread."""
        self.index, self.address = index, address
        self._identity, self._channel, self._token, self._n_keys = identity, channel, token, n_keys
        self._answered, self._lost, self._changed = answered, lost, changed
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._outbox: SimpleQueue[pb.ComputeRequest | None] = SimpleQueue()
        self._call: grpc.Call | None = None
        self._condition: Condition = "connecting"
        self._asked: _Asked | None = None
        self._number = 0
        self._waiting_since: float | None = None  # for an answer of any kind
        self._given_up = False
        self._late_in_a_row, self._paused_until = 0, 0.0
        self._tried = threading.Event()
        self._delay = FIRST_DELAY
        self.capacity, self.assigns = 0, False
        self.held: frozenset[int] = frozenset()
        self._answers = self._late = self._failures = self._sent = self._received = 0
        self._error = ""
        self._thread = threading.Thread(target=self._run, name=f"mer-peer-{index}", daemon=True)
        self._thread.start()

    def ask(
        self,
        turn: int,
        deadline: int,
        layer: int,
        x: NDArray[np.float32],
        experts: list[int],
        counts: list[int],
        tokens: NDArray[np.int32],
    ) -> bool:
        """See mer._ext.remote. False also while it owes an answer: so nothing piles up at a slow one."""
        with self._lock:
            if self._condition != "up" or self._asked is not None or time.monotonic() < self._paused_until:
                return False
            asked = _Asked(turn, deadline, experts, {})
            messages, at = [], 0
            for some, parts in cut(experts, counts):
                self._number += 1
                count = sum(parts)
                rows = make_rows(self._number, layer, x, some, parts, tokens[at : at + count])
                asked.sizes[self._number] = count * x.shape[1] * 4
                messages.append(pb.ComputeRequest(rows=rows))
                at += count
            self._asked = asked
            for message in messages:
                self._send(message)
            return True

    def assign(self, experts: Iterable[int]) -> None:
        """Tell it what to hold."""
        with self._lock:
            if self._condition == "up" and self.assigns:
                self._send(pb.ComputeRequest(assign=pb.Assign(experts=sorted(experts))))

    def check(self) -> None:
        """Now and then: asks for a sign of life; gives up who gives none."""
        with self._lock:
            now = time.monotonic()
            since = self._waiting_since
            if (
                self._condition != "lost"
                and since is not None
                and now - since > LOST
                and self._call is not None
            ):
                self._given_up = True
                self._call.cancel()
            elif self._condition == "up" and since is None:
                self._send(pb.ComputeRequest(ping=pb.Ping()))

    def state(self) -> PeerState:
        """Now."""
        with self._lock:
            since, condition = self._waiting_since, self._condition
            if condition == "up" and since is not None and time.monotonic() - since > _LATE:
                condition = "late"
            return PeerState(
                address=self.address,
                condition=condition,
                capacity=self.capacity,
                held=len(self.held),
                answers=self._answers,
                late=self._late,
                failures=self._failures,
                sent=self._sent,
                received=self._received,
                error=self._error,
            )

    def wait_tried(self, seconds: float) -> None:
        """Until it has been reached or not."""
        self._tried.wait(seconds)

    def close(self) -> None:
        """Break off."""
        self._closed.set()
        with self._lock:
            self._outbox.put(None)
            if self._call is not None:
                self._call.cancel()
        self._thread.join()

    def _send(self, message: pb.ComputeRequest) -> None:
        if self._waiting_since is None:
            self._waiting_since = time.monotonic()
        self._sent += message.ByteSize()
        self._outbox.put(message)

    def _run(self) -> None:
        while not self._closed.is_set():
            with self._channel() as channel:
                try:
                    self._talk(channel)
                    why = "it has closed the stream"
                except grpc.RpcError as error:
                    why = f"no answer for {LOST:.0f} s" if self._given_up else _words(error)
                except WireError as error:
                    why = str(error)
                except Exception as error:
                    _log.exception("a peer's stream ended")
                    why = repr(error)
            self._end(why)
            self._closed.wait(self._delay)
            self._delay = min(2 * self._delay, _LAST_DELAY)

    def _talk(self, channel: grpc.Channel) -> None:
        identity = self._identity
        hello = pb.Hello(
            protocol=identity.protocol,
            version=identity.version,
            model=identity.model,
            arithmetic=identity.arithmetic,
            probe=identity.probe,
        )
        with self._lock:
            if self._closed.is_set():
                return
            outbox = self._outbox = SimpleQueue()
            self._given_up = False
            self._send(pb.ComputeRequest(hello=hello))
            metadata = ((security.METADATA, f"Bearer {self._token}"),) if self._token else None
            stream = rpc.ExpertStub(channel).Compute(iter(outbox.get, None), metadata=metadata)
            self._call = stream
        for response in stream:
            self._take(response)

    def _take(self, response: pb.ComputeResponse) -> None:
        kind = response.WhichOneof("kind")
        answered, changed = None, False
        with self._lock:
            self._received += response.ByteSize()
            self._waiting_since = time.monotonic() if self._asked is not None else None
            if kind == "welcome" and self._condition != "up":
                self._condition, self._delay, self._error = "up", FIRST_DELAY, ""
                self.capacity = response.welcome.capacity
                self._take_held(response.welcome.held)
                changed = True
            elif kind == "held":
                changed = self._take_held(response.held)
            elif kind == "outputs":
                answered = self._put_together(response.outputs)
            else:
                raise WireError(f"{kind} is not expected here")
        if kind == "welcome":
            _log.info("peer %s computes experts: room for %d", self.address, self.capacity)
            self._tried.set()
        if changed:
            self._changed()
        if answered is not None:
            if answered.rows:
                self._answered(answered.turn, self.index, answered.experts, b"".join(answered.rows))
            else:
                self._lost(self.index)

    def _put_together(self, outputs: pb.Outputs) -> _Asked | None:
        """What was asked, with all rows, once they are there; without any: it had not what was asked for."""
        asked = self._asked
        if asked is None or outputs.id != next(iter(asked.sizes), None):
            raise WireError("an answer to what was not asked")
        if outputs_checksum(outputs.id, outputs.rows) != outputs.checksum:
            raise WireError("the checksum of an answer is wrong: it was damaged on its way")
        size = asked.sizes.pop(outputs.id)
        if outputs.rows and len(outputs.rows) != size:
            raise WireError(f"an answer of {len(outputs.rows)} bytes, there should be {size}")
        missing = bool(asked.rows and not asked.rows[-1]) or not outputs.rows
        asked.rows.append(b"" if missing else outputs.rows)
        if asked.sizes:
            return None
        self._asked = self._waiting_since = None
        if missing:
            asked.rows = []
            return asked
        self._answers += 1
        if time.monotonic_ns() > asked.deadline:
            self._late += 1
            self._late_in_a_row = min(self._late_in_a_row + 1, 16)
            if self._late_in_a_row >= _OFTEN:
                pause = min(_PAUSE * 2 ** (self._late_in_a_row - _OFTEN), _LONGEST_PAUSE)
                self._paused_until = time.monotonic() + pause
        else:
            self._late_in_a_row = 0
        return asked

    def _take_held(self, held: pb.Held) -> bool:
        """Whether it was news."""
        if held.experts and max(held.experts) >= self._n_keys:
            raise WireError(f"expert {max(held.experts)} is held, and there are {self._n_keys}")
        before = self.held, self.assigns
        self.held, self.assigns = frozenset(held.experts), held.decides
        return before != (self.held, self.assigns)

    def _end(self, why: str) -> None:
        with self._lock:
            self._call = self._asked = self._waiting_since = None
            self._outbox.put(None)
            self.held, self.capacity = frozenset(), 0
            first = self._condition != "lost" or why != self._error
            self._condition = "lost"
            self._failures += 1
            self._error = why
        if not self._closed.is_set():
            if first:
                _log.warning("peer %s is lost: %s; the own drive has its experts", self.address, why)
            self._lost(self.index)
            self._changed()
        self._tried.set()


def _words(error: grpc.RpcError) -> str:
    code, details = error.code(), error.details()
    if code in _REFUSED:
        return f"it refuses: {details}"
    return f"{code.name}: {details}"
