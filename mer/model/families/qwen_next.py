"""Qwen3-Next and Qwen3.5-MoE: most layers have the gated delta rule, others attention with a gated output."""

from __future__ import annotations

from attrs import evolve

from mer.model.families import common
from mer.model.families.config import Config
from mer.model.families.rope import Rope
from mer.model.families.tensors import Tensors
from mer.model.spec import AttentionSpec, DeltaSpec, ModelSpec


def read_qwen3_next(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a Qwen3-Next, without the layers for multi-token prediction."""
    return _read("qwen3_next", config, tensors)


def read_qwen3_5(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a Qwen3.5-MoE's language model, for text: M-RoPE's three positions are the same then."""
    return _read("qwen3_5_moe_text", config.inner("text_config"), tensors.inside("language_model"))


def longer(config: Config, main: ModelSpec) -> Config:
    """As if the layer for multi-token prediction, with attention and experts, were one more of `main`."""
    kinds = ["full_attention" if each.state_index is None else "linear_attention" for each in main.layers]
    values = {
        "num_hidden_layers": main.n_layers + 1,
        "layer_types": [*kinds, "full_attention"],
        "mlp_only_layers": [i for i, each in enumerate(main.layers) if each.moe_index is None],
        "decoder_sparse_step": 1,
    }
    inner = config.get("text_config")
    return config.but(**({"text_config": inner | values} if isinstance(inner, dict) else values))


def _delta(config: Config) -> DeltaSpec:
    keys = config.integer("linear_num_key_heads", default=16)
    values = config.integer("linear_num_value_heads", default=32)
    if values % keys:
        raise config.wrong(
            f"linear_num_value_heads ({values}) is no multiple of linear_num_key_heads ({keys})"
        )
    return DeltaSpec(
        key_heads=keys,
        value_heads=values,
        key_dim=config.integer("linear_key_head_dim", default=128),
        value_dim=config.integer("linear_value_head_dim", default=128),
        kernel=config.integer("linear_conv_kernel_dim", default=4, minimum=2),
        tiled=config.flag("linear_tiled_value_heads", False),
    )


def _take_delta(tensors: Tensors, i: int, hidden: int, d: DeltaSpec) -> None:
    name = f"model.layers.{i}.linear_attn"
    if tensors.has(f"{name}.in_proj_qkvz.weight"):
        tensors.take_linear(f"{i}.mix_and_z", f"{name}.in_proj_qkvz", d.channels + d.out_width, hidden)
    else:
        tensors.take_linear(f"{i}.mix", f"{name}.in_proj_qkv", d.channels, hidden)
        tensors.take_linear(f"{i}.z", f"{name}.in_proj_z", d.out_width, hidden)
    if tensors.has(f"{name}.in_proj_ba.weight"):
        tensors.take_linear(f"{i}.b_and_a", f"{name}.in_proj_ba", 2 * d.value_heads, hidden)
    else:
        tensors.take_linear(f"{i}.b", f"{name}.in_proj_b", d.value_heads, hidden)
        tensors.take_linear(f"{i}.a", f"{name}.in_proj_a", d.value_heads, hidden)
    if tensors.has(f"{name}.decay_rate"):  # as a GGUF has it: what is made of A_log
        tensors.take(f"{i}.decay_rate", f"{name}.decay_rate", d.value_heads)
    else:
        tensors.take(f"{i}.a_log", f"{name}.A_log", d.value_heads)
    tensors.take(f"{i}.dt_bias", f"{name}.dt_bias", d.value_heads)
    tensors.take_conv(f"{i}.conv", f"{name}.conv1d.weight", d.channels, d.kernel)
    tensors.take(f"{i}.state_norm", f"{name}.norm.weight", d.value_dim)
    tensors.take_linear(f"{i}.o", f"{name}.out_proj", hidden, d.out_width)


def _take_attention(tensors: Tensors, i: int, hidden: int, a: AttentionSpec) -> None:
    name = f"model.layers.{i}.self_attn"
    q, kv = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
    tensors.take_linear(f"{i}.q_and_gate", f"{name}.q_proj", 2 * q, hidden)
    tensors.take_linear(f"{i}.k", f"{name}.k_proj", kv, hidden)
    tensors.take_linear(f"{i}.v", f"{name}.v_proj", kv, hidden)
    tensors.take_linear(f"{i}.o", f"{name}.o_proj", hidden, q)
    tensors.take(f"{i}.q_norm", f"{name}.q_norm.weight", a.head_dim)
    tensors.take(f"{i}.k_norm", f"{name}.k_norm.weight", a.head_dim)


def _read(family: str, config: Config, tensors: Tensors) -> ModelSpec:
    config.expect("hidden_act", "silu")
    config.expect("attention_bias", False)
    config.expect("attn_output_gate", True)
    hidden, inter = config.integer("hidden_size"), config.integer("moe_intermediate_size")
    shared_inter = config.integer("shared_expert_intermediate_size")
    n_layers = config.integer("num_hidden_layers")
    interval = config.integer("full_attention_interval", default=4)
    usual = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(n_layers)]
    recurrent = [
        kind == "linear_attention"
        for kind in common.layer_kinds(config, n_layers, usual, ("linear_attention", "full_attention"))
    ]
    step = config.integer("decoder_sparse_step", default=1)
    plain = config.integers("mlp_only_layers")
    moe = [i not in plain and (i + 1) % step == 0 for i in range(n_layers)]
    dense_inter = 0 if all(moe) else config.integer("intermediate_size")
    rope = Rope(config, default_partial=0.25)
    attention = evolve(common.grouped_attention(config, qk_norm="head", default_head=256), gated=True)
    delta = _delta(config)
    router = common.softmax_router(config, normalise=config.flag("norm_topk_prob", True))
    tied = common.take_ends(config, tensors)
    for i in range(n_layers):
        common.take_norms(tensors, i, hidden)
        if recurrent[i]:
            _take_delta(tensors, i, hidden, delta)
        else:
            _take_attention(tensors, i, hidden, attention)
        block = f"model.layers.{i}.mlp"
        if not moe[i]:
            common.take_feed_forward(tensors, i, block, hidden, dense_inter)
            continue
        tensors.take_linear(f"{i}.router", f"{block}.gate", router.n_experts, hidden)
        tensors.take_experts(i, common.MLP_EXPERTS, router.n_experts, hidden, inter)
        common.take_feed_forward(tensors, i, f"{block}.shared_expert", hidden, shared_inter)
        tensors.take_linear(f"{i}.shared_gate", f"{block}.shared_expert_gate", 1, hidden)
    return ModelSpec(
        family=family,
        vocab=config.integer("vocab_size"),
        hidden=hidden,
        norm_eps=config.number("rms_norm_eps", default=1e-6),
        max_positions=rope.max_positions,
        attention=attention,
        rope=rope.spec(attention.head_dim, partial=True),
        layers=common.number_layers(config, moe, [None] * n_layers, recurrent),
        router=router,
        moe_inter=inter,
        dense_inter=dense_inter,
        shared_inter=shared_inter,
        shared_gate=True,
        tied_embeddings=tied,
        recurrent=delta if any(recurrent) else None,
        zero_centred_norms=config.flag("zero_centred_norms", True),
    )
