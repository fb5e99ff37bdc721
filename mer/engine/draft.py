"""Drafts of the next tokens, which a step then verifies."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mer.engine.scheduler import Chunk, Sequence

if TYPE_CHECKING:
    from mer.engine.runner import Runner

# Tokens of context that must have stood there before: the longest that is found is taken.
_SIZES: Final = (5, 3, 2)


@frozen
class Draft:
    """tokens: what may come next, at least one. kind: how it was made, as mer.engine.speculation counts."""

    tokens: list[int]
    kind: int


class Drafter(Protocol):
    """Guesses how a text goes on; belongs to one request. NgramDrafter is one."""

    def propose(self, most: int) -> Draft | None:
        """At most so many tokens behind the text as it is now; None: no idea."""


class DraftEngine(Protocol):
    """Guesses how texts go on, with weights of its own; for all requests of a step at once.

    Used by the thread that computes, between steps. An error that it raises ends drafting with it, and
    nothing else. kind: of its drafts, as mer.engine.speculation counts; name: for people.
    """

    kind: int
    name: str

    def behind(self, sequence: Sequence) -> int | None:
        """Tokens that it has not looked at yet; None: it can't draft for this one, now or ever."""

    def catch_up(self, sequence: Sequence) -> None:
        """Look at some of those, as many as are computed together well."""

    def propose(self, sequences: Collection[Sequence], lengths: list[int]) -> list[list[int]]:
        """Of each, at most so many tokens (at least one is asked for) behind its text as it is now.

        It looks at what it is behind first, which is little.
        """

    def observe(self, chunks: list[Chunk], states: Callable[[bool], NDArray[np.float32]] | None) -> None:
        """These were computed, drafts included, which may turn out wrong; the step is not committed yet.

        states: Runner.states; to be called at once or not at all. None: there is no time to spend on drafts
        now.
        """

    def forget(self, sequence: Sequence) -> None:
        """It is over. Also called for those that were never seen here."""

    def close(self) -> None:
        """Give back what it holds."""


@frozen
class DraftShape:
    """What a draft engine must be able to hold. context: tokens of all requests together, as the KV cache."""

    context: int
    step_tokens: int
    max_running: int
    threads: int


class DraftSource(Protocol):
    """A draft engine that is known, but not loaded yet."""

    def nbytes(self, shape: DraftShape) -> int:
        """Memory that it will take."""

    def load(self, runner: Runner) -> DraftEngine:
        """Beside the main model, whose memory has been divided with `nbytes` in mind."""


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
