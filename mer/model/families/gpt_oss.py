"""GPT-OSS: biases everywhere, attention sinks, every other layer with a window, a SwiGLU with clamps."""

from __future__ import annotations

from typing import Any, Final

from attrs import evolve

from mer.model.families import common
from mer.model.families.config import Config
from mer.model.families.rope import Rope
from mer.model.families.tensors import Tensors
from mer.model.spec import ClampSpec, ModelSpec

_ROPE: Final[dict[str, Any]] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a GPT-OSS, its parts taken from `tensors`."""
    config.expect("hidden_act", "silu")
    hidden, inter = config.integer("hidden_size"), config.integer("intermediate_size")
    n_layers = config.integer("num_hidden_layers")
    window = config.integer("sliding_window", default=128)
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(n_layers)]
    if not isinstance(kinds, list) or len(kinds) != n_layers:
        raise config.wrong(f"layer_types must name each of the {n_layers} layers")
    rope = Rope(config, default_theta=150000.0, default=_ROPE)
    attention = evolve(common.grouped_attention(config), sinks=True)
    # The softmax of the chosen logits alone is that of all, normalised.
    router = common.softmax_router(config, normalise=True)
    bias = config.flag("attention_bias", True)
    tied = common.take_ends(config, tensors)
    for i in range(n_layers):
        name = f"model.layers.{i}"
        common.take_norms(tensors, i, hidden)
        common.take_grouped_attention(tensors, i, hidden, attention, qkv_bias=bias, o_bias=bias)
        tensors.take(f"{i}.sinks", f"{name}.self_attn.sinks", attention.n_heads)
        tensors.take_linear(f"{i}.router", f"{name}.mlp.router", router.n_experts, hidden, bias=True)
        experts, n = f"{name}.mlp.experts", router.n_experts
        tensors.take(f"{i}.expert_down_bias", f"{experts}.down_proj_bias", n, hidden)
        if tensors.has(f"{experts}.gate_proj_bias"):  # as a GGUF has them
            tensors.take(f"{i}.expert_gate_bias", f"{experts}.gate_proj_bias", n, inter)
            tensors.take(f"{i}.expert_up_bias", f"{experts}.up_proj_bias", n, inter)
            tensors.take_experts(i, common.MLP_EXPERTS, n, hidden, inter)
        else:
            tensors.take(f"{i}.expert_gate_up_bias", f"{experts}.gate_up_proj_bias", n, 2 * inter)
            tensors.take_interleaved_experts(i, n, hidden, inter)
    return ModelSpec(
        family="gpt_oss",
        vocab=config.integer("vocab_size"),
        hidden=hidden,
        norm_eps=config.number("rms_norm_eps", default=1e-5),
        max_positions=rope.max_positions,
        attention=attention,
        rope=rope.spec(attention.head_dim),
        layers=common.number_layers(
            config, [True] * n_layers, [window if kind == "sliding_attention" else None for kind in kinds]
        ),
        router=router,
        moe_inter=inter,
        dense_inter=0,
        shared_inter=0,
        tied_embeddings=tied,
        expert_bias=True,
        clamp=ClampSpec(
            config.number("swiglu_alpha", default=1.702), config.number("swiglu_limit", default=7.0)
        ),
    )
