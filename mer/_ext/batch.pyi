"""The arrays of a step: made of lists, and looked at before C trusts them; see mer/model/batch.py."""

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.int32]

def gather(
    parts: list[tuple[list[int], int, int, list[int]]],
) -> tuple[_Array, _Array, _Array, _Array, _Array]:
    """Of each sequence: its tokens, the position of the first, how many of the last get logits, its blocks.

    Returns tokens, positions, query_offsets, block_tables and logit_rows; ends of block_tables that nobody
    needs are 0. Raises OverflowError for what does not fit 32 bits, TypeError for what is no list.
    """

def check(
    tokens: _Array,
    positions: _Array,
    query_offsets: _Array,
    block_tables: _Array,
    logit_rows: _Array,
    *,
    vocab: int,
    max_tokens: int,
    max_rows: int,
    n_blocks: int,
) -> None:
    """See mer.model.batch.Batch.check."""
