"""The buffers of a forward pass on a device: their sizes, for the planner and for their allocation."""

from __future__ import annotations

import math
from typing import Final

from mer.model.scratch import inputs
from mer.model.spec import AttentionSpec, DeltaSpec, LatentAttentionSpec, ModelSpec, ShortConvSpec

_ALIGN: Final = 256
# Scores of attention are formed for as many queries at a time as have room here, one at the least.
_SCORES: Final = 64 << 20
_ATTENTION: Final = ("qkv", "q", "attended", "q_latent", "q_wide", "out_wide", "head_rows")


def _prepared(cols: int) -> int:
    """Bytes of a row of activations in int8, with scales and sums of its blocks of 32."""
    blocks = cols // 32
    return sum(-(-n // 64) * 64 for n in (cols, 4 * blocks, 4 * blocks, 4 * blocks, 8 * blocks))


def _products(a: AttentionSpec | LatentAttentionSpec) -> int:
    """The most of one layer: queries in pieces of as many rows as there are keys; each head's latents."""
    if isinstance(a, LatentAttentionSpec):
        return 2 * a.n_heads + 13
    return 2 * (a.n_heads // a.n_kv_heads) + 11


def _grouped(a: AttentionSpec, tokens: int) -> dict[str, int]:
    return {
        "qkv": 4 * tokens * (a.n_heads * (1 + a.gated) + 2 * a.n_kv_heads) * a.head_dim,
        "q": 4 * tokens * a.n_heads * a.head_dim,
        "attended": 4 * tokens * a.n_heads * a.head_dim,
        "acts": tokens * _prepared(a.n_heads * a.head_dim),
    }


def _latent(a: LatentAttentionSpec, tokens: int) -> dict[str, int]:
    """Latents take the place of queries, keys and values in one."""
    heads = tokens * a.n_heads
    return {
        "qkv": 4 * tokens * a.latent_dim,
        "q": 4 * heads * (a.nope_dim + a.rope_dim),
        "attended": 4 * heads * a.value_dim,
        "acts": max(
            heads * _prepared(max(a.nope_dim, a.kv_rank)),
            tokens * _prepared(max(a.n_heads * a.value_dim, a.query_rank or 0)),
        ),
        "q_latent": 4 * tokens * (a.query_rank or 0),
        "q_wide": 4 * heads * a.latent_dim,
        "out_wide": 4 * heads * a.kv_rank,
        "head_rows": 4 * heads,
    }


def _recurrent(r: DeltaSpec | ShortConvSpec, tokens: int) -> dict[str, int]:
    """What a state takes in, in the place of queries, keys and values; and what it gives."""
    floats = sum(math.prod(shape) for shape in inputs(r, tokens).values())
    return {
        "qkv": 4 * floats,
        "attended": 4 * tokens * r.out_width,
        "acts": tokens * _prepared(r.out_width),
    }


def shapes(spec: ModelSpec, tokens: int, rows: int, n_blocks: int) -> dict[str, int]:
    """Bytes of every buffer by name; the names are those of mer._ext.gpu_decoder.

    tokens, rows: as of mer.model.scratch. n_blocks: of the KV cache.
    """
    inter = max(spec.dense_inter, spec.shared_inter)
    attentions = [a for a in spec.attentions if isinstance(a, AttentionSpec | LatentAttentionSpec)]
    # Of each kind of layer; as large as the one that needs the most.
    needs = [
        _grouped(a, tokens) if isinstance(a, AttentionSpec) else _latent(a, tokens)
        for a in dict.fromkeys(attentions)
    ]
    if spec.recurrent is not None:
        needs.append(_recurrent(spec.recurrent, tokens))
    heads = max(a.n_heads for a in attentions)
    pairs = sum(len(rope.inv_freq) for rope in dict.fromkeys(spec.ropes))
    # Of one query at the least, of a whole step at the most.
    positions = 16 * n_blocks
    floats = min(max(_SCORES // 4, heads * positions), tokens * heads * positions)
    return {
        "x": 4 * tokens * spec.hidden,
        "h": 4 * tokens * spec.hidden,
        "h2": 4 * tokens * spec.hidden,
        "y": 4 * tokens * spec.hidden,
        "shared": 4 * tokens * spec.hidden,
        "shared_gate": 4 * tokens,
        "gate": 4 * tokens * inter,
        "up": 4 * tokens * inter,
        **{name: max(need.get(name, 0) for need in needs) for name in _ATTENTION},
        "acts": max(tokens * _prepared(max(spec.hidden, inter)), *(need["acts"] for need in needs)),
        "h_acts": tokens * _prepared(spec.hidden),
        "scores": 4 * floats,
        "shrinks": 4 * floats // 16,
        "sums": 4 * tokens * heads,
        "logits": 4 * rows * spec.vocab,
        "rows": 4 * rows,
        "products": 40 * (sum(map(_products, attentions)) + 1),
        # Positions, sequences, spans, block tables, angles: what a step brings, each on a boundary.
        "step": 4 * (5 * tokens + rows * n_blocks + 2 * tokens * pairs) + 64 * (8 + 2 * spec.n_layers),
    }


def total_bytes(spec: ModelSpec, tokens: int, rows: int, n_blocks: int) -> int:
    """Bytes of all buffers, as they are laid out."""
    return sum(-(-n // _ALIGN) * _ALIGN for n in shapes(spec, tokens, rows, n_blocks).values())


def places(
    spec: ModelSpec, tokens: int, rows: int, n_blocks: int, scores: int = _SCORES
) -> dict[str, tuple[int, int]]:
    """Of every buffer, where it begins in one allocation of `total_bytes`, and its bytes."""
    found, at = {}, 0
    for name, nbytes in shapes(spec, tokens, rows, n_blocks).items():
        found[name] = (at, nbytes)
        at += -(-nbytes // _ALIGN) * _ALIGN
    return found


def host_bytes(spec: ModelSpec, tokens: int, rows: int, n_blocks: int) -> int:
    """Bytes of memory, pinned, with them: what a step brings, products, the next router's, choices."""
    sizes = shapes(spec, tokens, rows, n_blocks)
    own = sizes["step"] + sizes["rows"] + sizes["products"]
    return own + 4 * tokens * (max(spec.n_experts, 1) + spec.n_moe_layers * spec.top_k)
