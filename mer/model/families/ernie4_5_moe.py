"""ERNIE 4.5 with experts: neighbours turn together, a bias takes part in the choice, not in the weights."""

from __future__ import annotations

from mer.model.families import common
from mer.model.families.config import Config
from mer.model.families.rope import Rope
from mer.model.families.tensors import Tensors
from mer.model.spec import ModelSpec, RouterSpec


def read(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of an ERNIE 4.5 MoE, without the layers for multi-token prediction."""
    config.expect("hidden_act", "silu")
    config.expect("use_bias", False)
    hidden, inter = config.integer("hidden_size"), config.integer("moe_intermediate_size", default=1536)
    moe = _which_are_moe(config)
    dense_inter = 0 if all(moe) else config.integer("intermediate_size")
    shared_inter = inter * config.integer("moe_num_shared_experts", default=2, minimum=0)
    rope = Rope(config, default_theta=5e5)
    attention = common.grouped_attention(config)
    router = _router(config)
    tied = common.take_ends(config, tensors)
    for i, has_experts in enumerate(moe):
        block = f"model.layers.{i}.mlp"
        common.take_norms(tensors, i, hidden)
        common.take_grouped_attention(tensors, i, hidden, attention, qkv_bias=False, o_bias=False)
        if not has_experts:
            common.take_feed_forward(tensors, i, block, hidden, dense_inter)
            continue
        tensors.take_linear(f"{i}.router", f"{block}.gate", router.n_experts, hidden)
        bias = f"{block}.moe_statics.e_score_correction_bias"
        tensors.take(f"{i}.router_choice_bias", bias, 1, router.n_experts)
        tensors.take_experts(i, common.MLP_EXPERTS, router.n_experts, hidden, inter)
        if shared_inter:
            common.take_feed_forward(tensors, i, f"{block}.shared_experts", hidden, shared_inter)
    return ModelSpec(
        family="ernie4_5_moe",
        vocab=config.integer("vocab_size"),
        hidden=hidden,
        norm_eps=config.number("rms_norm_eps", default=1e-5),
        max_positions=rope.max_positions,
        attention=attention,
        rope=rope.spec(attention.head_dim, interleaved=True),
        layers=common.number_layers(config, moe, [None] * len(moe)),
        router=router,
        moe_inter=inter,
        dense_inter=dense_inter,
        shared_inter=shared_inter,
        tied_embeddings=tied,
    )


def _router(config: Config) -> RouterSpec:
    n = config.integer("moe_num_experts", "num_experts", default=64)
    top_k = config.integer("moe_k", "num_experts_per_tok", default=6)
    if top_k > n:
        raise config.wrong(f"moe_k is {top_k}, but there are {n} experts")
    return RouterSpec(n, top_k, "softmax", normalise=True)


def _which_are_moe(config: Config) -> list[bool]:
    """Each interval-th layer, of those from the first to the last that may be one."""
    n_layers = config.integer("num_hidden_layers")
    first = config.integer("moe_layer_start_index", default=1, minimum=0)
    last = config.get("moe_layer_end_index")
    if last in (None, -1):
        last = n_layers - 1
    elif type(last) is not int:
        raise config.wrong(f"moe_layer_end_index is {last!r}, it must be a layer's number")
    interval = config.integer("moe_layer_interval", default=1)
    return [first <= i <= last and (i + 1) % interval == 0 for i in range(n_layers)]
