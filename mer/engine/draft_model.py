"""A small model that drafts for a large one with the same tokens: a Runner beside the main one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

import numpy as np
from attrs import define, evolve, frozen
from numpy.typing import NDArray

from mer._ext.acceptance import DRAFT_MODEL, MOST_DRAFTED
from mer.config import EngineConfig
from mer.engine import budget as budgets
from mer.engine.blocks import BlockPool
from mer.engine.budget import Budget
from mer.engine.draft import DraftShape
from mer.engine.runner import Runner
from mer.engine.scheduler import Chunk, Sequence
from mer.errors import ConfigError
from mer.model.families import Architecture, load
from mer.model.kv import BLOCK
from mer.model.spec import ModelSpec
from mer.model.tokenizer import Tokenizer
from mer.streaming.experts import ExpertTables, expert_tables
from mer.weights.checkpoint import Checkpoint, open_checkpoint, require_streamable

# Most tokens of one of its steps: a piece of a text that it is behind, during which others wait.
_STEP: Final = 256
# All experts fit into this.
_PLENTY: Final = 1 << 60


@frozen
class ModelSource:
    """A draft model that is known, but not loaded."""

    checkpoint: Checkpoint
    architecture: Architecture
    tables: ExpertTables
    config: EngineConfig
    vocab: int  # token ids that both models have are below this

    @classmethod
    def open(
        cls, path: Path, main: ModelSpec, tokenizer: Tokenizer | None, config: EngineConfig
    ) -> ModelSource:
        """The model at `path`, for a main one with this spec and tokenizer.

        Raises ConfigError for one that can't draft for it, CheckpointError or UnsupportedModelError.
        """
        checkpoint = open_checkpoint(path)
        require_streamable(checkpoint)
        architecture = load(checkpoint)
        if architecture.spec.recurrent is not None:
            raise ConfigError(
                f"draft_model {path}: layers of {architecture.spec.family} keep a state, which can't be set "
                "back behind a wrong draft; take another model"
            )
        _compare(path, architecture.spec.vocab, main.vocab, Tokenizer.open(checkpoint.path), tokenizer)
        return cls(
            checkpoint,
            architecture,
            expert_tables(architecture.experts, path),
            # All that is not said here is as for the main model.
            evolve(
                config, ram=_PLENTY, cache_experts=None, speculate="off", draft_model=None, draft_head=None,
                warm_start=False, trace=None, profile=None, prefix_store=None, device="cpu", vram=None,
                expert_wire="f32", peers=(), peer_token=None, peer_ca=None, peer_cert=None, peer_key=None,
            ),
            min(architecture.spec.vocab, main.vocab),
        )  # fmt: skip

    def nbytes(self, shape: DraftShape) -> int:
        return budgets.beside(self._budget(shape), self.architecture.spec)

    def load(self, runner: Runner) -> DraftModel:
        """Raises DeviceReadError or CheckpointError."""
        budget = self._budget(runner.budget.draft_shape)
        own = Runner.load(
            self.checkpoint, self.architecture, self.tables, budget, self.config, pool=runner.pool
        )
        return DraftModel(own, self.vocab)

    def _budget(self, shape: DraftShape) -> Budget:
        spec = self.architecture.spec
        config = evolve(
            self.config,
            context=min(shape.context, spec.max_positions * shape.max_running),
            step_tokens=max(min(shape.step_tokens, _STEP), shape.max_running),
            max_running=shape.max_running,
            threads=shape.threads,
        )
        return budgets.measure(self.checkpoint, self.architecture, self.tables, config)


def _compare(
    path: Path, vocab: int, main_vocab: int, tokenizer: Tokenizer | None, main: Tokenizer | None
) -> None:
    """Raises ConfigError where a token id does not mean the same to both."""
    advice = "a draft model needs the main one's tokenizer; take another of the same family"
    if tokenizer is None and main is None:
        if vocab != main_vocab:
            raise ConfigError(
                f"draft_model {path}: it has {vocab} token ids, the main model {main_vocab}; {advice}"
            )
    elif tokenizer is None or main is None:
        which = "it" if tokenizer is None else "the main model"
        raise ConfigError(f"draft_model {path}: {which} came without a tokenizer; {advice}")
    else:
        id = tokenizer.first_difference(main)
        if id is not None:
            raise ConfigError(
                f"draft_model {path}: token {id} is {tokenizer.token_text(id)!r} there and "
                f"{main.token_text(id)!r} in the main model; {advice}"
            )


@define(eq=False)
class _Text(Sequence):
    """A sequence as it is followed here, and a draft behind it.

    sure: leading tokens that the sequence had when it was looked at last. published: full blocks that others
    may share. unknown: whether there are tokens that this model has not.
    """

    sure: int = 0
    published: int = 0
    unknown: bool = False


class DraftModel:
    """Drafts what a model of its own finds likeliest.

    It has followed each text up to some token, in blocks of its own, and is set back to where a draft was
    wrong. What it computes of beginnings that several texts have is shared as the main model's is.
    """

    kind = DRAFT_MODEL

    def __init__(self, runner: Runner, vocab: int) -> None:
        """vocab: token ids from there on are not to be drafted."""
        self.name = f"the draft model {runner.checkpoint.path.name}"
        self._runner = runner
        self._vocab = vocab
        self._step_tokens = runner.budget.step_tokens
        self._pool = BlockPool(runner.budget.kv_blocks)
        self._followed: dict[Sequence, _Text] = {}
        self._current: set[Sequence] = set()

    def behind(self, sequence: Sequence) -> int | None:
        followed = self._follow(sequence)
        return None if followed is None else followed.pending

    def catch_up(self, sequence: Sequence) -> None:
        followed = self._follow(sequence)
        if followed is not None:
            # The last token is left: a draft begins with it.
            self._step([Chunk(followed, min(self._step_tokens, followed.pending - 1))])

    def propose(self, sequences: Collection[Sequence], lengths: list[int]) -> list[list[int]]:
        texts = [self._follow(sequence) for sequence in sequences]
        drafts: list[list[int]] = [[] for _ in texts]
        while True:
            chunks: list[Chunk] = []
            owners: list[tuple[_Text, list[int]]] = []
            room = self._step_tokens
            for text, draft, length in zip(texts, drafts, lengths, strict=True):
                if text is not None and len(draft) < length and room:
                    chunks.append(Chunk(text, min(room, text.pending)))
                    room -= chunks[-1].count
                    if chunks[-1].last:
                        owners.append((text, draft))
            if not chunks:
                return drafts
            logits = self._step(chunks)
            likeliest = logits[:, : self._vocab].argmax(1).tolist()
            for (text, draft), token in zip(owners, likeliest, strict=True):
                draft.append(token)
                text.tokens.append(token)

    def observe(self, chunks: list[Chunk], states: Callable[[bool], NDArray[np.float32]] | None) -> None:
        self._current = {chunk.sequence for chunk in chunks}

    def forget(self, sequence: Sequence) -> None:
        followed = self._followed.pop(sequence, None)
        if followed is not None:
            self._pool.release(followed.blocks)
        self._current.discard(sequence)

    def close(self) -> None:
        self._runner.close()

    def _step(self, chunks: list[Chunk]) -> NDArray[np.float32]:
        logits = self._runner.step(chunks)
        for chunk in chunks:
            chunk.sequence.computed += chunk.count
        return logits

    def _follow(self, sequence: Sequence) -> _Text | None:
        """The same text as it is followed here, with blocks for a draft behind it; None: it can't be."""
        text = self._followed.get(sequence)
        if text is None:
            text = self._followed[sequence] = self._begin(sequence)
        self._current.add(sequence)
        tokens, at = sequence.tokens, text.sure
        if at < len(tokens):
            # What was drafted there may have been wrong.
            while at < min(len(text.tokens), len(tokens)) and text.tokens[at] == tokens[at]:
                at += 1
            text.unknown = text.unknown or max(tokens[text.sure :]) >= self._runner.spec.vocab
            text.tokens[at:] = tokens[at:]
            text.sure = len(tokens)
        else:
            del text.tokens[at:]
        text.computed = min(text.computed, at, len(tokens) - 1)
        if text.unknown or len(tokens) + MOST_DRAFTED > self._runner.spec.max_positions:
            return None
        for full in range(text.published, min(text.computed // BLOCK, len(sequence.keys))):
            self._pool.publish(text.blocks, full, sequence.keys[full])
            text.published = full + 1
        return text if self._extend(text, sequence) else None

    def _begin(self, sequence: Sequence) -> _Text:
        keys = sequence.keys[: (len(sequence.tokens) - 1) // BLOCK]
        keys = keys[: self._pool.match(keys)]
        text = _Text(tokens=sequence.tokens[: len(keys) * BLOCK])
        self._pool.share(text.blocks, keys)
        text.published = len(keys)
        text.sure = text.computed = len(text.tokens)
        return text

    def _extend(self, text: _Text, sequence: Sequence) -> bool:
        """Whether there are blocks for a draft behind it, if need be those of others that have to wait."""
        while not self._pool.extend(text.blocks, len(sequence.tokens) + MOST_DRAFTED):
            idle = next((other for other in self._followed if other not in self._current), None)
            if idle is None:
                return False
            self.forget(idle)
        return True
