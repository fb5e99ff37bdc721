"""MiniMax-M2: query and key normed as whole vectors, heads turn in part; sigmoid routing with a bias."""

from __future__ import annotations

from attrs import evolve

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
    """ModelSpec of a MiniMax-M2, without the layers for multi-token prediction."""
    config.expect("hidden_act", "silu")
    config.expect("scoring_func", "sigmoid")
    config.expect("use_qk_norm", True)
    config.expect("qk_norm_type", "per_layer")
    config.expect("use_routing_bias", True)
    hidden, inter = config.integer("hidden_size"), config.integer("intermediate_size")
    n_layers = config.integer("num_hidden_layers")
    if any(kind != 1 for kind in config.integers("attn_type_list")):
        raise config.unsupported("attn_type_list has layers of linear attention, which are not supported")
    attention = common.grouped_attention(config, qk_norm="vector")
    turned = config.integer("rotary_dim", default=attention.head_dim)
    rope = Rope(config, default_theta=5e6, default_partial=turned / attention.head_dim)
    router = evolve(common.softmax_router(config, normalise=True), score="sigmoid")
    n = router.n_experts
    tied = common.take_ends(config, tensors)
    for i in range(n_layers):
        common.take_norms(tensors, i, hidden)
        common.take_grouped_attention(tensors, i, hidden, attention, qkv_bias=False, o_bias=False)
        block = f"model.layers.{i}.block_sparse_moe"
        tensors.take_linear(f"{i}.router", f"{block}.gate", n, hidden)
        tensors.take(f"{i}.router_choice_bias", f"{block}.e_score_correction_bias", n)
        tensors.take_experts(i, EXPERTS, n, hidden, inter)
    return common.experts_everywhere(
        config,
        "minimax_m2",
        attention,
        rope,
        rope.spec(attention.head_dim, partial=True),
        router,
        inter,
        tied=tied,
        default_eps=1e-6,
    )
