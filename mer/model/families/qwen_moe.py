"""Qwen2-MoE (biased projections, a gated shared expert) and Qwen3-MoE (normed heads, no shared expert)."""

from __future__ import annotations

from mer.model.families import common
from mer.model.families.config import Config
from mer.model.families.rope import Rope
from mer.model.families.tensors import Tensors
from mer.model.spec import ModelSpec


def read_qwen2(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a Qwen2-MoE, its parts taken from `tensors`."""
    n_layers = config.integer("num_hidden_layers")
    windows: list[int | None] = [None] * n_layers
    if config.flag("use_sliding_window", False):
        window = config.integer("sliding_window", default=4096)
        last = config.integer("max_window_layers", default=28, minimum=0)
        kinds = config.get("layer_types")
        if kinds is None:
            kinds = ["sliding_attention" if i % 2 == 0 and i < last else "full" for i in range(n_layers)]
        if not isinstance(kinds, list) or len(kinds) != n_layers:
            raise config.wrong(f"layer_types must name each of the {n_layers} layers")
        windows = [window if kind == "sliding_attention" else None for kind in kinds]
    return _read(
        config,
        tensors,
        windows,
        qkv_bias=config.flag("qkv_bias", True),
        o_bias=False,
        shared_inter=config.integer("shared_expert_intermediate_size", default=5632),
    )


def read_qwen3(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a Qwen3-MoE, its parts taken from `tensors`."""
    window = None
    if config.flag("use_sliding_window", False) and config.get("sliding_window") is not None:
        window = config.integer("sliding_window")
    bias = config.flag("attention_bias", False)
    windows = [window] * config.integer("num_hidden_layers")
    return _read(config, tensors, windows, qkv_bias=bias, o_bias=bias, shared_inter=0)


def _read(
    config: Config,
    tensors: Tensors,
    windows: list[int | None],
    *,
    qkv_bias: bool,
    o_bias: bool,
    shared_inter: int,
) -> ModelSpec:
    config.expect("hidden_act", "silu")
    hidden, inter = config.integer("hidden_size"), config.integer("moe_intermediate_size")
    n_layers = len(windows)
    step = config.integer("decoder_sparse_step", default=1)
    plain = config.integers("mlp_only_layers")
    moe = [i not in plain and (i + 1) % step == 0 for i in range(n_layers)]
    dense_inter = 0 if all(moe) else config.integer("intermediate_size")
    rope = Rope(config)
    attention = common.grouped_attention(config, qk_norm="none" if shared_inter else "head")
    router = common.softmax_router(config, normalise=config.flag("norm_topk_prob", False))
    tied = common.take_ends(config, tensors)
    for i in range(n_layers):
        block = f"model.layers.{i}.mlp"
        common.take_norms(tensors, i, hidden)
        common.take_grouped_attention(tensors, i, hidden, attention, qkv_bias=qkv_bias, o_bias=o_bias)
        if not moe[i]:
            common.take_feed_forward(tensors, i, block, hidden, dense_inter)
            continue
        tensors.take_linear(f"{i}.router", f"{block}.gate", router.n_experts, hidden)
        tensors.take_experts(i, common.MLP_EXPERTS, router.n_experts, hidden, inter)
        if shared_inter:
            common.take_feed_forward(tensors, i, f"{block}.shared_expert", hidden, shared_inter)
            tensors.take_linear(f"{i}.shared_gate", f"{block}.shared_expert_gate", 1, hidden)
    return ModelSpec(
        family="qwen2_moe" if shared_inter else "qwen3_moe",
        vocab=config.integer("vocab_size"),
        hidden=hidden,
        norm_eps=config.number("rms_norm_eps", default=1e-6),
        max_positions=rope.max_positions,
        attention=attention,
        rope=rope.spec(attention.head_dim),
        layers=common.number_layers(config, moe, windows),
        router=router,
        moe_inter=inter,
        dense_inter=dense_inter,
        shared_inter=shared_inter,
        shared_gate=bool(shared_inter),
        tied_embeddings=tied,
    )
