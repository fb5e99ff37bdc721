"""A model in numbers: what `mer inspect` shows and what `mer convert` says it has written."""

from __future__ import annotations

import math
from collections import Counter

from attrs import frozen

from mer.cli.common import size
from mer.config import EngineConfig
from mer.engine.budget import kv_dtype
from mer.model.dense import dense_bytes
from mer.model.families import Architecture
from mer.model.kv import BLOCK, KVCache
from mer.model.spec import (
    AttentionSpec,
    CompressedAttentionSpec,
    DeltaSpec,
    LatentAttentionSpec,
    ModelSpec,
    RouterSpec,
)
from mer.model.state import StateCache
from mer.weights.tensors import Checkpoint


@frozen
class Stored:
    """Weights of one kind ('experts' or 'dense') in one format. nbytes: padding and scales not counted."""

    kind: str
    format: str
    tensors: int
    nbytes: int


@frozen
class Summary:
    """Sizes are bytes, but for parameters. expert_bytes: what one expert takes on disk, padding included; in
    a dense model 0. dense_bytes: in memory. kv_bytes_per_token: over all layers.

    Embedding and head count as parameters, in full and in both numbers, as model cards do.
    """

    file_bytes: int
    stored: tuple[Stored, ...]
    parameters: int
    active_parameters: int
    expert_bytes: int
    experts_bytes: int
    dense_bytes: int
    kv_dtype: str
    kv_bytes_per_token: int


def summarise(checkpoint: Checkpoint, architecture: Architecture) -> Summary:
    """Reads no weights."""
    spec = architecture.spec
    # Tables of experts by token are no weights.
    names = {name: part for part, name in architecture.dense.items() if not part.endswith("router_table")}
    dense = [checkpoint.tensors[name] for name in names]
    experts = [expert for layer in architecture.experts for expert in layer.experts]
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for info in dense:
        counts["dense", info.format.name] += 1
        sizes["dense", info.format.name] += info.nbytes
    for matrix in (matrix for expert in experts for matrix in expert.matrices):
        counts["experts", matrix.format.name] += 1
        sizes["experts", matrix.format.name] += matrix.nbytes
    always = sum(math.prod(info.shape) for info in dense)
    dtype = kv_dtype(checkpoint, architecture, EngineConfig())
    one = 3 * spec.hidden * spec.moe_inter
    idle = spec.n_moe_layers * (spec.n_experts - spec.top_k)
    bias = (2 * spec.moe_inter + spec.hidden) * spec.expert_bias  # of an expert, among the dense tensors
    return Summary(
        file_bytes=sum(file.stat().st_size for file in checkpoint.files),
        stored=tuple(
            Stored(*key, counts[key], nbytes)
            for key, nbytes in sorted(sizes.items(), key=lambda item: (item[0][0] == "dense", -item[1]))
        ),
        parameters=always + len(experts) * one,
        active_parameters=always - idle * bias + spec.n_moe_layers * spec.top_k * one,
        expert_bytes=max((expert.nbytes for expert in experts), default=0),
        experts_bytes=sum(expert.nbytes for expert in experts),
        dense_bytes=dense_bytes(checkpoint, architecture),
        kv_dtype=dtype,
        kv_bytes_per_token=KVCache.bytes_per_block(spec, dtype) // BLOCK,
    )


def attention(spec: ModelSpec) -> str:
    """The kind of attention and its heads, in a line."""
    a = spec.attention
    if isinstance(a, LatentAttentionSpec):
        text = f"latent (MLA), {a.n_heads} heads, latent of {a.kv_rank}, rotary key of {a.rope_dim}"
        if a.indexer is not None:
            latent = [each for each in spec.attentions if isinstance(each, LatentAttentionSpec)]
            own = sum(each.indexer is not None and each.indexer.own for each in latent)
            text += f"; a token sees {a.indexer.top_k:,} positions, chosen in {own} of {spec.n_layers} layers"
        return text
    if isinstance(a, CompressedAttentionSpec):
        return _compressed(spec, a)
    assert isinstance(a, AttentionSpec)
    kind = "multi-head" if a.n_kv_heads == a.n_heads else "grouped-query"
    text = f"{kind}, {a.n_heads} heads, {a.n_kv_heads} of keys and values, {a.head_dim} wide"
    if spec.n_state_layers:
        text += f"; in {spec.n_layers - spec.n_state_layers} of {spec.n_layers} layers"
    windows = [layer.window for layer in spec.layers if layer.window]
    if windows:
        text += f"; a window of {max(windows):,} in {len(windows)} of {spec.n_layers} layers"
    others = [each for each in spec.attentions if isinstance(each, AttentionSpec) and each != a]
    if others:
        heads, dim = max((each.n_kv_heads, each.head_dim) for each in others)
        text += f"; in {len(others)} layers {heads} of keys and values, {dim} wide"
    return text


def _compressed(spec: ModelSpec, a: CompressedAttentionSpec) -> str:
    text = f"one key for {a.n_heads} heads, {a.head_dim} wide, in a window of {spec.layers[0].window or 0:,}"
    found = Counter(
        each.rate for each in spec.attentions if isinstance(each, CompressedAttentionSpec) and each.rate
    )
    for rate, count in sorted(found.items()):
        text += f"; {rate} positions compressed into one in {count} of {spec.n_layers} layers"
    return text


def recurrent(spec: ModelSpec) -> str | None:
    """What the layers with a state have instead of attention; None where there are none."""
    r, n = spec.recurrent, spec.n_state_layers
    if r is None:
        return None
    state = f"a request's states {size(StateCache.bytes_per_image(spec))}"
    if isinstance(r, DeltaSpec):
        heads = f"{r.value_heads} heads of {r.key_dim} x {r.value_dim}"
        return f"gated delta rule, {heads}, in {n} of {spec.n_layers} layers; {state}"
    return f"short convolution of {r.kernel} tokens, in {n} of {spec.n_layers} layers; {state}"


def layers(spec: ModelSpec) -> str:
    """How many layers, and how many of them have experts."""
    if spec.router is None:
        return f"{spec.n_layers}, dense: none has experts"
    plain = spec.n_layers - spec.n_moe_layers
    return f"{spec.n_layers}" + (f", {spec.n_moe_layers} of them with experts" if plain else "")


def experts(spec: ModelSpec, r: RouterSpec) -> str:
    """How many experts a layer has and how many a token takes."""
    text = f"{r.n_experts} per layer, {r.top_k} per token, each {spec.moe_inter:,} wide"
    if r.n_groups > 1:
        text += f"; from {r.top_groups} of {r.n_groups} groups"
    return text


def shared_expert(spec: ModelSpec) -> str:
    """The expert that every token passes."""
    if not spec.shared_inter:
        return "none"
    return f"{spec.shared_inter:,} wide" + (", gated" if spec.shared_gate else "")
