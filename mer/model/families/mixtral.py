"""Mixtral: Llama's attention, optionally with a sliding window, and experts in every layer."""

from __future__ import annotations

from mer.model.families import common
from mer.model.families.config import Config
from mer.model.families.rope import Rope
from mer.model.families.tensors import ExpertNames, Tensors
from mer.model.spec import ModelSpec

EXPERTS = ExpertNames(
    gate="block_sparse_moe.experts.{e}.w1.weight",
    up="block_sparse_moe.experts.{e}.w3.weight",
    down="block_sparse_moe.experts.{e}.w2.weight",
)


def read(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a Mixtral, its parts taken from `tensors`."""
    config.expect("hidden_act", "silu")
    hidden, inter = config.integer("hidden_size"), config.integer("intermediate_size")
    n_layers = config.integer("num_hidden_layers")
    window = None if config.get("sliding_window") is None else config.integer("sliding_window")
    rope = Rope(config, default_theta=1e6)
    attention = common.grouped_attention(config)
    router = common.softmax_router(config, normalise=True)
    tied = common.take_ends(config, tensors)
    for i in range(n_layers):
        common.take_norms(tensors, i, hidden)
        common.take_grouped_attention(tensors, i, hidden, attention, qkv_bias=False, o_bias=False)
        # transformers 5 calls the block `mlp` in memory; published files have the older name.
        gate = f"model.layers.{i}.block_sparse_moe.gate"
        if not tensors.has(f"{gate}.weight"):
            gate = f"model.layers.{i}.mlp.gate"
        tensors.take_linear(f"{i}.router", gate, router.n_experts, hidden)
        tensors.take_experts(i, EXPERTS, router.n_experts, hidden, inter)
    return common.experts_everywhere(
        config,
        "mixtral",
        attention,
        rope,
        rope.spec(attention.head_dim, interleaved=config.flag("rope_interleave", False)),
        router,
        inter,
        tied=tied,
        default_eps=1e-5,
        window=window,
    )
