"""FlexOlmo: OLMoE with norms behind attention and experts, not before them."""

from __future__ import annotations

from mer.model.families import common
from mer.model.families.config import Config
from mer.model.families.rope import Rope
from mer.model.families.tensors import Tensors
from mer.model.spec import ModelSpec


def read(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a FlexOlmo, its parts taken from `tensors`."""
    config.expect("hidden_act", "silu")
    hidden, inter = config.integer("hidden_size"), config.integer("intermediate_size")
    n_layers = config.integer("num_hidden_layers")
    bias = config.flag("attention_bias", False)
    rope = Rope(config, default_theta=500000.0)
    attention = common.grouped_attention(config, qk_norm="vector")
    router = common.softmax_router(config, normalise=config.flag("norm_topk_prob", False))
    tied = common.take_ends(config, tensors)
    for i in range(n_layers):
        name = f"model.layers.{i}"
        tensors.take(f"{i}.attention_out_norm", f"{name}.post_attention_layernorm.weight", hidden)
        tensors.take(f"{i}.mlp_out_norm", f"{name}.post_feedforward_layernorm.weight", hidden)
        common.take_grouped_attention(tensors, i, hidden, attention, qkv_bias=bias, o_bias=bias)
        tensors.take_linear(f"{i}.router", f"{name}.mlp.gate", router.n_experts, hidden)
        tensors.take_experts(i, common.MLP_EXPERTS, router.n_experts, hidden, inter)
    return common.experts_everywhere(
        config,
        "flex_olmo",
        attention,
        rope,
        rope.spec(attention.head_dim),
        router,
        inter,
        tied=tied,
        default_eps=1e-6,
    )
