"""Phi-MoE (Phi-3.5-MoE): LayerNorms with biases, LongRoPE, experts chosen by turns (sparsemixer)."""

from __future__ import annotations

from attrs import evolve

from mer.model.families import common
from mer.model.families.config import Config
from mer.model.families.mixtral import EXPERTS
from mer.model.families.rope import Rope
from mer.model.families.tensors import Tensors
from mer.model.spec import ModelSpec


def read(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a Phi-MoE, its parts taken from `tensors`."""
    config.expect("hidden_act", "silu")
    # As many as sparsemixer is defined for.
    config.expect("num_experts_per_tok", 2)
    hidden, inter = config.integer("hidden_size"), config.integer("intermediate_size")
    n_layers = config.integer("num_hidden_layers")
    window = None if config.get("sliding_window") is None else config.integer("sliding_window")
    bias = config.flag("attention_bias", False)
    rope = Rope(config, default_theta=1e6)
    attention = common.grouped_attention(config)
    jitter = config.number("router_jitter_noise", default=0.01)
    router = evolve(common.softmax_router(config, normalise=False), score="sparsemixer", jitter=jitter)
    tied = common.take_ends(config, tensors)
    tensors.take("final_norm_bias", "model.norm.bias", hidden)
    if config.flag("lm_head_bias", False):
        tensors.take("head_bias", "lm_head.bias", config.integer("vocab_size"))
    for i in range(n_layers):
        name = f"model.layers.{i}"
        common.take_norms(tensors, i, hidden)
        tensors.take(f"{i}.attention_norm_bias", f"{name}.input_layernorm.bias", hidden)
        tensors.take(f"{i}.mlp_norm_bias", f"{name}.post_attention_layernorm.bias", hidden)
        common.take_grouped_attention(tensors, i, hidden, attention, qkv_bias=bias, o_bias=bias)
        tensors.take_linear(f"{i}.router", f"{name}.block_sparse_moe.gate", router.n_experts, hidden)
        tensors.take_experts(i, EXPERTS, router.n_experts, hidden, inter)
    return common.experts_everywhere(
        config,
        "phimoe",
        attention,
        rope,
        rope.spec(attention.head_dim),
        router,
        inter,
        tied=tied,
        default_eps=1e-5,
        window=window,
    )
