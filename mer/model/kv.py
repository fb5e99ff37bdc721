"""Storage of keys and values in blocks of 16 positions. Who holds which block is the engine's business."""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from mer.model.spec import LatentAttentionSpec, ModelSpec

BLOCK: Final = 16
KVDtype = Literal["f32", "f16"]
_NUMPY: Final[dict[str, np.dtype[np.float32] | np.dtype[np.float16]]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
}


def block_elements(spec: ModelSpec) -> int:
    """Elements that one block holds in one layer."""
    attention = spec.attention
    if isinstance(attention, LatentAttentionSpec):
        return BLOCK * attention.latent_dim
    return BLOCK * 2 * attention.n_kv_heads * attention.head_dim


class KVCache:
    """Blocks of keys and values of every layer, allocated once and touched as they are used.

    One array per layer, [n_blocks, elements]. Within a block, grouped-query attention has the keys as
    [kv head, element, position] (a product with all 16 positions is then one vector operation), then the
    values as [kv head, position, element]; latent attention has [position, latent and rotary key].
    """

    def __init__(self, spec: ModelSpec, n_blocks: int, dtype: KVDtype = "f32") -> None:
        if n_blocks < 1:
            raise ValueError("a KV cache has at least one block")
        self.n_blocks = n_blocks
        self.dtype: KVDtype = dtype
        shape = (n_blocks, block_elements(spec))
        self.layers: list[NDArray[np.float32] | NDArray[np.float16]] = [
            np.zeros(shape, _NUMPY[dtype]) for _ in spec.layers
        ]

    @staticmethod
    def bytes_per_block(spec: ModelSpec, dtype: KVDtype = "f32") -> int:
        """Bytes of one block of 16 positions over all layers."""
        return block_elements(spec) * _NUMPY[dtype].itemsize * spec.n_layers
