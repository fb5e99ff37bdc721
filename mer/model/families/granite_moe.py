"""Granite-MoE: Mixtral with multipliers for embedding, scores, residuals, logits; also a shared expert."""

from __future__ import annotations

from attrs import evolve

from mer.model.families import common
from mer.model.families.config import Config
from mer.model.families.rope import Rope
from mer.model.families.tensors import ExpertNames, Tensors
from mer.model.spec import ModelSpec

# Published files have all experts in one tensor.
_BOTH = "block_sparse_moe.input_linear.weight"
_DOWN = "block_sparse_moe.output_linear.weight"
EXPERTS = ExpertNames(gate=_BOTH, up=_BOTH, down=_DOWN, fused_gate_up=_BOTH, fused_down=_DOWN)


def _take_shared(tensors: Tensors, i: int, hidden: int, inter: int) -> None:
    name = f"model.layers.{i}.shared_mlp"
    if tensors.has(f"{name}.gate_proj.weight"):  # a GGUF has them apart
        tensors.take_linear(f"{i}.gate", f"{name}.gate_proj", inter, hidden)
        tensors.take_linear(f"{i}.up", f"{name}.up_proj", inter, hidden)
    else:
        tensors.take_linear(f"{i}.gate_up", f"{name}.input_linear", 2 * inter, hidden)
    tensors.take_linear(f"{i}.down", f"{name}.output_linear", hidden, inter)


def read(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a Granite-MoE, its parts taken from `tensors`."""
    config.expect("hidden_act", "silu")
    hidden, inter = config.integer("hidden_size"), config.integer("intermediate_size")
    n_layers = config.integer("num_hidden_layers")
    shared_inter = config.integer("shared_intermediate_size", default=0, minimum=0)
    bias = config.flag("attention_bias", False)
    rope = Rope(config)
    scale = config.number("attention_multiplier", default=1.0)
    attention = evolve(common.grouped_attention(config), scale=scale)
    # The softmax of the chosen logits alone is that of all, normalised.
    router = common.softmax_router(config, normalise=True)
    tied = common.take_ends(config, tensors)
    for i in range(n_layers):
        common.take_norms(tensors, i, hidden)
        common.take_grouped_attention(tensors, i, hidden, attention, qkv_bias=bias, o_bias=bias)
        block = f"model.layers.{i}.block_sparse_moe"
        tensors.take_linear(f"{i}.router", f"{block}.router.layer", router.n_experts, hidden)
        tensors.take_experts(i, EXPERTS, router.n_experts, hidden, inter)
        if shared_inter:
            _take_shared(tensors, i, hidden, shared_inter)
    spec = common.experts_everywhere(
        config,
        "granitemoeshared" if shared_inter else "granitemoe",
        attention,
        rope,
        rope.spec(attention.head_dim, interleaved=config.flag("rope_interleave", False)),
        router,
        inter,
        tied=tied,
        default_eps=1e-6,
        shared_inter=shared_inter,
    )
    return evolve(
        spec,
        embedding_scale=config.number("embedding_multiplier", default=1.0),
        residual_scale=config.number("residual_multiplier", default=1.0),
        logit_scale=1 / config.number("logits_scaling", default=1.0),
    )
