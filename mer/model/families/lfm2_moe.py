"""LFM2-MoE: most layers have a gated short convolution, the others attention; the first blocks are plain."""

from __future__ import annotations

from mer.model.families import common
from mer.model.families.config import Config
from mer.model.families.rope import Rope
from mer.model.families.tensors import ExpertNames, Tensors
from mer.model.spec import AttentionSpec, ModelSpec, RouterSpec, ShortConvSpec

_EXPERTS = ExpertNames(
    gate="feed_forward.experts.{e}.w1.weight",
    up="feed_forward.experts.{e}.w3.weight",
    down="feed_forward.experts.{e}.w2.weight",
    fused_gate_up="feed_forward.experts.gate_up_proj",
    fused_down="feed_forward.experts.down_proj",
    stacked_gate="feed_forward.experts.gate_proj",
    stacked_up="feed_forward.experts.up_proj",
)


def _take_conv(tensors: Tensors, i: int, hidden: int, kernel: int, *, bias: bool) -> None:
    name = f"model.layers.{i}.conv"
    tensors.take_linear(f"{i}.mix", f"{name}.in_proj", 3 * hidden, hidden, bias=bias)
    tensors.take_conv(f"{i}.conv", f"{name}.conv.weight", hidden, kernel)
    if bias:
        tensors.take(f"{i}.conv_bias", f"{name}.conv.bias", hidden)
    tensors.take_linear(f"{i}.o", f"{name}.out_proj", hidden, hidden, bias=bias)


def _take_attention(tensors: Tensors, i: int, hidden: int, a: AttentionSpec) -> None:
    name = f"model.layers.{i}.self_attn"
    q, kv = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
    tensors.take_linear(f"{i}.q", f"{name}.q_proj", q, hidden)
    tensors.take_linear(f"{i}.k", f"{name}.k_proj", kv, hidden)
    tensors.take_linear(f"{i}.v", f"{name}.v_proj", kv, hidden)
    tensors.take_linear(f"{i}.o", f"{name}.out_proj", hidden, q)
    tensors.take(f"{i}.q_norm", f"{name}.q_layernorm.weight", a.head_dim)
    tensors.take(f"{i}.k_norm", f"{name}.k_layernorm.weight", a.head_dim)


def _router(config: Config) -> RouterSpec:
    n, top_k = config.integer("num_experts"), config.integer("num_experts_per_tok")
    if top_k > n:
        raise config.wrong(f"num_experts_per_tok is {top_k}, but there are {n} experts")
    return RouterSpec(
        n_experts=n,
        top_k=top_k,
        score="sigmoid",
        normalise=config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", default=1.0),
        epsilon=1e-6 if config.flag("norm_topk_prob", True) else 0.0,
    )


def read(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of an LFM2-MoE, its parts taken from `tensors`."""
    hidden, inter = config.integer("hidden_size"), config.integer("moe_intermediate_size")
    n_layers, vocab = config.integer("num_hidden_layers"), config.integer("vocab_size")
    kinds = common.layer_kinds(config, n_layers, None, ("conv", "full_attention"))
    recurrent = [kind == "conv" for kind in kinds]
    plain = config.integer("num_dense_layers", default=2, minimum=0)
    dense_inter = config.integer("intermediate_size") if plain else 0
    kernel = config.integer("conv_L_cache", default=3, minimum=2)
    conv_bias, choice_bias = config.flag("conv_bias", False), config.flag("use_expert_bias", True)
    rope = Rope(config, default_theta=1e6)
    attention = common.grouped_attention(config, qk_norm="head")
    router = _router(config)
    tied = config.flag("tie_embedding", config.flag("tie_word_embeddings", True))
    tensors.take("embedding", "model.embed_tokens.weight", vocab, hidden)
    tensors.take("final_norm", "model.embedding_norm.weight", hidden)
    tensors.take("head", "model.embed_tokens.weight" if tied else "lm_head.weight", vocab, hidden)
    for i in range(n_layers):
        name = f"model.layers.{i}"
        tensors.take(f"{i}.attention_norm", f"{name}.operator_norm.weight", hidden)
        tensors.take(f"{i}.mlp_norm", f"{name}.ffn_norm.weight", hidden)
        if recurrent[i]:
            _take_conv(tensors, i, hidden, kernel, bias=conv_bias)
        else:
            _take_attention(tensors, i, hidden, attention)
        block = f"{name}.feed_forward"
        if i < plain:
            tensors.take_linear(f"{i}.gate", f"{block}.w1", dense_inter, hidden)
            tensors.take_linear(f"{i}.up", f"{block}.w3", dense_inter, hidden)
            tensors.take_linear(f"{i}.down", f"{block}.w2", hidden, dense_inter)
            continue
        tensors.take_linear(f"{i}.router", f"{block}.gate", router.n_experts, hidden)
        if choice_bias:
            tensors.take(f"{i}.router_choice_bias", f"{block}.expert_bias", router.n_experts)
        tensors.take_experts(i, _EXPERTS, router.n_experts, hidden, inter)
    return ModelSpec(
        family="lfm2_moe",
        vocab=vocab,
        hidden=hidden,
        norm_eps=config.number("norm_eps", default=1e-5),
        max_positions=rope.max_positions,
        attention=attention,
        rope=rope.spec(attention.head_dim),
        layers=common.number_layers(
            config, [i >= plain for i in range(n_layers)], [None] * n_layers, recurrent
        ),
        router=router,
        moe_inter=inter,
        dense_inter=dense_inter,
        shared_inter=0,
        tied_embeddings=tied,
        recurrent=ShortConvSpec(hidden, kernel) if any(recurrent) else None,
    )
