"""Storage of keys and values in blocks of 16 positions. Who holds which block is the engine's business."""

from __future__ import annotations

from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from mer.model.spec import Attention, CompressedAttentionSpec, LatentAttentionSpec, ModelSpec

BLOCK: Final = 16
KVDtype = Literal["f32", "f16", "q8_0"]
# As mer_decoder.h numbers them.
_DTYPES: Final = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.uint8))
_NAMES: Final = ("f32", "f16", "q8_0")
# Elements of a key or value that share a scale in Q8_0; the last group may be shorter.
_GROUP: Final = 32


def _vector_bytes(dim: int, dtype: KVDtype) -> int:
    if dtype == "q8_0":
        return dim + 2 * -(-dim // _GROUP)
    return dim * _DTYPES[_NAMES.index(dtype)].itemsize


def _block_bytes(attention: Attention, dtype: KVDtype) -> int:
    """Bytes that one block takes in a layer with this attention."""
    if isinstance(attention, LatentAttentionSpec):
        indexer = attention.indexer
        index = _vector_bytes(indexer.head_dim, dtype) if indexer is not None and indexer.own else 0
        return BLOCK * (_vector_bytes(attention.latent_dim, dtype) + index)
    if isinstance(attention, CompressedAttentionSpec):
        return _compressed_bytes(attention, dtype)
    return BLOCK * 2 * attention.n_kv_heads * _vector_bytes(attention.head_dim, dtype)


def _compressed_bytes(a: CompressedAttentionSpec, dtype: KVDtype) -> int:
    """Keys, what is to be compressed, and what was made of it; of the last two also the indexer's."""
    keys = BLOCK * _vector_bytes(a.head_dim, dtype)
    if not a.rate:
        return _even(keys)
    dims = (a.head_dim, a.index_dim) if a.index_top_k else (a.head_dim,)
    places = 2 if a.overlap else 1
    raw: KVDtype = "f16" if dtype == "q8_0" else dtype
    entries = max(BLOCK // a.rate, 1)
    return _even(
        keys
        + sum(BLOCK * _vector_bytes(2 * places * dim, raw) for dim in dims)
        + sum(entries * _vector_bytes(dim, dtype) for dim in dims)
    )


def _even(nbytes: int) -> int:
    """Blocks of bytes hold wider numbers, too."""
    return (nbytes + 15) // 16 * 16


def layer_bytes(spec: ModelSpec, dtype: KVDtype) -> list[int]:
    """Bytes that one block takes in each layer."""
    return [
        _block_bytes(attention, dtype) if layer.state_index is None else 0
        for layer, attention in zip(spec.layers, spec.attentions, strict=True)
    ]


class KVCache:
    """Blocks of keys and values of every layer, allocated once and touched as they are used.

    One array per layer, [n_blocks, elements]. Within a block, grouped-query attention has the keys as
    [kv head, element, position] (a product with all 16 positions is then one vector operation), then the
    values as [kv head, position, element]; latent attention has [position, latent and rotary key], then,
    with an indexer, its keys as [element, position]; compressed attention has rows [position, elements], see
    mer_rows in mer_decoder.h. In Q8_0
    elements are bytes: of each head int8 codes in that order, then the scales (see mer_decoder.h). Blocks of
    layers without attention have no elements.
    """

    def __init__(self, spec: ModelSpec, n_blocks: int, dtype: KVDtype = "f32", elsewhere: int = 0) -> None:
        """elsewhere: of so many layers, the first ones, a GPU has them, and there are no elements here."""
        if n_blocks < 1:
            raise ValueError("a KV cache has at least one block")
        self.n_blocks = n_blocks
        self.dtype: KVDtype = dtype
        self.number = _NAMES.index(dtype)
        element = _DTYPES[self.number]
        elements = [nbytes // element.itemsize for nbytes in layer_bytes(spec, dtype)]
        self._whole = elements.copy()
        elements[:elsewhere] = [0] * elsewhere
        self.layers: list[NDArray[Any]] = [np.zeros((n_blocks, count), element) for count in elements]

    def bring_here(self) -> None:
        """Have the elements of all layers here; those of layers that a GPU had are 0."""
        for index, (layer, count) in enumerate(zip(self.layers, self._whole, strict=True)):
            if layer.shape[1] != count:
                self.layers[index] = np.zeros((self.n_blocks, count), layer.dtype)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, wherever they are."""
        return sum(self._whole) * _DTYPES[self.number].itemsize

    @staticmethod
    def bytes_per_block(spec: ModelSpec, dtype: KVDtype = "f32", elsewhere: int = 0) -> int:
        """Bytes of one block of 16 positions over all layers but the first `elsewhere`."""
        return sum(layer_bytes(spec, dtype)[elsewhere:])
