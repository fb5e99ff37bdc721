"""The tied draft engine: a draft head (mer.model.draft_head) beside the model whose states it reads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from typing import Final

import numpy as np
from attrs import define, frozen
from numpy.typing import NDArray

from mer._ext.acceptance import MOST_DRAFTED, TIED
from mer._ext.cache import ExpertCache
from mer._ext.kernels import Kernels
from mer._ext.moe import ExpertStreamer, scratch_bytes
from mer._ext.uring import Reader
from mer.config import EngineConfig
from mer.engine.draft import DraftShape
from mer.engine.runner import Runner
from mer.engine.scheduler import Chunk, Sequence
from mer.model.draft_forward import DraftForward
from mer.model.draft_head import Head, open_head
from mer.model.families import Architecture, load_head
from mer.model.kv import BLOCK
from mer.streaming.experts import ExpertTables, expert_tables
from mer.weights.checkpoint import Checkpoint

# States of a sequence that are kept until a draft is wanted: of a prompt the head sees so much.
_RECENT: Final = 32
_TOKENS_OF_EXPERTS: Final = 4  # so many tokens' experts are kept, where the head's layer has experts
_STEP: Final = 256  # most tokens of one of its steps, unless there are more sequences


@frozen
class TiedSource:
    """A head that is known, but not loaded. row_bytes: of a row of the main model's output head.

    tables: where its layer has experts. They have a small cache of their own: what drafts want must not push
    out what the model wants.
    """

    head: Head
    row_bytes: int
    config: EngineConfig
    tables: ExpertTables | None = None

    def nbytes(self, shape: DraftShape) -> int:
        """Memory that it will take."""
        tokens = _step_tokens(shape)
        experts = 0
        if self.tables is not None:
            t, top_k = self.tables, self.head.spec.top_k
            experts = self._slots * t.slot_bytes + scratch_bytes(t.layers, t.reads, top_k, tokens)
            experts += t.total * (t.n_experts + 64)  # what the cache's policy knows
        of_sequence = _RECENT * self.head.state_width * 4 + _table_columns(shape.context) * 4
        return (
            experts
            + shape.max_running * of_sequence
            + DraftForward.nbytes(
                self.head,
                self.row_bytes,
                n_blocks=shape.max_running * _ring(self.head),
                max_tokens=tokens,
                max_rows=shape.max_running,
                n_threads=shape.threads,
            )
        )

    def load(self, runner: Runner) -> TiedEngine:
        """Raises CheckpointError where the head is another model's, DeviceReadError."""
        shape, kernels = runner.budget.draft_shape, Kernels()
        config, streamer = self.config, None
        reader = Reader(
            self.head.checkpoint.files, backend=config.io_backend, queue_depth=runner.reader.queue_depth
        )
        try:
            if self.tables is not None:
                t = self.tables
                cache = ExpertCache(
                    t.total, self._slots, t.slot_bytes, policy=config.cache_policy, n_layers=1
                )
                streamer = ExpertStreamer(
                    cache, reader, kernels, runner.pool, t.layers, t.reads, t.matrices,
                    self.head.spec.top_k, _step_tokens(shape),
                )  # fmt: skip
            forward = DraftForward(
                self.head,
                runner.dense,
                reader,
                streamer,
                runner.pool,
                kernels,
                n_blocks=shape.max_running * _ring(self.head),
                max_tokens=_step_tokens(shape),
                max_rows=shape.max_running,
            )
        except BaseException:
            reader.close()
            raise
        return TiedEngine(forward, shape, _ring(self.head), reader, self.head.state_width)

    @property
    def _slots(self) -> int:
        """Of the experts' cache."""
        assert self.tables is not None
        return min(self.tables.total, _TOKENS_OF_EXPERTS * self.head.spec.top_k)


def find_head(checkpoint: Checkpoint, architecture: Architecture, config: EngineConfig) -> TiedSource | None:
    """The draft head of a model: the one that is asked for, or what lies in its directory, or its own.

    Raises CheckpointError or UnsupportedModelError for one that can't be used.
    """
    output = checkpoint.tensors[architecture.dense["head"]]
    row_bytes = output.format.row_bytes(output.cols)
    beside = checkpoint.path / "draft"
    path = config.draft_head or (beside if (beside / "config.json").exists() else None)
    if path is not None:
        return TiedSource(open_head(path, architecture.spec), row_bytes, config)
    own = load_head(checkpoint, architecture)
    if own is None:
        return None
    tables = expert_tables(own.experts, checkpoint.path)
    return TiedSource(Head(checkpoint, own), row_bytes, config, tables if own.experts else None)


def _step_tokens(shape: DraftShape) -> int:
    return max(shape.max_running, min(_STEP, shape.max_running * _RECENT))


def _ring(head: Head) -> int:
    """Blocks of a sequence, which it takes in turn: what a token sees, and what is written meanwhile."""
    window = head.spec.layers[0].window
    assert window is not None
    return -(-(window + _RECENT + MOST_DRAFTED) // BLOCK) + 1


def _table_columns(context: int) -> int:
    return (context + MOST_DRAFTED) // BLOCK + 1


@define
class _Text:
    """What is known of a sequence. Positions are the sequence's; the head counts them from `origin`.

    Keys and values of origin .. done - 1 are there; of done .. done + count - 1 the states are, in the first
    rows of its slot.
    """

    slot: int
    origin: int = 0
    done: int = 0
    count: int = 0


class TiedEngine:
    """Drafts with a head. The state at a position, with the token behind it, gives the one behind that.

    A sequence has its own few blocks, so nothing hangs on which blocks of the main model's it has: text that
    the prefix cache had is not seen, and no more of a prompt than its end.
    """

    kind = TIED
    name = "the draft head"

    def __init__(
        self, forward: DraftForward, shape: DraftShape, ring: int, reader: Reader, state_width: int
    ) -> None:
        self._forward = forward
        self._reader = reader
        self._streams = forward.spec.streams is not None
        self._step = _step_tokens(shape)
        self._texts: dict[Sequence, _Text] = {}  # the one that was seen longest ago is the first
        self._free = list(range(shape.max_running))
        self._rows = np.zeros((shape.max_running, _RECENT, state_width), np.float32)
        turns = np.arange(_table_columns(shape.context), dtype=np.int32) % ring
        self._tables = np.arange(shape.max_running, dtype=np.int32)[:, None] * ring + turns

    def behind(self, sequence: Sequence) -> int | None:
        """None where no state before its last token is known."""
        text = self._texts.get(sequence)
        known = self._known(sequence, text) if text is not None else 0
        return known if known > 0 else None

    def catch_up(self, sequence: Sequence) -> None:
        """It is never behind by so much."""

    def propose(self, sequences: Collection[Sequence], lengths: list[int]) -> list[list[int]]:
        """See DraftEngine. Each token is the likeliest one."""
        found: list[list[int]] = [[] for _ in sequences]
        ready = [
            (sequence, text, tokens, length)
            for sequence, tokens, length in zip(sequences, found, lengths, strict=True)
            if (text := self._texts.get(sequence)) is not None and self._known(sequence, text) > 0
        ]
        if not ready:
            return found
        drafted, states = self._look([(sequence, text) for sequence, text, *_ in ready])
        slots = [text.slot for _, text, *_ in ready]
        positions = np.array([text.done - text.origin for _, text, *_ in ready], np.int32)
        columns = (int(positions.max()) + max(lengths)) // BLOCK + 1
        tables, ends = self._tables[slots, :columns], np.arange(len(ready) + 1, dtype=np.int32)
        for depth in range(1, max(lengths) + 1):
            for (*_, tokens, _), token in zip(ready, drafted.tolist(), strict=True):
                tokens.append(token)
            kept = [i for i, (*_, length) in enumerate(ready) if length > depth]
            if not kept:
                break
            if len(kept) < len(ready):
                ready = [ready[i] for i in kept]
                drafted, states, positions = drafted[kept], states[kept], positions[kept]
                tables, ends = tables[kept], ends[: len(kept) + 1]
            drafted = self._run(drafted, states, positions, ends, tables)
            states = self._forward.states()
            positions += 1
        return found

    def _look(self, known: list[tuple[Sequence, _Text]]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """At all states that are known: the first token of each draft, i32 [S], and the states to go on from.

        f32 [S, width of a state].
        """
        found: list[NDArray[np.int32]] = []
        left: list[NDArray[np.float32]] = []
        at = 0
        while at < len(known):
            counts: list[int] = []
            tokens: list[int] = []
            rows: list[NDArray[np.float32]] = []
            positions: list[int] = []
            for sequence, text in known[at:]:
                count, start = self._known(sequence, text), text.done - text.origin
                if len(tokens) + count > self._step:
                    break
                counts.append(count)
                tokens += sequence.tokens[text.done + 1 : text.done + 1 + count]
                rows.append(self._rows[text.slot, :count])
                positions += range(start, start + count)
            texts = [text for _, text in known[at : at + len(counts)]]
            offsets = np.array([0, *itertools.accumulate(counts)], np.int32)
            found.append(
                self._run(
                    np.array(tokens, np.int32),
                    np.concatenate(rows),
                    np.array(positions, np.int32),
                    offsets,
                    self._tables[[text.slot for text in texts], : max(positions) // BLOCK + 1],
                )
            )
            left.append(self._forward.states()[offsets[1:] - 1])
            for text, count in zip(texts, counts, strict=True):
                text.done, text.count = text.done + count, 0
            at += len(counts)
        return np.concatenate(found), np.concatenate(left)

    def _run(
        self,
        tokens: NDArray[np.int32],
        states: NDArray[np.float32],
        positions: NDArray[np.int32],
        offsets: NDArray[np.int32],
        tables: NDArray[np.int32],
    ) -> NDArray[np.int32]:
        """The likeliest token behind the last one of each text, i32 [S]. See DraftForward.step."""
        logits = self._forward.step(tokens, states, positions, offsets, tables, offsets[1:] - 1)
        best: NDArray[np.int32] = logits.argmax(-1).astype(np.int32)
        vocabulary = self._forward.vocabulary
        return best if vocabulary is None else vocabulary[best]

    def observe(self, chunks: list[Chunk], states: Callable[[bool], NDArray[np.float32]] | None) -> None:
        """Keep the last states of each sequence. Behind those that were not kept it begins anew."""
        if states is None:
            for sequence, text in self._texts.items():  # what a draft left behind is wrong, or will be missed
                text.count = max(0, min(text.count, sequence.computed - text.done))
            return
        rows, at = states(self._streams), 0
        for chunk in chunks:
            here = rows[at : at + chunk.width]
            at += chunk.width
            if chunk.sequence.wants != "hidden":
                self._see(chunk.sequence, chunk.sequence.computed, here)

    def _see(self, sequence: Sequence, start: int, states: NDArray[np.float32]) -> None:
        """Those from position `start` on."""
        text = self._texts.pop(sequence, None) or _Text(self._slot())
        self._texts[sequence] = text
        rows = self._rows[text.slot]
        if len(states) >= _RECENT:
            text.origin = text.done = start + len(states) - _RECENT
            text.count = _RECENT
            rows[:] = states[-_RECENT:]
            return
        if not text.done <= start <= text.done + text.count:
            text.origin = text.done = start
        text.count = start - text.done  # what a draft left behind it was wrong
        over = text.count + len(states) - _RECENT
        if over > 0:
            rows[: text.count - over] = rows[over : text.count].copy()
            text.count -= over
            text.origin = text.done = text.done + over
        rows[text.count : text.count + len(states)] = states
        text.count += len(states)

    def _known(self, sequence: Sequence, text: _Text) -> int:
        """States that are not looked at yet, at positions with a token behind them."""
        return min(text.done + text.count, sequence.computed, len(sequence.tokens) - 1) - text.done

    def _slot(self) -> int:
        if not self._free:
            self.forget(next(iter(self._texts)))
        return self._free.pop()

    def forget(self, sequence: Sequence) -> None:
        """See DraftEngine."""
        text = self._texts.pop(sequence, None)
        if text is not None:
            self._free.append(text.slot)

    def close(self) -> None:
        """See DraftEngine."""
        self._reader.close()
