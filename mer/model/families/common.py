"""What several families have in common: most are Llama with experts."""

from __future__ import annotations

from typing import Literal

from mer.model.families.config import Config
from mer.model.families.rope import Rope
from mer.model.families.tensors import ExpertNames, Tensors
from mer.model.spec import AttentionSpec, LayerSpec, ModelSpec, RopeSpec, RouterSpec

MLP_EXPERTS = ExpertNames(
    gate="mlp.experts.{e}.gate_proj.weight",
    up="mlp.experts.{e}.up_proj.weight",
    down="mlp.experts.{e}.down_proj.weight",
)


def take_ends(
    config: Config,
    tensors: Tensors,
    *,
    default_tied: bool = False,
    embedding: str = "model.embed_tokens.weight",
) -> bool:
    """Embedding, final norm and head; returns whether the head is the embedding."""
    hidden, vocab = config.integer("hidden_size"), config.integer("vocab_size")
    tied = config.flag("tie_word_embeddings", default_tied)
    tensors.take("embedding", embedding, vocab, hidden)
    tensors.take("final_norm", "model.norm.weight", hidden)
    tensors.take("head", embedding if tied else "lm_head.weight", vocab, hidden)
    return tied


def take_norms(tensors: Tensors, layer: int, hidden: int) -> None:
    """The norms before attention and before the feed-forward block."""
    name = f"model.layers.{layer}"
    tensors.take(f"{layer}.attention_norm", f"{name}.input_layernorm.weight", hidden)
    tensors.take(f"{layer}.mlp_norm", f"{name}.post_attention_layernorm.weight", hidden)


def take_feed_forward(
    tensors: Tensors, layer: int, name: str, hidden: int, inter: int, *, bias: bool = False
) -> None:
    """gate, up and down of a plain feed-forward block or of a shared expert."""
    tensors.take_linear(f"{layer}.gate", f"{name}.gate_proj", inter, hidden, bias=bias)
    tensors.take_linear(f"{layer}.up", f"{name}.up_proj", inter, hidden, bias=bias)
    tensors.take_linear(f"{layer}.down", f"{name}.down_proj", hidden, inter, bias=bias)


def grouped_attention(
    config: Config,
    *,
    qk_norm: Literal["none", "head", "vector"] = "none",
    clip: float | None = None,
    default_head: int | None = None,
) -> AttentionSpec:
    """Sizes of grouped-query attention. default_head: elements of a head where the file does not say."""
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise config.wrong(
            f"num_attention_heads ({heads}) is no multiple of num_key_value_heads ({kv_heads})"
        )
    hidden = config.integer("hidden_size")
    if config.get("head_dim") is None and default_head is None and hidden % heads:
        raise config.wrong(f"hidden_size ({hidden}) is no multiple of num_attention_heads ({heads})")
    dim = config.integer("head_dim", default=default_head or hidden // heads)
    return AttentionSpec(heads, kv_heads, dim, dim**-0.5, qk_norm, clip)


def take_grouped_attention(
    tensors: Tensors,
    layer: int,
    hidden: int,
    a: AttentionSpec,
    *,
    qkv_bias: bool,
    o_bias: bool,
    v: bool = True,
    norms: tuple[str, str] = ("q_norm", "k_norm"),
) -> None:
    """q, k, v, o and their biases and norms. Without v, values are made of what k gives."""
    name = f"model.layers.{layer}.self_attn"
    q, kv = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
    tensors.take_linear(f"{layer}.q", f"{name}.q_proj", q, hidden, bias=qkv_bias)
    tensors.take_linear(f"{layer}.k", f"{name}.k_proj", kv, hidden, bias=qkv_bias)
    if v:
        tensors.take_linear(f"{layer}.v", f"{name}.v_proj", kv, hidden, bias=qkv_bias)
    tensors.take_linear(f"{layer}.o", f"{name}.o_proj", hidden, q, bias=o_bias)
    if a.qk_norm != "none":
        whole = a.qk_norm == "vector"
        tensors.take(f"{layer}.q_norm", f"{name}.{norms[0]}.weight", q if whole else a.head_dim)
        tensors.take(f"{layer}.k_norm", f"{name}.{norms[1]}.weight", kv if whole else a.head_dim)


def softmax_router(config: Config, *, normalise: bool) -> RouterSpec:
    """Softmax over all experts, then the best."""
    n = config.integer("num_experts", "num_local_experts", "n_routed_experts")
    top_k = config.integer("num_experts_per_tok")
    if top_k > n:
        raise config.wrong(f"num_experts_per_tok is {top_k}, but there are {n} experts")
    return RouterSpec(n, top_k, "softmax", normalise)


def layer_kinds(config: Config, n_layers: int, usual: list[str] | None, known: tuple[str, ...]) -> list[str]:
    """What each layer is by `layer_types`, or, where the file does not say, `usual`."""
    kinds = config.get("layer_types") or usual
    if not isinstance(kinds, list) or len(kinds) != n_layers:
        raise config.wrong(f"layer_types must name each of the {n_layers} layers")
    for kind in kinds:
        if kind not in known:
            raise config.unsupported(f"layer_types has {kind!r}; known are {', '.join(known)}")
    return kinds


def number_layers(
    config: Config, moe: list[bool], windows: list[int | None], recurrent: list[bool] | None = None
) -> tuple[LayerSpec, ...]:
    """LayerSpecs from what is MoE, which windows there are, and what has a state instead of attention."""
    state = recurrent or [False] * len(moe)
    if not any(moe):
        raise config.unsupported("no layer has experts, which models of this family have")
    return tuple(
        LayerSpec(window, sum(moe[:i]) if is_moe else None, state_index=sum(state[:i]) if state[i] else None)
        for i, (window, is_moe) in enumerate(zip(windows, moe, strict=True))
    )


def experts_everywhere(
    config: Config,
    family: str,
    attention: AttentionSpec,
    rope: Rope,
    turned: RopeSpec,
    router: RouterSpec,
    inter: int,
    *,
    tied: bool,
    default_eps: float,
    window: int | None = None,
    shared_inter: int = 0,
) -> ModelSpec:
    """ModelSpec of a model whose layers are all alike, with experts; turned: what a head's elements do."""
    n_layers = config.integer("num_hidden_layers")
    return ModelSpec(
        family=family,
        vocab=config.integer("vocab_size"),
        hidden=config.integer("hidden_size"),
        norm_eps=config.number("rms_norm_eps", default=default_eps),
        max_positions=rope.max_positions,
        attention=attention,
        rope=turned,
        layers=number_layers(config, [True] * n_layers, [window] * n_layers),
        router=router,
        moe_inter=inter,
        dense_inter=0,
        shared_inter=shared_inter,
        tied_embeddings=tied,
    )
