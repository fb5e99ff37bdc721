"""Storage of recurrent states. Which image belongs to whom is the engine's business."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mer._ext.recurrent import replay_floats, state_floats
from mer.model.spec import ModelSpec


class StateCache:
    """Images of a sequence's state, of every recurrent layer; allocated once and touched as they are used.

    One array per recurrent layer, f32 [n_images, floats]: the last inputs of the convolution, [kernel - 1,
    channels]; then, for the delta rule, of each value head [value_dim / 32, key_dim, 32], its columns padded
    with zeros.
    """

    def __init__(self, spec: ModelSpec, n_images: int) -> None:
        """n_images: 0 for a model without recurrent layers."""
        self.n_images = n_images
        floats = 0 if spec.recurrent is None else state_floats(spec.recurrent)
        self.layers: list[NDArray[np.float32]] = [
            np.zeros((n_images, floats), np.float32) for _ in range(spec.n_state_layers)
        ]

    @staticmethod
    def bytes_per_image(spec: ModelSpec) -> int:
        """Bytes of one sequence's state over all layers; 0 where there is none."""
        if spec.recurrent is None:
            return 0
        return 4 * state_floats(spec.recurrent) * spec.n_state_layers


def replay_shape(spec: ModelSpec, tokens: int) -> tuple[int, int, int]:
    """Of f32, in which a step of so many tokens leaves what its states were made of; no elements without."""
    floats = 0 if spec.recurrent is None else replay_floats(spec.recurrent)
    return spec.n_state_layers, tokens, floats
