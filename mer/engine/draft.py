"""Drafts of the next tokens, which a step then verifies."""

from __future__ import annotations

from typing import Final, Protocol

from attrs import frozen

# Tokens of context that must have stood there before: the longest that is found is taken.
_SIZES: Final = (5, 3, 2)


@frozen
class Draft:
    """tokens: what may come next, at least one. kind: which of the drafter's guesses; 0 is its best."""

    tokens: list[int]
    kind: int


class Drafter(Protocol):
    """Guesses how a text goes on; belongs to one request. NgramDrafter is one."""

    def propose(self, most: int) -> Draft | None:
        """At most so many tokens behind the text as it is now; None: no idea."""


class NgramDrafter:
    """What followed when the last few tokens stood in this text before (prompt lookup).

    It looks at `tokens`, the prompt and the answer, which others append to.
    """

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        # By n-gram, where its latest continuation begins.
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in _SIZES]
        self._known = 0
        self._learn()

    def propose(self, most: int) -> Draft | None:
        self._learn()
        tokens = self._tokens
        for kind, (size, after) in enumerate(zip(_SIZES, self._after, strict=True)):
            start = after.get(tuple(tokens[-size:]))
            if start is not None and most > 0:
                return Draft(self._copy(start, most), kind)
        return None

    def _copy(self, start: int, count: int) -> list[int]:
        """From there on; a text that repeats itself goes on with what is copied."""
        tokens, period = self._tokens, len(self._tokens) - start
        return [tokens[start + i % period] for i in range(count)]

    def _learn(self) -> None:
        tokens = self._tokens
        for end in range(self._known, len(tokens)):
            for size, after in zip(_SIZES, self._after, strict=True):
                if end >= size:
                    after[tuple(tokens[end - size : end])] = end
        self._known = len(tokens)
