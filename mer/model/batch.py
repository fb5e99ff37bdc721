"""The work of one step: tokens of several sequences, and where their keys and values live."""

from __future__ import annotations

import numpy as np
from attrs import define
from numpy.typing import NDArray

from mer.model.kv import BLOCK


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

    def check(self, *, vocab: int, max_tokens: int, max_rows: int, n_blocks: int, n_images: int = 0) -> None:
        """Raise ValueError when an index in here would lead out of bounds."""
        tokens, positions, offsets = self.tokens, self.positions, self.query_offsets
        tables, rows = self.block_tables, self.logit_rows
        for name in ("tokens", "positions", "query_offsets", "block_tables", "logit_rows"):
            array = getattr(self, name)
            if array.dtype != np.int32 or not array.flags.c_contiguous:
                raise ValueError(f"batch: {name} must be C-contiguous int32")
        total, sequences = len(tokens), len(offsets) - 1
        if not 0 < total <= max_tokens:
            raise ValueError(f"batch: {total} tokens, this forward pass takes 1 to {max_tokens}")
        if len(rows) > max_rows:
            raise ValueError(f"batch: logits of {len(rows)} tokens, this forward pass takes up to {max_rows}")
        if tokens.min() < 0 or tokens.max() >= vocab:
            raise ValueError(f"batch: a token is outside 0..{vocab - 1}")
        if len(positions) != total or positions.min() < 0:
            raise ValueError("batch: positions do not fit the tokens")
        if len(rows) and not (rows.min() >= 0 and rows.max() < total):
            raise ValueError("batch: a logit row is not a token of this step")
        if offsets[0] != 0 or offsets[-1] != total or (np.diff(offsets) < 1).any():
            raise ValueError("batch: query offsets do not fit the tokens")
        if tables.ndim != 2 or len(tables) != sequences:
            raise ValueError("batch: one row of block_tables per sequence")
        for s in range(sequences):
            here = positions[offsets[s] : offsets[s + 1]]
            if (np.diff(here) != 1).any():
                raise ValueError(f"batch: positions of sequence {s} are not consecutive")
            used = int(here[-1]) // BLOCK + 1
            if used > tables.shape[1] or tables[s, :used].min() < 0 or tables[s, :used].max() >= n_blocks:
                raise ValueError(f"batch: sequence {s} needs {used} blocks within 0..{n_blocks - 1}")
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
