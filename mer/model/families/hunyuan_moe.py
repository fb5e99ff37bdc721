"""Hunyuan-MoE (Hunyuan-A13B): heads of query and key normed behind the rotary embedding; a shared expert."""

from __future__ import annotations

from typing import Any

from attrs import evolve

from mer.model.families import common
from mer.model.families.config import Config
from mer.model.families.rope import Rope
from mer.model.families.tensors import Tensors
from mer.model.spec import ModelSpec, RouterSpec


def _of_all_layers(config: Config, name: str, default: int | None = None) -> int:
    """A number that may be a list with one for each layer, all the same."""
    value: Any = config.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, list) and value:
        if any(type(each) is not int for each in value):
            raise config.wrong(f"{name} is {value!r}, it must be whole numbers")
        if len(set(value)) > 1:
            raise config.unsupported(f"{name} differs by layer, which is not supported")
        value = value[0]
    if type(value) is not int or value < 1:
        raise config.wrong(f"{name} is {value!r}, it must be a whole number of at least 1")
    return value


def _router(config: Config) -> RouterSpec:
    n, top_k = _of_all_layers(config, "num_experts"), _of_all_layers(config, "moe_topk")
    if top_k > n:
        raise config.wrong(f"moe_topk is {top_k}, but there are {n} experts")
    return RouterSpec(n, top_k, "softmax", normalise=True)


def read(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a Hunyuan-MoE, its parts taken from `tensors`."""
    config.expect("hidden_act", "silu")
    config.expect("use_cla", False)
    config.expect("use_qk_norm", True)
    hidden, n_layers = config.integer("hidden_size"), config.integer("num_hidden_layers")
    inter = config.integer("intermediate_size")
    expert_inter = _of_all_layers(config, "moe_intermediate_size", default=inter)
    shared_inter = inter * _of_all_layers(config, "num_shared_expert", default=1)
    bias = config.flag("attention_bias", False)
    rope = Rope(config)
    attention = evolve(common.grouped_attention(config, qk_norm="head"), qk_norm_last=True)
    router = _router(config)
    tied = common.take_ends(config, tensors)
    for i in range(n_layers):
        block = f"model.layers.{i}.mlp"
        common.take_norms(tensors, i, hidden)
        common.take_grouped_attention(
            tensors, i, hidden, attention, qkv_bias=bias, o_bias=bias,
            norms=("query_layernorm", "key_layernorm"),
        )  # fmt: skip
        tensors.take_linear(f"{i}.router", f"{block}.gate.wg", router.n_experts, hidden)
        tensors.take_experts(i, common.MLP_EXPERTS, router.n_experts, hidden, expert_inter)
        common.take_feed_forward(tensors, i, f"{block}.shared_mlp", hidden, shared_inter)
    return common.experts_everywhere(
        config,
        "hunyuan_v1_moe",
        attention,
        rope,
        rope.spec(attention.head_dim),
        router,
        expert_inter,
        tied=tied,
        default_eps=1e-5,
        shared_inter=shared_inter,
    )
