"""How often drafted tokens are right: by kind of draft, and by their position in it."""

from __future__ import annotations

from typing import Final

MOST_DRAFTED: Final = 16  # tokens of one request in one step

# Kinds of drafts: prompt lookup has one for each length of what stood there before, the longest is 0.
_LENGTHS: Final = (16, 8, 5, 3, 2)
# Of matches of 0, 1, ... tokens; the shortest that count have two.
_KIND_OF: Final = tuple(sum(length < least for least in _LENGTHS) for length in range(_LENGTHS[0] + 1))
LOOKUPS: Final = len(_LENGTHS)
DRAFT_MODEL: Final = LOOKUPS
TIED: Final = LOOKUPS + 1

_FIRST: Final = (0.9, 0.8, 0.7, 0.5, 0.4, 0.7, 0.7)  # what is thought of a first token, by kind
_MEMORY: Final = 0.97  # of what is known of a position, what is left after one more token there
_BELIEF: Final = 4.0  # tokens that a guess is worth
_HOPELESS: Final = 0.03  # further tokens are not thought of


def lookup_kind(length: int) -> int:
    """Of a draft behind so many tokens, at least two, that stood there before."""
    return _KIND_OF[min(length, _LENGTHS[0])]


class Acceptance:
    """What became of drafts, of one request or of all."""

    def __init__(self) -> None:
        # By kind, of each position how many tokens were tried and how many right, where those before were.
        self._seen: dict[int, tuple[list[float], list[float]]] = {}

    def note(self, kind: int, position: int, right: bool) -> None:
        """A drafted token behind `position` right ones was right, or wrong."""
        if kind not in self._seen:
            self._seen[kind] = [0.0] * MOST_DRAFTED, [0.0] * MOST_DRAFTED
        tried, rights = self._seen[kind]
        tried[position] = tried[position] * _MEMORY + 1.0
        rights[position] = rights[position] * _MEMORY + right

    def chances(self, kind: int, everybody: Acceptance) -> tuple[float, ...]:
        """That a draft of this kind is right up to its first, second, ... token; the hopeless ones left out.

        A request's own experience counts beside that of all, and where there is none at a position yet, it
        is thought to be as the one before.
        """
        tried, rights = self._seen.get(kind, _NOTHING)
        all_tried, all_rights = everybody._seen.get(kind, _NOTHING)
        found: list[float] = []
        chance, rate = 1.0, _FIRST[kind]
        for position in range(MOST_DRAFTED):
            rate = (all_rights[position] + _BELIEF * rate) / (all_tried[position] + _BELIEF)
            chance *= (rights[position] + _BELIEF * rate) / (tried[position] + _BELIEF)
            if chance < _HOPELESS:
                break
            found.append(chance)
        return tuple(found)


_NOTHING: Final = ([0.0] * MOST_DRAFTED, [0.0] * MOST_DRAFTED)
