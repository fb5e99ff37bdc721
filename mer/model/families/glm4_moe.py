"""GLM-4-MoE (GLM-4.5 and later): half of each head turns; routing and shared experts as in DeepSeek-V3."""

from __future__ import annotations

from mer.model.families import common
from mer.model.families.config import Config
from mer.model.families.deepseek_blocks import Blocks, sigmoid_router
from mer.model.families.rope import Rope
from mer.model.families.tensors import Tensors
from mer.model.spec import ModelSpec


def read(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a GLM-4-MoE, without the layers for multi-token prediction."""
    config.expect("hidden_act", "silu")
    hidden, n_layers = config.integer("hidden_size"), config.integer("num_hidden_layers")
    rope = Rope(config, default_partial=0.5)
    attention = common.grouped_attention(
        config, qk_norm="head" if config.flag("use_qk_norm", False) else "none"
    )
    blocks = Blocks(config, sigmoid_router(config), default_plain=1)
    bias = config.flag("attention_bias", False)
    tied = common.take_ends(config, tensors)
    for i in range(n_layers):
        common.take_norms(tensors, i, hidden)
        common.take_grouped_attention(tensors, i, hidden, attention, qkv_bias=bias, o_bias=False)
        blocks.take(tensors, i)
    return ModelSpec(
        family="glm4_moe",
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
