"""Draws tokens from logits, as mer/engine/sampling.py defines it; the arithmetic is in csrc/sampling/."""

import numpy as np
from numpy.typing import NDArray

def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that decides a draw, a multiple of 2**-53. Both arguments are below 2**64."""

class Room:
    """Memory for drawing from logits of `vocab` tokens, 36 bytes each, and what needs no random state.

    One thread at a time. Everything that looks at logits, f32 [vocab], raises MerError where the largest is
    not finite, and ValueError where their number is another one.
    """

    def __init__(self, vocab: int) -> None:
        """Raises ValueError for less than one token."""

    @property
    def vocab(self) -> int: ...
    def pick(
        self,
        logits: NDArray[np.float32],
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        uniform: float,
    ) -> int:
        """The token at `uniform`, in [0, 1 - 2**-53], of the cumulative distribution of what survives.

        The likeliest one where temperature is 0.
        """

    def survivors(
        self, logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float, min_p: float
    ) -> tuple[NDArray[np.int32], NDArray[np.float64]] | None:
        """The tokens that survive, ascending, and their weights: exp((logit - largest) / temperature).

        None where there is no filter. temperature is above 0.
        """

    def logprobs(
        self, logits: NDArray[np.float32], token: int, count: int
    ) -> tuple[float, tuple[tuple[int, float], ...]]:
        """The natural logarithm of `token`'s probability, and (token, the same) of the `count` likeliest.

        Best first, of equals the lowest first. Raises IndexError for a token that there is not.
        """

class Drawer:
    """The random state of one request, and the counts that its penalties need."""

    def __init__(
        self,
        vocab: int,
        seed: int,
        prompt: NDArray[np.int64],
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition: float,
        presence: float,
        frequency: float,
        biased: NDArray[np.int64],
        biases: NDArray[np.float32],
    ) -> None:
        """seed: below 2**64. prompt: what `repetition` counts as seen, beside what is drawn.

        biased [n]: tokens below `vocab`, and biases [n] what is added to their logits.
        """

    def draw(self, room: Room, logits: NDArray[np.float32], allowed: NDArray[np.uint8] | None = None) -> int:
        """The next token; it counts as drawn. allowed [vocab]: 0 for a token that may not come.

        Raises as Room does.
        """

    def adjusted(self, room: Room, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """f32 [vocab]: the logits after biases and penalties."""
