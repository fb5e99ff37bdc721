"""Ling and Ring: `bailing_moe`, q, k and v in one matrix; of 2.0 with DeepSeek-V3's choice of experts."""

from __future__ import annotations

from mer.model.families import common
from mer.model.families.config import Config
from mer.model.families.deepseek_blocks import Blocks, sigmoid_router
from mer.model.families.rope import Rope
from mer.model.families.tensors import Tensors
from mer.model.spec import AttentionSpec, ModelSpec


def _take_attention(tensors: Tensors, i: int, hidden: int, a: AttentionSpec) -> None:
    name = f"model.layers.{i}.attention"
    q, kv = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
    if tensors.has(f"{name}.query_key_value.weight"):
        tensors.take_linear(f"{i}.qkv", f"{name}.query_key_value", q + 2 * kv, hidden)
    else:  # as GGUF files have it
        tensors.take_linear(f"{i}.q", f"{name}.q_proj", q, hidden)
        tensors.take_linear(f"{i}.k", f"{name}.k_proj", kv, hidden)
        tensors.take_linear(f"{i}.v", f"{name}.v_proj", kv, hidden)
    tensors.take_linear(f"{i}.o", f"{name}.dense", hidden, q)
    if a.qk_norm == "head":
        tensors.take(f"{i}.q_norm", f"{name}.query_layernorm.weight", a.head_dim)
        tensors.take(f"{i}.k_norm", f"{name}.key_layernorm.weight", a.head_dim)


def read(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a Ling or Ring, without the layers for multi-token prediction."""
    config.expect("hidden_act", "silu")
    config.expect("use_bias", False)
    config.expect("use_qkv_bias", False)
    config.expect("norm_head", False)
    config.expect("score_function", "sigmoid")
    second = config.get("score_function") is not None  # 2.0
    hidden, n_layers = config.integer("hidden_size"), config.integer("num_hidden_layers")
    shared = config.integer("num_shared_experts", default=0, minimum=0)
    router = (
        sigmoid_router(config)
        if second
        else common.softmax_router(config, normalise=config.flag("norm_topk_prob", True))
    )
    blocks = Blocks(config.but(n_shared_experts=shared), router, default_plain=0)
    rope = Rope(config, default_theta=600000.0, default_partial=0.5 if second else 1.0)
    # True in GGUF files of the first.
    interleaved = config.flag("rope_interleave", False)
    qk_norm = config.flag("use_qk_norm", second)
    attention = common.grouped_attention(config, qk_norm="head" if qk_norm else "none")
    tied = common.take_ends(config, tensors, embedding="model.word_embeddings.weight")
    for i in range(n_layers):
        common.take_norms(tensors, i, hidden)
        _take_attention(tensors, i, hidden, attention)
        blocks.take(tensors, i, choice_bias="expert_bias")
    return ModelSpec(
        family="bailing_moe" if second else "bailing_moe_1",
        vocab=config.integer("vocab_size"),
        hidden=hidden,
        norm_eps=config.number("rms_norm_eps", default=1e-6),
        max_positions=rope.max_positions,
        attention=attention,
        rope=rope.spec(attention.head_dim, interleaved=interleaved, partial=True),
        layers=common.number_layers(config, blocks.moe, [None] * n_layers),
        router=router,
        moe_inter=blocks.inter,
        dense_inter=blocks.dense_inter,
        shared_inter=blocks.shared_inter,
        tied_embeddings=tied,
    )
