"""Which peers an engine has, who holds which expert, and who is to. Pure logic, as in session.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import count
from math import inf
from typing import Final

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mer.cluster.placement import place
from mer.cluster.session import Session

# Experts are placed anew once so many tokens were seen, counted in every layer, and again with twice as many,
# and so on; later whenever so many came.
_FIRST_TOKENS: Final = 4096
_TOKENS: Final = 1 << 18
# Then this share of what there is room for may be exchanged, and what was not used before, up to all of it:
# where heat goes to and fro, no more is read than that.
_MOVES: Final = 0.25


@frozen
class Local:
    """What this machine has: of how many layers, experts of each, hidden size; how many it keeps itself."""

    layers: int
    experts: int
    hidden: int
    kept: int


class Members:
    """Peers have numbers, which are never given twice."""

    def __init__(self, local: Local, addresses: Iterable[str], names: Iterable[str]) -> None:
        """addresses: each of one peer. names: each of any number of them, as `resolved` tells."""
        self._local = local
        self._fixed = tuple(addresses)
        self._named: dict[str, frozenset[str]] = dict.fromkeys(names, frozenset())
        self._numbers = count()
        self._due = True  # to be placed anew
        self._next_tokens = _FIRST_TOKENS
        self._placed: dict[int, frozenset[int]] = {}
        self._moves = inf  # experts that may give way to hotter ones
        self.sessions: dict[int, Session] = {}

    def resolved(self, name: str, addresses: frozenset[str]) -> None:
        """What a name's addresses are now."""
        self._named[name] = addresses

    def exchange(self, addresses: Iterable[str]) -> None:
        """Others in place of the addresses that were given at first."""
        self._fixed = tuple(addresses)

    def wanted(self) -> dict[str, str | None]:
        """The addresses of all peers that there should be, and by which name each was found."""
        found: dict[str, str | None] = dict.fromkeys(self._fixed)
        for name, addresses in self._named.items():
            for address in sorted(addresses):
                found.setdefault(address, name)
        return found

    def reach(self, make: Callable[[str], Session]) -> dict[int, str | None]:
        """Make the sessions that there are not yet: their numbers, and by which name each was found."""
        known = {session.address for session in self.sessions.values()}
        new = {}
        for address, name in self.wanted().items():
            if address not in known:
                index = next(self._numbers)
                self.sessions[index], new[index] = make(address), name
        return new

    def forget(self) -> list[int]:
        """Drop those that their name has no more, once they are lost: while they answer they are used."""
        wanted = self.wanted()
        gone = [i for i, each in self.sessions.items() if each.lost and each.address not in wanted]
        for index in gone:
            del self.sessions[index]
        return gone

    def changed(self) -> tuple[NDArray[np.int32], bool]:
        """A peer has come, gone, or holds something else: `holders` now, and whether to `place`."""
        self._due = self._due or self._room().keys() != self._placed.keys()
        held = {index: session.held for index, session in self.sessions.items()}
        return holders(held, self._local.layers * self._local.experts), self._due

    def place(self, heat: NDArray[np.float32], tokens: int) -> dict[int, frozenset[int]]:
        """What each peer is to be told to hold; empty where nothing has to be said.

        heat, tokens: as RemoteTier tells them.
        """
        if tokens >= self._next_tokens:
            self._due, self._next_tokens = True, tokens + min(tokens, _TOKENS)
            self._moves += _MOVES * sum(self._room().values())
        if not self._due:
            return {}
        self._due = False
        room = self._room()
        held = {index: self._placed.get(index) or self.sessions[index].held for index in room}
        shape = (self._local.layers, self._local.experts)
        self._moves = min(self._moves, sum(room.values()))
        self._placed = place(heat.reshape(shape), self._local.kept, room, held, int(self._moves))
        left = sum(len(keys - self._placed[index]) for index, keys in held.items())
        self._moves = max(self._moves - left, 0.0)
        return dict(self._placed)

    def _room(self) -> dict[int, int]:
        """Of those for whom it is ours to decide."""
        return {i: each.capacity for i, each in self.sessions.items() if each.capacity and each.assigns}


def holders(held: Mapping[int, frozenset[int]], n_keys: int) -> NDArray[np.int32]:
    """i32 [n_keys]: a peer that holds each expert, -1: none; of several each has its share."""
    if not held:
        return np.full(n_keys, -1, np.int32)
    there = np.zeros((len(held), n_keys), bool)
    for row, keys in zip(there, held.values(), strict=True):
        row[list(keys)] = True
    count = there.sum(axis=0)
    chosen = np.arange(n_keys) % np.maximum(count, 1) + 1
    found = np.argmax((np.cumsum(there, axis=0) == chosen) & there, axis=0)
    return np.where(count > 0, np.array(list(held))[found], -1).astype(np.int32)
