"""One peer of an engine: the streams to it, one after the other, and the thread that reads them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Final

import grpc

from mer._ext.remote import Ask
from mer.cluster import security, session
from mer.cluster.session import Answer, Session
from mer.cluster.state import PeerState
from mer.cluster.wire import WireError
from mer.v1 import expert_pb2 as pb
from mer.v1 import expert_pb2_grpc as rpc

_log = logging.getLogger("mer")

_REFUSED: Final = (
    grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED,
)  # fmt: skip

# Characters of what a peer says of an error.
_LONGEST: Final = 400


class Peer:
    """Threads: a step asks, one of its own reads what comes, a third calls `check` now and then."""

    def __init__(
        self,
        made: Session,
        channel: Callable[[], grpc.Channel],
        token: str,
        *,
        answered: Callable[[Answer], None],
        changed: Callable[[], None],
    ) -> None:
        """answered(answer), changed(): told on any thread."""
        self._session, self._channel, self._token = made, channel, token
        self._answered, self._changed = answered, changed
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._outbox: SimpleQueue[pb.ComputeRequest | None] = SimpleQueue()
        self._call: grpc.Call | None = None
        self._given_up = False
        self._tried = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"mer-peer-{made.address}", daemon=True)

    def start(self) -> None:
        """Reach for it."""
        self._thread.start()

    def ask(self, ask: Ask) -> bool:
        """See mer._ext.remote."""
        with self._lock:
            return self._send(self._session.ask(time.monotonic(), ask))

    def expected(self, rows: int) -> float:
        """See Session."""
        with self._lock:
            return self._session.expected(rows)

    def probe(self, ask: Ask) -> None:
        """See Session."""
        with self._lock:
            self._send(self._session.probe(time.monotonic(), ask))

    def assign(self, experts: Iterable[int]) -> None:
        """Tell it what to hold."""
        with self._lock:
            self._send(self._session.assign(time.monotonic(), experts))

    def check(self) -> None:
        """Now and then: asks for a sign of life; gives up who gives none."""
        with self._lock:
            now = time.monotonic()
            if self._session.silent(now) and self._call is not None:
                self._given_up = True
                self._call.cancel()
            self._send(self._session.ping(now))

    def state(self) -> PeerState:
        """Now."""
        with self._lock:
            return self._session.state(time.monotonic())

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

    def _send(self, messages: list[pb.ComputeRequest]) -> bool:
        for message in messages:
            self._outbox.put(message)
        return bool(messages)

    def _run(self) -> None:
        while not self._closed.is_set():
            with self._channel() as channel:
                try:
                    self._talk(channel)
                    why = "it has closed the stream"
                except grpc.RpcError as error:
                    why = f"no answer for {session.LOST:.0f} s" if self._given_up else _words(error)
                    closed = "Socket closed" in why or "Connection reset" in why
                    if closed and not self._session.capacity:
                        # All that TLS tells a client whose certificate, or want of one, is not accepted.
                        why += " (does it want a certificate of its CA? --peer-cert, --peer-key)"
                except WireError as error:
                    why = str(error)
                except Exception as error:
                    _log.exception("a peer's stream ended")
                    why = repr(error)
            self._closed.wait(self._end(why))

    def _talk(self, channel: grpc.Channel) -> None:
        with self._lock:
            if self._closed.is_set():
                return
            outbox = self._outbox = SimpleQueue()
            self._given_up = False
            outbox.put(self._session.begin(time.monotonic()))
            metadata = ((security.METADATA, f"Bearer {self._token}"),) if self._token else None
            stream = rpc.ExpertStub(channel).Compute(iter(outbox.get, None), metadata=metadata)
            self._call = stream
        for response in stream:
            with self._lock:
                news = self._session.take(time.monotonic(), response)
            self._tried.set()
            if response.HasField("welcome"):
                _log.info(
                    "peer %s computes experts: room for %d", self._session.address, self._session.capacity
                )
            if news.changed:
                self._changed()
            if news.answer is not None:
                self._answered(news.answer)

    def _end(self, why: str) -> float:
        """Returns how many seconds it is left alone."""
        with self._lock:
            self._call = None
            self._outbox.put(None)
            owed, first = self._session.end(why)
            delay = self._session.next_delay()
        if owed is not None:  # also when closed: a step may have asked just before
            self._answered(owed)
        if not self._closed.is_set():
            if first:
                _log.warning("peer %s is lost: %s; the own drive has its experts", self._session.address, why)
            self._changed()
        self._tried.set()
        return delay


def _words(error: grpc.RpcError) -> str:
    code, details = error.code(), error.details() or ""
    # What comes from elsewhere is written to logs and terminals.
    details = "".join(c if c.isprintable() else "?" for c in details[:_LONGEST])
    if code in _REFUSED:
        return f"it refuses: {details}"
    return f"{code.name}: {details}"
