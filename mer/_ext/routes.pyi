"""What the tokens of a step chose: experts that drafted ones alone wanted, and what each token chose last."""

import numpy as np
from numpy.typing import NDArray

def extra_experts(
    routes: NDArray[np.int32], n_experts: int, chunks: list[tuple[int, int]]
) -> tuple[list[int], int]:
    """What drafts wanted beyond what all plain tokens of a step did: experts by chunk, and in all.

    routes: i32 [layers, >= T, top_k]. chunks: how many plain tokens each has, and how many drafted ones.
    Raises ValueError for more tokens than there are choices, or an expert that is none.
    """

def remember(chosen: NDArray[np.uint16], tokens: NDArray[np.int32], routes: NDArray[np.int32]) -> None:
    """chosen u16 [vocab, layers, top_k]: one more than each token's last choice, 0 where there was none.

    tokens i32 [T] chose routes i32 [>= layers, >= T, top_k]. Raises ValueError where that does not fit.
    """

def remembered(chosen: NDArray[np.uint16], tokens: list[int], layers: int) -> NDArray[np.int32]:
    """i32 [layers, T, top_k] of the first layers, -1 where it is not known.

    Raises ValueError for a token or a layer that is none.
    """
