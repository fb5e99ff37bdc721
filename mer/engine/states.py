"""Images of recurrent states: who holds which, and which of them others may go on from."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import Factory, define

from mer.engine.blocks import BlockPool

# For each sequence that runs: its state, the one that a step makes of it, and those at the ends of its prompt
# and of its answer, to go on from later.
IMAGES = 4
# Blocks that a prompt has in common with earlier ones, from which on a snapshot is worth a step of its own.
WORTHWHILE = 4


@define(eq=False)
class Images:
    """Numbers of the images of one sequence; each list has one or none.

    now: its state behind the tokens that are computed; none: there are no such tokens. next: for the state
    behind the step under way. kept: for the state behind its first `kept_at` tokens, which the step under way
    passes. last: the key of its latest snapshot while it answers. branch: how many of its tokens begin
    earlier prompts, too, none of which left a snapshot there; 0: none or few.
    """

    now: list[int] = Factory(list)
    next: list[int] = Factory(list)
    kept: list[int] = Factory(list)
    kept_at: int = 0
    last: bytes | None = None
    branch: int = 0

    def move(self, start: int) -> tuple[int, int, int, int]:
        """A row of mer.model.batch's `states`, for a step that begins behind `start` tokens."""
        kept = self.kept[0] if self.kept else -1
        return self.now[0] if self.now else -1, self.next[0], kept, self.kept_at - start if self.kept else 0


class StatePool:
    """The images of all sequences.

    An image with a key is a snapshot: the state behind the block with that key (see mer.engine.blocks) and
    all before it. Nobody writes to it any more, and when nobody holds it, it stays until its memory is
    needed. A step reads `now` and writes `next`, so that after an error it can be computed again.
    """

    def __init__(self, n_images: int) -> None:
        self.pool = BlockPool(n_images)

    def __bool__(self) -> bool:
        """Whether the model has such states at all."""
        return self.pool.n_blocks > 0

    def match(self, keys: Sequence[bytes], count: int) -> int:
        """Up to which of the first `count` keys there is a snapshot: how many, 0 for none."""
        return next((n for n in range(count, 0, -1) if keys[n - 1] in self.pool), 0)

    def resume(self, images: Images, key: bytes) -> None:
        """Go on from the snapshot with this key, which is there."""
        self.pool.release(images.now)
        self.pool.share(images.now, [key])

    def reserve(self, images: Images) -> bool:
        """Have an image for the next state; False if there is none."""
        images.next += [] if images.next else self.pool.spare(1)
        return bool(images.next)

    def keep(self, images: Images, at: int) -> None:
        """Have the step keep the state behind the first `at` tokens, if there is an image for it."""
        if not images.kept:
            images.kept += self.pool.spare(1)
        images.kept_at = at

    def commit(self, images: Images, kept_key: bytes | None) -> None:
        """The step has been computed. kept_key: of the block before `kept_at`."""
        self.pool.release(images.now)
        images.now, images.next = images.next, images.now
        if images.kept and kept_key is not None:
            self.pool.publish(images.kept, 0, kept_key)
        self.pool.release(images.kept)

    def snapshot(self, images: Images, key: bytes, *, answering: bool) -> None:
        """What the sequence has now is behind the block with this key.

        An answer's snapshots, one for each of its blocks, replace each other: else they would push out all
        others.
        """
        if answering:
            if images.last is not None:
                self.pool.forget(images.last)
            images.last = None if key in self.pool else key
        self.pool.publish(images.now, 0, key)

    def release(self, images: Images) -> None:
        """The sequence gives up its state."""
        for held in (images.now, images.next, images.kept):
            self.pool.release(held)
