"""Peers by a name: its addresses are looked up again and again, so that machines may come and go."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any, Final

from mer.config import parse_address

_log = logging.getLogger("mer")

# Seconds between two looks at a name. Kubernetes' DNS lets an answer be kept for as long.
INTERVAL: Final = 5.0


def resolve(name: str) -> frozenset[str]:
    """The addresses HOST:PORT of a name HOST:PORT. Raises OSError where there is none, or nobody to ask.

    A machine may have one in IPv4 and another in IPv6, and is not to be reached twice: with both kinds only
    those in IPv4 are taken.
    """
    host, port = parse_address(name)
    found: list[Any] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    old = {f"{where[0]}:{where[1]}" for family, *_, where in found if family == socket.AF_INET}
    return frozenset(old or {f"[{where[0]}]:{where[1]}" for *_, where in found})


class Names:
    """Looks names up on a thread of its own: a name server may take its time."""

    def __init__(self, names: Iterable[str], resolved: Callable[[str, frozenset[str]], None]) -> None:
        """resolved(name, addresses): told on that thread, after every look that gave an answer."""
        self._names, self._resolved = tuple(names), resolved
        self._failing: set[str] = set()
        self._first, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="mer-names", daemon=True)
        self._thread.start()

    def wait_first(self, seconds: float) -> None:
        """Until every name has been looked up once."""
        self._first.wait(seconds)

    def close(self) -> None:
        """No more is told, once a look that is under way is over; that is not waited for."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.is_set():
            for name in self._names:
                self._look(name)
            self._first.set()
            self._closed.wait(INTERVAL)

    def _look(self, name: str) -> None:
        try:
            addresses = resolve(name)
        except (OSError, UnicodeError) as error:  # of those that there are, none is given up for that
            if name not in self._failing:
                _log.warning("peers %s: the name can't be looked up: %s; tried again", name, error)
            self._failing.add(name)
            return
        self._failing.discard(name)
        if not self._closed.is_set():
            self._resolved(name, addresses)
