"""GLM-4-MoE (GLM-4.5 and later): half of each head turns, experts as DeepSeek-V3 has them. Solar Open."""

from __future__ import annotations

from mer.model.families import common
from mer.model.families.config import Config
from mer.model.families.deepseek_blocks import Blocks, sigmoid_router
from mer.model.families.rope import Rope
from mer.model.families.tensors import Tensors
from mer.model.spec import ModelSpec


def read(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a GLM-4-MoE, without the layers for multi-token prediction."""
    blocks = Blocks(config, sigmoid_router(config), default_plain=1)
    return _read(config, tensors, "glm4_moe", Rope(config, default_partial=0.5), blocks)


def read_solar_open(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a Solar Open, whose layers all have experts."""
    blocks = Blocks(config, sigmoid_router(config), default_plain=0)
    return _read(config, tensors, "solar_open", Rope(config, default_theta=1e6), blocks)


def _read(config: Config, tensors: Tensors, family: str, rope: Rope, blocks: Blocks) -> ModelSpec:
    config.expect("hidden_act", "silu")
    hidden, n_layers = config.integer("hidden_size"), config.integer("num_hidden_layers")
    qk_norm = config.flag("use_qk_norm", False)
    attention = common.grouped_attention(config, qk_norm="head" if qk_norm else "none")
    bias = config.flag("attention_bias", False)
    tied = common.take_ends(config, tensors)
    for i in range(n_layers):
        common.take_norms(tensors, i, hidden)
        common.take_grouped_attention(tensors, i, hidden, attention, qkv_bias=bias, o_bias=False)
        blocks.take(tensors, i)
    return ModelSpec(
        family=family,
        vocab=config.integer("vocab_size"),
        hidden=hidden,
        norm_eps=config.number("rms_norm_eps", default=1e-5),
        max_positions=rope.max_positions,
        attention=attention,
        rope=rope.spec(attention.head_dim, partial=True),
        layers=common.number_layers(config, blocks.moe, [None] * n_layers),
        router=blocks.router,
        moe_inter=blocks.inter,
        dense_inter=blocks.dense_inter,
        shared_inter=blocks.shared_inter,
        tied_embeddings=tied,
    )
