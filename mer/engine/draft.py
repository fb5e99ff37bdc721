"""Drafts of the next tokens, which a step then verifies."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Protocol

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mer._ext.acceptance import Acceptance
from mer.engine.scheduler import Chunk, Sequence

if TYPE_CHECKING:
    from mer.engine.runner import Runner


class Drafter(Protocol):
    """Guesses how a text goes on; belongs to one request. See mer._ext.lookup.NgramDrafter, which is one."""

    def look(self, own: Acceptance, everybody: Acceptance) -> int:
        """The kind of what it would draft behind the text as it is now; -1: nothing."""

    def draft(self, most: int) -> list[int]:
        """At most so many tokens of that."""

    def verified(self) -> None:
        """A step verifies them."""


class DraftEngine(Protocol):
    """Guesses how texts go on, with weights of its own; for all requests of a step at once.

    Used by the thread that computes, between steps. An error that it raises ends drafting with it, and
    nothing else. kind: of its drafts, as mer._ext.acceptance counts; name: for people.
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
