"""Who is computed in the next step: pure logic, no input or output, no clock."""

from __future__ import annotations

from collections import deque

from attrs import Factory, define, frozen

from mer.model.kv import BLOCK


@define(eq=False)
class Sequence:
    """What the scheduler knows of a request. tokens: the prompt, then the answer so far.

    computed: leading tokens whose keys and values are in `blocks`.
    """

    tokens: list[int]
    computed: int = 0
    blocks: list[int] = Factory(list)

    @property
    def pending(self) -> int:
        """Tokens still to be computed: 1 while decoding."""
        return len(self.tokens) - self.computed


@frozen(eq=False)
class Chunk:
    """The next `count` tokens of a sequence, to be computed in one step."""

    sequence: Sequence
    count: int

    @property
    def last(self) -> bool:
        """Whether the token after this chunk is not known yet: its logits are wanted."""
        return self.count == self.sequence.pending


def blocks_for(tokens: int) -> int:
    """KV blocks that this many tokens take."""
    return -(-tokens // BLOCK)


class BlockPool:
    """KV blocks by number; who holds which is decided here alone."""

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self._free = list(range(n_blocks - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def extend(self, sequence: Sequence, tokens: int) -> bool:
        """Give `sequence` blocks for `tokens` tokens in all; False, and nothing, when there are too few."""
        missing = blocks_for(tokens) - len(sequence.blocks)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            sequence.blocks.append(self._free.pop())
        return True

    def release(self, sequence: Sequence) -> None:
        self._free += reversed(sequence.blocks)
        sequence.blocks.clear()


class Scheduler:
    """Forms steps: one token of each running sequence first, then chunks of prompts, oldest first.

    A prompt is admitted when there are blocks for all of it. When a running sequence needs a block and there
    is none, the sequence that came last gives up its own and is computed again later: the same bytes come
    out, since no result depends on how a prompt was cut. Every sequence must fit into n_blocks by itself.
    """

    def __init__(self, *, n_blocks: int, step_tokens: int, max_running: int) -> None:
        self.pool = BlockPool(n_blocks)
        self.step_tokens = step_tokens
        self.max_running = min(max_running, step_tokens)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It has ended, or nobody wants it any more."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.pool.release(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step; empty only when there is nothing to do. Between two calls the step is committed."""
        preempted = self.preemptions
        chunks: list[Chunk] = []
        room = self.step_tokens
        for sequence in list(self.running):
            if room and sequence.pending == 1 and self._grow(sequence):
                chunks.append(Chunk(sequence, 1))
                room -= 1
        for sequence in self.running:
            if room and sequence.pending > 1:
                room -= self._chunk(chunks, sequence, room)
        if self.preemptions == preempted:
            while room and self.waiting and len(self.running) < self.max_running:
                sequence = self.waiting[0]
                if not self.pool.extend(sequence, len(sequence.tokens)):
                    break
                self.running.append(self.waiting.popleft())
                room -= self._chunk(chunks, sequence, room)
        return chunks

    def commit(self, chunks: list[Chunk]) -> None:
        """The step has been computed."""
        for chunk in chunks:
            chunk.sequence.computed += chunk.count

    @staticmethod
    def _chunk(chunks: list[Chunk], sequence: Sequence, room: int) -> int:
        count = min(room, sequence.pending)
        chunks.append(Chunk(sequence, count))
        return count

    def _grow(self, sequence: Sequence) -> bool:
        """Blocks for its next token, taken from the last sequence if need be; False: it was the last."""
        while sequence.blocks and not self.pool.extend(sequence, len(sequence.tokens)):
            victim = self.running.pop()
            self.pool.release(victim)
            victim.computed = 0
            self.waiting.appendleft(victim)
            self.preemptions += 1
        return bool(sequence.blocks)
