"""Engines that are at a shard: which of them decides what it holds. Pure logic, but for a lock."""

from __future__ import annotations

import threading
from itertools import count

from attrs import define, field


@define(eq=False)
class Guests:
    """One for each stream; an engine whose connection broke may have two until the old one is found out.

    The least engine decides, by its last stream: the same one at every shard that both reach, or two engines
    would fill two shards with the same experts.
    """

    _engines: dict[int, bytes] = field(factory=dict)
    _numbers: count[int] = field(factory=count)
    _lock: threading.Lock = field(factory=threading.Lock)

    def come(self, engine: bytes) -> int:
        """The number of its stream."""
        with self._lock:
            stream = next(self._numbers)
            self._engines[stream] = engine
            return stream

    def leave(self, stream: int) -> None:
        """The stream has ended."""
        with self._lock:
            del self._engines[stream]

    def decides(self, stream: int) -> bool:
        """Whether this one says what is held."""
        with self._lock:
            return stream == min(self._engines, key=lambda each: (self._engines[each], -each))
