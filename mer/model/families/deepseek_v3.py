"""DeepSeek-V3 and Kimi-K2: latent attention; sigmoid scores, groups; a shared expert; plain first layers."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import evolve

from mer.model.families import common
from mer.model.families.config import Config
from mer.model.families.deepseek_blocks import Blocks, sigmoid_router
from mer.model.families.rope import Rope
from mer.model.families.tensors import Tensors
from mer.model.spec import IndexerSpec, LatentAttentionSpec, ModelSpec


def _attention(config: Config, rope: Rope, indexer: IndexerSpec | None) -> LatentAttentionSpec:
    heads = config.integer("num_attention_heads")
    nope, turned = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    return LatentAttentionSpec(
        n_heads=heads,
        nope_dim=nope,
        rope_dim=turned,
        value_dim=config.integer("v_head_dim"),
        kv_rank=config.integer("kv_lora_rank"),
        query_rank=None if config.get("q_lora_rank") is None else config.integer("q_lora_rank"),
        scale=(nope + turned) ** -0.5 * rope.score_factor,
        indexer=indexer,
    )


def _take_attention(tensors: Tensors, i: int, hidden: int, a: LatentAttentionSpec, bias: bool) -> None:
    name = f"model.layers.{i}.self_attn"
    q_rows, q_cols = a.n_heads * (a.nope_dim + a.rope_dim), a.query_rank or hidden
    if a.query_rank is None:
        tensors.take_linear(f"{i}.q", f"{name}.q_proj", q_rows, q_cols)
    else:
        tensors.take_linear(f"{i}.q_latent", f"{name}.q_a_proj", a.query_rank, hidden, bias=bias)
        tensors.take(f"{i}.q_latent_norm", f"{name}.q_a_layernorm.weight", a.query_rank)
        tensors.take_linear(f"{i}.q", f"{name}.q_b_proj", q_rows, q_cols)
    tensors.take_linear(f"{i}.latent", f"{name}.kv_a_proj_with_mqa", a.latent_dim, hidden, bias=bias)
    tensors.take(f"{i}.latent_norm", f"{name}.kv_a_layernorm.weight", a.kv_rank)
    if tensors.has(f"{name}.k_b_proj.weight"):  # a GGUF has them apart, keys transposed
        tensors.take(f"{i}.k_up", f"{name}.k_b_proj.weight", a.n_heads, a.kv_rank, a.nope_dim)
        tensors.take(f"{i}.v_up", f"{name}.v_b_proj.weight", a.n_heads, a.value_dim, a.kv_rank)
    else:
        rows = a.n_heads * (a.nope_dim + a.value_dim)
        tensors.take_linear(f"{i}.kv_up", f"{name}.kv_b_proj", rows, a.kv_rank)
    tensors.take_linear(f"{i}.o", f"{name}.o_proj", hidden, a.n_heads * a.value_dim, bias=bias)


def _take_indexer(tensors: Tensors, i: int, hidden: int, a: LatentAttentionSpec, x: IndexerSpec) -> None:
    name = f"model.layers.{i}.self_attn.indexer"
    assert a.query_rank is not None
    tensors.take_linear(f"{i}.index_q", f"{name}.wq_b", x.n_heads * x.head_dim, a.query_rank)
    tensors.take_linear(f"{i}.index_k", f"{name}.wk", x.head_dim, hidden)
    tensors.take(f"{i}.index_norm", f"{name}.k_norm.weight", x.head_dim)
    tensors.take(f"{i}.index_norm_bias", f"{name}.k_norm.bias", x.head_dim)
    tensors.take_linear(f"{i}.index_weights", f"{name}.weights_proj", x.n_heads, hidden)


def read(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a DeepSeek-V3, without the layers for multi-token prediction."""
    blocks = Blocks(config, sigmoid_router(config, default_scale=2.5), default_plain=3)
    return read_with(config, tensors, blocks, "deepseek_v3")


def read_with(
    config: Config,
    tensors: Tensors,
    blocks: Blocks,
    family: str,
    *,
    default_eps: float = 1e-6,
    indexers: Sequence[IndexerSpec] | None = None,
) -> ModelSpec:
    """ModelSpec of a model with latent attention and these feed-forward blocks.

    indexers: of each layer, where a token does not see all positions.
    """
    config.expect("hidden_act", "silu")
    hidden, n_layers = config.integer("hidden_size"), config.integer("num_hidden_layers")
    rope = Rope(config)
    attention = _attention(config, rope, indexers[0] if indexers else None)
    bias = config.flag("attention_bias", False)
    tied = common.take_ends(config, tensors)
    for i in range(n_layers):
        common.take_norms(tensors, i, hidden)
        _take_attention(tensors, i, hidden, attention, bias)
        if indexers and indexers[i].own:
            _take_indexer(tensors, i, hidden, attention, indexers[i])
        blocks.take(tensors, i)
    layers = common.number_layers(config, blocks.moe, [None] * n_layers)
    if indexers:
        layers = tuple(
            evolve(layer, attention=evolve(attention, indexer=x))
            for layer, x in zip(layers, indexers, strict=True)
        )
    return ModelSpec(
        family=family,
        vocab=config.integer("vocab_size"),
        hidden=hidden,
        norm_eps=config.number("rms_norm_eps", default=default_eps),
        max_positions=rope.max_positions,
        attention=attention,
        rope=rope.spec(attention.rope_dim, interleaved=config.flag("rope_interleave", True)),
        layers=layers,
        router=blocks.router,
        moe_inter=blocks.inter,
        dense_inter=blocks.dense_inter,
        shared_inter=blocks.shared_inter,
        tied_embeddings=tied,
    )
