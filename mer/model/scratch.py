"""The buffers of a forward pass: their sizes for the planner, and their allocation."""

from __future__ import annotations

from math import prod
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mer._ext.decoder import INDEX_CHUNK, SPAN
from mer.model.spec import (
    Attention,
    CompressedAttentionSpec,
    DeltaSpec,
    IndexerSpec,
    LatentAttentionSpec,
    ModelSpec,
    ShortConvSpec,
)

# Latent attention goes through this many tokens at a time: its queries are wide (heads x latent).
LATENT_TOKENS: Final = 64
_ALIGN: Final = 64

Shapes = dict[str, tuple[tuple[int, ...], type[np.generic]]]


def _shapes(spec: ModelSpec, tokens: int, rows: int, n_threads: int) -> Shapes:
    f32 = np.float32
    inter = max(spec.dense_inter, spec.shared_inter)
    # The angles of each rotary embedding that there is, one after the other.
    angles = tokens * sum(len(rope.inv_freq) for rope in dict.fromkeys(spec.ropes))
    shapes: Shapes = {
        "x": ((tokens, spec.hidden), f32),
        "h": ((tokens, spec.hidden), f32),
        "y": ((tokens, spec.hidden), f32),
        "shared": ((tokens, spec.hidden), f32),
        "gate": ((tokens, inter), f32),
        "up": ((tokens, inter), f32),
        "cos": ((angles,), f32),
        "sin": ((angles,), f32),
        "router_logits": ((tokens, spec.n_experts), f32),
        "choice": ((n_threads, spec.n_experts), f32),
        "expert_ids": ((tokens, spec.top_k), np.int32),
        "expert_weights": ((tokens, spec.top_k), f32),
        "ahead_ids": ((tokens, spec.top_k), np.int32),
        "ahead_weights": ((tokens, spec.top_k), f32),
        "spans": ((tokens, 3), np.int64),
        "sequence_of": ((tokens,), np.int32),
        "last": ((rows, spec.hidden), f32),
        "logits": ((rows, spec.vocab), f32),
    }
    widest = max(spec.hidden, inter)
    if spec.streams is not None:
        n = spec.streams.n
        shapes |= {"streams": ((tokens, n, spec.hidden), f32), "mixes": ((tokens, (2 + n) * n), f32)}
        widest = max(widest, n * spec.hidden)
    for attention in dict.fromkeys(spec.attentions):
        needed, cols = _attention(attention, tokens, spec.max_positions, n_threads)
        for name, (shape, dtype) in needed.items():
            # As large as the layer that needs the most.
            before = shapes.get(name, (shape, dtype))[0]
            shapes[name] = (tuple(map(max, shape, before)), dtype)
        widest = max(widest, cols)
    if spec.recurrent is not None:
        shapes |= {name: (shape, f32) for name, shape in inputs(spec.recurrent, tokens).items()}
        out = spec.recurrent.out_width
        shapes["attended"] = ((tokens, max(out, shapes["attended"][0][1])), f32)
        widest = max(widest, out)
    shapes["linear_scratch"] = ((linear_scratch_bytes(widest, max(tokens, rows)),), np.uint8)
    return shapes


def _attention(a: Attention, tokens: int, max_positions: int, n_threads: int) -> tuple[Shapes, int]:
    """What one layer's attention needs, and the columns of its widest matrix."""
    f32 = np.float32
    if isinstance(a, CompressedAttentionSpec):
        return _compressed(a, tokens, max_positions, n_threads)
    if isinstance(a, LatentAttentionSpec):
        part = min(tokens, LATENT_TOKENS)
        q_width, out_width = a.n_heads * (a.nope_dim + a.rope_dim), a.n_heads * a.value_dim
        shapes: Shapes = {
            "q_latent": ((tokens, a.query_rank or 0), f32),
            "latent": ((tokens, a.latent_dim), f32),
            "q_wide": ((part, a.n_heads, a.latent_dim), f32),
            "out_wide": ((part, a.n_heads, a.kv_rank), f32),
            # One head's activations, prepared for the product, and the pointers to them.
            "acts": ((n_threads, part, _prepared_bytes(max(a.nope_dim, a.kv_rank))), np.uint8),
            "act_pointers": ((n_threads, part), np.uint64),
        }
        block = 16 * a.latent_dim
        widest = max(a.query_rank or 0, a.kv_rank)
        if a.indexer is not None:
            shapes |= _indexer(a.indexer, tokens, max_positions, n_threads)
            block = max(block, 16 * a.indexer.head_dim)
    else:
        q_width = out_width = a.n_heads * a.head_dim
        shapes = {
            "k": ((tokens, a.n_kv_heads * a.head_dim), f32),
            "v": ((tokens, a.n_kv_heads * a.head_dim), f32),
        }
        if a.gated:
            shapes["q_gate"] = ((tokens, q_width), f32)
        block = 32 * a.head_dim
        widest = 0
    shapes |= {
        "q": ((tokens, q_width), f32),
        "attended": ((tokens, out_width), f32),
        "attention_scratch": ((n_threads, _round(block + _softmax(SPAN * a.n_heads), 16)), f32),
    }
    return shapes, max(widest, out_width)


def _softmax(queries: int) -> int:
    """Floats that attention of so many queries needs beside a block, as mer_attend_scratch counts them."""
    return 17 * max(queries, 16) + 2 * queries


def _compressed(
    a: CompressedAttentionSpec, tokens: int, max_positions: int, n_threads: int
) -> tuple[Shapes, int]:
    f32 = np.float32
    part, width = min(tokens, LATENT_TOKENS), a.n_heads * a.head_dim
    places, dim = 2 if a.overlap else 1, max(a.head_dim, a.index_dim)
    shapes: Shapes = {
        "q_latent": ((tokens, a.query_rank), f32),
        "latent": ((tokens, a.head_dim), f32),
        "q": ((tokens, width), f32),
        "out_wide": ((part, a.n_heads, a.head_dim), f32),
        "attended": ((tokens, a.o_groups * a.o_rank), f32),
        "acts": ((n_threads, part, _prepared_bytes(width // a.o_groups)), np.uint8),
        "act_pointers": ((n_threads, part), np.uint64),
        "attention_scratch": ((n_threads, _round(16 * a.head_dim + _softmax(a.n_heads), 16)), f32),
        # A compressed row, its cosines and sines, and what mer_compress needs.
        "entry_scratch": ((n_threads, _round(3 * dim + a.rope_dim + 2 * places * dim, 16)), f32),
        "entry_scores": ((n_threads, _round(max_positions // (a.rate or max_positions), 16)), f32),
    }
    if a.rate:
        shapes["raw_kv"] = shapes["raw_gate"] = ((tokens, places * a.head_dim), f32)
    if a.index_top_k:
        index: Shapes = {
            "index_q": ((tokens, a.index_heads * a.index_dim), f32),
            "index_weights": ((tokens, a.index_heads), f32),
            "index_scratch": ((n_threads, 2 * a.index_top_k), np.uint64),
            "chosen_positions": ((tokens, a.index_top_k), np.int32),
        }
        index["index_raw_kv"] = index["index_raw_gate"] = ((tokens, places * a.index_dim), f32)
        shapes |= index
    return shapes, max(a.query_rank, a.o_groups * a.o_rank)


def _indexer(x: IndexerSpec, tokens: int, max_positions: int, n_threads: int) -> Shapes:
    """What the choice of positions needs: scores of one token at the least."""
    f32 = np.float32
    return {
        "index_q": ((tokens, x.n_heads * x.head_dim), f32),
        "index_k": ((tokens, x.head_dim), f32),
        "index_weights": ((tokens, x.n_heads), f32),
        "index_scores": ((_round(max_positions, INDEX_CHUNK),), f32),
        "index_scratch": ((n_threads, 2 * x.top_k), np.uint64),
        "chosen_positions": ((tokens, x.top_k), np.int32),
    }


def inputs(r: DeltaSpec | ShortConvSpec, tokens: int) -> dict[str, tuple[int, int]]:
    """Shapes of what one recurrent layer's state takes in, all f32; it gives `attended`."""
    if isinstance(r, ShortConvSpec):
        return {"mixed": (tokens, 3 * r.channels)}
    return {
        "mixed": (tokens, r.channels),
        "z": (tokens, r.out_width),
        "decay": (tokens, r.value_heads),
        "beta": (tokens, r.value_heads),
    }


def linear_scratch_bytes(cols: int, tokens: int) -> int:
    """What a product with a matrix of this many columns needs, whatever its format."""
    return tokens * (_prepared_bytes(cols) + 8) + 2 * _ALIGN


def _prepared_bytes(cols: int) -> int:
    # Three BF16 parts are the largest form of an activation, but for the padding of the int8 one's arrays.
    return 3 * _round(2 * cols, _ALIGN) + 4 * _ALIGN


def _round(n: int, unit: int) -> int:
    return (n + unit - 1) // unit * unit


def _nbytes(shape: tuple[int, ...], dtype: type[np.generic]) -> int:
    return _round(prod(shape) * np.dtype(dtype).itemsize, _ALIGN)


def total_bytes(spec: ModelSpec, tokens: int, rows: int, n_threads: int) -> int:
    """Bytes of all buffers."""
    return sum(_nbytes(*each) for each in _shapes(spec, tokens, rows, n_threads).values()) + _ALIGN


def allocate(spec: ModelSpec, tokens: int, rows: int, n_threads: int) -> dict[str, NDArray[Any]]:
    """All buffers by name, in one block of memory, each on a boundary of 64 bytes."""
    memory = np.zeros(total_bytes(spec, tokens, rows, n_threads), np.uint8)
    at = -memory.ctypes.data % _ALIGN
    buffers = {}
    for name, (shape, dtype) in _shapes(spec, tokens, rows, n_threads).items():
        size = prod(shape) * np.dtype(dtype).itemsize
        buffers[name] = memory[at : at + size].view(dtype).reshape(shape)
        at += _nbytes(shape, dtype)
    return buffers
