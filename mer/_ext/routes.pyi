"""What the tokens of a step chose: the experts that drafted ones alone wanted."""

import numpy as np
from numpy.typing import NDArray

def extra_experts(
    routes: NDArray[np.int32], n_experts: int, chunks: list[tuple[int, int]]
) -> tuple[list[int], int]:
    """What drafts wanted beyond what all plain tokens of a step did: experts by chunk, and in all.

    routes: i32 [layers, >= T, top_k]. chunks: how many plain tokens each has, and how many drafted ones.
    Raises ValueError for more tokens than there are choices, or an expert that is none.
    """
