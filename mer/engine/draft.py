"""Drafts of the next tokens, which a step then verifies."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Protocol

import numpy as np
from attrs import define, frozen
from numpy.typing import NDArray

from mer._ext.lookup import TextIndex
from mer.engine.acceptance import lookup_kind
from mer.engine.scheduler import Chunk, Sequence

if TYPE_CHECKING:
    from mer.engine.runner import Runner


@frozen
class Draft:
    """tokens: what may come next, at least one. kind: how it was made, as mer.engine.acceptance counts."""

    tokens: list[int]
    kind: int


@define
class Watched:
    """A draft that no step verifies: what comes says how right it would have been.

    start: of the text's tokens the first one it guesses. right: so many were right so far.
    """

    tokens: list[int]
    kind: int
    start: int
    right: int = 0


class Drafter(Protocol):
    """Guesses how a text goes on; belongs to one request. NgramDrafter is one."""

    def propose(self, most: int) -> Draft | None:
        """At most so many tokens behind the text as it is now; None: no idea."""


class DraftEngine(Protocol):
    """Guesses how texts go on, with weights of its own; for all requests of a step at once.

    Used by the thread that computes, between steps. An error that it raises ends drafting with it, and
    nothing else. kind: of its drafts, as mer.engine.acceptance counts; name: for people.
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
        now, and further steps are not told of until there is.
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
    """What followed when the text was last as it is now, for as many tokens as can be (prompt lookup).

    It looks at `tokens`, the prompt and the answer, which others append to.
    """

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._index = TextIndex(tokens)
        self._index.find()  # the prompt is looked at here, by whoever asks

    def propose(self, most: int) -> Draft | None:
        start, length = self._index.find()
        if not length or most <= 0:
            return None
        return Draft(self._copy(start, most), lookup_kind(length))

    def _copy(self, start: int, count: int) -> list[int]:
        """From there on; a text that repeats itself goes on with what is copied."""
        tokens, period = self._tokens, len(self._tokens) - start
        if count <= period:
            return tokens[start : start + count]
        return [tokens[start + i % period] for i in range(count)]
