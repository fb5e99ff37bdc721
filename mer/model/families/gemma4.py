"""Gemma-4, with experts and without: layers with a window and global ones, norms around each block, GELU."""

from __future__ import annotations

from typing import Any, Final

from attrs import evolve

from mer.model.families import common
from mer.model.families.config import Config
from mer.model.families.rope import Rope
from mer.model.families.tensors import ExpertNames, Tensors
from mer.model.spec import AttentionSpec, LayerSpec, ModelSpec, RouterSpec

_LOCAL: Final = "sliding_attention"
_GLOBAL: Final = "full_attention"
_ROPE: Final[dict[str, Any]] = {
    _LOCAL: {"rope_type": "default", "rope_theta": 10_000.0},
    _GLOBAL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
_EXPERTS: Final = ExpertNames(
    gate="experts.{e}.gate_proj.weight",
    up="experts.{e}.up_proj.weight",
    down="experts.{e}.down_proj.weight",
    fused_gate_up="experts.gate_up_proj",
    fused_down="experts.down_proj",
    stacked_gate="experts.gate_proj",
    stacked_up="experts.up_proj",
)
# Of a layer: norms, and where they stand.
_NORMS: Final = {
    "attention_norm": "input_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
# With experts, the plain block is what they have beside them.
_MOE_NORMS: Final = {
    "shared_norm": "pre_feedforward_layernorm",
    "shared_out_norm": "post_feedforward_layernorm_1",
    "mlp_norm": "pre_feedforward_layernorm_2",
    "routed_out_norm": "post_feedforward_layernorm_2",
}


def read(outer: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of the text model of a Gemma-4, its parts taken from `tensors`."""
    config, tensors = outer.inner("text_config"), tensors.inside("language_model")
    _refuse(config)
    hidden, inter = config.integer("hidden_size"), config.integer("intermediate_size")
    router = _router(config, hidden) if config.flag("enable_moe_block", False) else None
    moe_inter = config.integer("moe_intermediate_size") if router else 0
    kinds = _kinds(config)
    attention = _attention(config)
    ropes = {kind: Rope(config, default=_ROPE, kind=kind) for kind in (_LOCAL, _GLOBAL)}
    window = config.integer("sliding_window", default=512)
    bias = config.flag("attention_bias", False)
    one_projection = config.flag("attention_k_eq_v", False)
    tied = common.take_ends(config, tensors, default_tied=True)
    layers = []
    for i, kind in enumerate(kinds):
        name, a = f"model.layers.{i}", _of_layer(config, i, kind, attention)
        rope = ropes[kind].spec(a.head_dim)
        layers.append(
            LayerSpec(window if kind == _LOCAL else None, i if router else None, attention=a, rope=rope)
        )
        for part, norm in (_NORMS | (_MOE_NORMS if router else {})).items():
            tensors.take(f"{i}.{part}", f"{name}.{norm}.weight", hidden)
        common.take_grouped_attention(
            tensors, i, hidden, a, qkv_bias=bias, o_bias=bias, v=kind == _LOCAL or not one_projection
        )
        common.take_feed_forward(tensors, i, f"{name}.mlp", hidden, inter)
        tensors.take(f"{i}.layer_scale", f"{name}.layer_scalar", 1)
        if router:
            n = router.n_experts
            tensors.take_linear(f"{i}.router", f"{name}.router.proj", n, hidden)
            tensors.take(f"{i}.router_norm", f"{name}.router.scale", hidden)
            tensors.take(f"{i}.router_expert_scale", f"{name}.router.per_expert_scale", n)
            tensors.take_experts(i, _EXPERTS, n, hidden, moe_inter)
    cap = config.get("final_logit_softcapping")
    return ModelSpec(
        family="gemma4_text",
        vocab=config.integer("vocab_size"),
        hidden=hidden,
        norm_eps=config.number("rms_norm_eps", default=1e-6),
        max_positions=ropes[_GLOBAL].max_positions,
        attention=attention,
        rope=ropes[_LOCAL].spec(attention.head_dim),
        layers=tuple(layers),
        router=router,
        moe_inter=moe_inter,
        dense_inter=0 if router else inter,
        shared_inter=inter if router else 0,
        tied_embeddings=tied,
        embedding_scale=hidden**0.5,
        logit_cap=None if cap is None else config.number("final_logit_softcapping"),
        activation="gelu",
    )


def _refuse(config: Config) -> None:
    """What other models of this family have."""
    config.expect("hidden_activation", "gelu_pytorch_tanh")
    config.expect("hidden_size_per_layer_input", 0)
    config.expect("num_kv_shared_layers", 0)
    config.expect("use_bidirectional_attention", "vision")


def _router(config: Config, hidden: int) -> RouterSpec:
    n, top_k = config.integer("num_experts"), config.integer("top_k_experts", "num_experts_per_tok")
    if top_k > n:
        raise config.wrong(f"top_k_experts is {top_k}, but there are {n} experts")
    return RouterSpec(n, top_k, "softmax", normalise=True, norm_scale=hidden**-0.5)


def _kinds(config: Config) -> list[str]:
    """What each layer is: every sixth sees all, and the last."""
    n_layers = config.integer("num_hidden_layers")
    kinds = config.get("layer_types") or [_LOCAL if (i + 1) % 6 else _GLOBAL for i in range(n_layers)]
    if not isinstance(kinds, list) or len(kinds) != n_layers or set(kinds) - {_LOCAL, _GLOBAL}:
        raise config.wrong(f"layer_types must say {_LOCAL} or {_GLOBAL} for each of the {n_layers} layers")
    return [*kinds[:-1], _GLOBAL]


def _attention(config: Config) -> AttentionSpec:
    """Of the layers with a window."""
    heads, dim = config.integer("num_attention_heads"), config.integer("head_dim", default=256)
    return _checked(
        config,
        AttentionSpec(heads, config.integer("num_key_value_heads", default=4), dim, 1.0, "head", v_norm=True),
    )


def _of_layer(config: Config, i: int, kind: str, local: AttentionSpec) -> AttentionSpec:
    """Of one layer: by the file's list of exceptions, or, without it, by what global layers have."""
    if config.get("per_layer_config") is not None:
        own = config.inner("per_layer_config").inner(str(i))
        dim = own.integer("head_dim", default=local.head_dim)
        kv_heads = own.integer("num_key_value_heads", default=local.n_kv_heads)
    elif kind == _LOCAL:
        return local
    else:
        dim, kv_heads = config.integer("global_head_dim", default=512), local.n_kv_heads
        if config.flag("attention_k_eq_v", False):
            kv_heads = config.integer("num_global_key_value_heads", default=kv_heads)
    return _checked(config, evolve(local, head_dim=dim, n_kv_heads=kv_heads))


def _checked(config: Config, a: AttentionSpec) -> AttentionSpec:
    if a.n_heads % a.n_kv_heads:
        raise config.wrong(
            f"num_attention_heads ({a.n_heads}) is no multiple of {a.n_kv_heads} heads of keys"
        )
    return a
