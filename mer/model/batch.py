"""The work of one step: tokens of several sequences, and where their keys and values live."""

from __future__ import annotations

import numpy as np
from attrs import define
from numpy.typing import NDArray

from mer._ext.batch import check, gather


@define(eq=False)
class Batch:
    """One step. T tokens of S sequences; a sequence's tokens stand together, in ascending positions.

    A sequence's keys and values of all positions before its first token here must have been written by
    earlier steps through the same blocks. Every array is C-contiguous int32.
    """

    # [T]
    tokens: NDArray[np.int32]
    # [T] position of each token in its sequence, from 0
    positions: NDArray[np.int32]
    # [S + 1] the tokens of sequence s are query_offsets[s] .. query_offsets[s + 1] - 1; each has at least one
    query_offsets: NDArray[np.int32]
    # [S, max_blocks] block of positions 16 b .. 16 b + 15 of sequence s is block_tables[s, b]
    block_tables: NDArray[np.int32]
    # [R] tokens (indices into `tokens`) whose logits are wanted
    logit_rows: NDArray[np.int32]
    # [S, 4] of a model with recurrent layers: the image of the state before the sequence's first token here
    # (-1: it begins here), the image that gets the state behind its last one, and where that is wanted (else
    # -1) the image that gets the state behind some of them, and behind how many; see mer.model.state
    states: NDArray[np.int32] | None = None

    @classmethod
    def of(
        cls,
        parts: list[tuple[list[int], int, int, list[int]]],
        states: list[tuple[int, int, int, int]] | None = None,
    ) -> Batch:
        """See mer._ext.batch.gather; states: rows of `states`."""
        return cls(*gather(parts), None if states is None else np.array(states, np.int32))

    def check(self, *, vocab: int, max_tokens: int, max_rows: int, n_blocks: int, n_images: int = 0) -> None:
        """Raise ValueError when an index in here would lead out of bounds."""
        check(
            self.tokens, self.positions, self.query_offsets, self.block_tables, self.logit_rows,
            vocab=vocab, max_tokens=max_tokens, max_rows=max_rows, n_blocks=n_blocks,
        )  # fmt: skip
        if n_images:
            self._check_states(n_images)

    def _check_states(self, n_images: int) -> None:
        states, counts = self.states, np.diff(self.query_offsets)
        if states is None or states.shape != (len(counts), 4) or states.dtype != np.int32:
            raise ValueError("batch: one row of four int32 states per sequence")
        written = states[:, 1:3][states[:, 1:3] >= 0].tolist()
        if states[:, :3].max() >= n_images or states[:, 1].min() < 0:
            raise ValueError(f"batch: an image of a state is outside 0..{n_images - 1}")
        if len(set(written)) < len(written) or set(written) & set(states[:, 0].tolist()):
            raise ValueError("batch: an image is written that another sequence reads or writes")
        if (self.positions[self.query_offsets[:-1]][states[:, 0] < 0] > 0).any():
            raise ValueError("batch: a sequence goes on without the state before")
        if (states[:, 3] > counts).any() or (states[:, 3][states[:, 2] >= 0] < 1).any():
            raise ValueError("batch: a state is to be kept that this step does not reach")
