"""Which experts a token will probably want, known as soon as the token is: what it chose the last time.

Much of a router's choice hangs on the token alone, more so in the first layers; docs/speculative.md has
figures. So what drafted tokens will want can be read while drafting goes on, by whatever they are drafted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mer._ext.prefetch import EARLY_LAYERS
from mer._ext.routes import remember, remembered
from mer.model.spec import ModelSpec


class LikelyExperts:
    """Of each token that was computed in a small step, its choices in the first layers with experts."""

    def __init__(self, spec: ModelSpec) -> None:
        # One more than the expert, 0: not known. Pages of tokens that never come are never touched.
        self._chosen = np.zeros(_shape(spec), np.uint16)

    @staticmethod
    def nbytes(spec: ModelSpec) -> int:
        """Bytes that one of this model takes in the end."""
        return 2 * int(np.prod(_shape(spec)))

    def learn(self, tokens: NDArray[np.int32], routes: NDArray[np.int32]) -> None:
        """tokens i32 [T] chose routes i32 [MoE layers, >= T, top_k]."""
        remember(self._chosen, tokens, routes)

    def of(self, tokens: list[int], layers: int) -> NDArray[np.int32]:
        """i32 [layers, T, top_k] for the first layers, -1 where it is not known."""
        return remembered(self._chosen, tokens, layers)


def _shape(spec: ModelSpec) -> tuple[int, int, int]:
    return spec.vocab, min(EARLY_LAYERS, spec.n_moe_layers), spec.top_k
