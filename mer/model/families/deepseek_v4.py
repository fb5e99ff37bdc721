"""DeepSeek-V4: streams, a window beside compressed positions, experts chosen by token in some layers."""

from __future__ import annotations

from attrs import evolve

from mer.model.families import common
from mer.model.families.config import Config
from mer.model.families.rope import Rope
from mer.model.families.tensors import ExpertNames, Tensors
from mer.model.kv import BLOCK
from mer.model.spec import (
    ClampSpec,
    CompressedAttentionSpec,
    LayerSpec,
    ModelSpec,
    RopeSpec,
    StreamsSpec,
)

_EXPERTS = ExpertNames(
    gate="ffn.experts.{e}.w1.weight",
    up="ffn.experts.{e}.w3.weight",
    down="ffn.experts.{e}.w2.weight",
)
_WINDOW, _SPARSE, _HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
# As `compress_ratios` says it, of older files.
_OF_RATIO = {0: _WINDOW, 4: _SPARSE, 128: _HEAVY}
_MOST_STREAMS = 16


def read(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a DeepSeek-V4, without the layers for multi-token prediction."""
    for name, only in ("hidden_act", "silu"), ("scoring_func", "sqrtsoftplus"), ("norm_topk_prob", True):
        config.expect(name, only)
    for name in "attention_bias", "mlp_bias", "tie_word_embeddings":
        config.expect(name, False)
    config.expect("num_key_value_heads", 1)
    tensors = tensors.without_root()
    hidden, n_layers = config.integer("hidden_size"), config.integer("num_hidden_layers")
    vocab, inter = config.integer("vocab_size"), config.integer("moe_intermediate_size")
    ropes, max_positions = _ropes(config)
    of_kind = _attentions(config, 2 * len(ropes[_WINDOW].inv_freq))
    kinds = _kinds(config, n_layers)
    streams = _streams(config)
    router = evolve(
        common.softmax_router(config, normalise=True),
        score="sqrt_softplus",
        scale=config.number("routed_scaling_factor", default=1.5),
        epsilon=1e-20,
    )
    by_token = _by_token(config, n_layers)
    shared = inter * config.integer("n_shared_experts", default=1)
    tensors.take("embedding", _first(tensors, "model.embed_tokens.weight", "embed.weight"), vocab, hidden)
    tensors.take("final_norm", "model.norm.weight", hidden)
    tensors.take("head", _first(tensors, "head.weight", "lm_head.weight"), vocab, hidden)
    head = _first(tensors, "model.hc_head.hc_", "model.hc_head_", end="fn")
    _take_streams(tensors, "head", head, streams.n, streams.n * hidden, scales=1)
    for i, kind in enumerate(kinds):
        name = f"model.layers.{i}"
        tensors.take(f"{i}.attention_norm", f"{name}.attn_norm.weight", hidden)
        tensors.take(f"{i}.mlp_norm", f"{name}.ffn_norm.weight", hidden)
        for part, there in ("attention", "attn"), ("mlp", "ffn"):
            rows = (2 + streams.n) * streams.n
            _take_streams(tensors, f"{i}.{part}", f"{name}.hc_{there}_", rows, streams.n * hidden, scales=3)
        _take_attention(tensors, i, hidden, of_kind[kind])
        tensors.take_linear(f"{i}.router", f"{name}.ffn.gate", router.n_experts, hidden)
        if by_token[i]:
            tensors.take_table(f"{i}.router_table", f"{name}.ffn.gate.tid2eid", vocab, router.top_k)
        else:
            tensors.take(f"{i}.router_choice_bias", f"{name}.ffn.gate.bias", router.n_experts)
        tensors.take_experts(i, _EXPERTS, router.n_experts, hidden, inter)
        for part, there, rows, cols in (
            ("gate", "w1", shared, hidden),
            ("up", "w3", shared, hidden),
            ("down", "w2", hidden, shared),
        ):
            tensors.take_linear(f"{i}.{part}", f"{name}.ffn.shared_experts.{there}", rows, cols)
    window = config.integer("sliding_window", default=128)
    return ModelSpec(
        family="deepseek_v4",
        vocab=vocab,
        hidden=hidden,
        norm_eps=config.number("rms_norm_eps", default=1e-6),
        max_positions=max_positions,
        attention=of_kind[kinds[0]],
        rope=ropes[kinds[0]],
        layers=tuple(
            LayerSpec(window, i, attention=of_kind[kind], rope=ropes[kind]) for i, kind in enumerate(kinds)
        ),
        router=router,
        moe_inter=inter,
        dense_inter=0,
        shared_inter=shared,
        clamp=ClampSpec(1.0, config.number("swiglu_limit", default=10.0), added=0.0),
        streams=streams,
    )


def has_window_head(config: Config, n_layers: int) -> bool:
    """Whether the first layer for multi-token prediction, where there is one, has the window alone."""
    return not any(config.integers("compress_ratios")[n_layers : n_layers + 1])


def longer(config: Config, n_layers: int) -> Config:
    """As if that layer were one more."""
    kinds = ["hash_moe" if each else "moe" for each in _by_token(config, n_layers)]
    return config.but(
        num_hidden_layers=n_layers + 1,
        layer_types=[*_kinds(config, n_layers), _WINDOW],
        mlp_layer_types=[*kinds, "moe"],
    )


def take_head(tensors: Tensors, i: int, spec: ModelSpec) -> None:
    """What layer i for multi-token prediction has beside a layer: its own 'head_streams', among others."""
    assert spec.streams is not None
    name, hidden, n = f"model.layers.{i}", spec.hidden, spec.streams.n
    _take_streams(tensors, "head", f"{name}.hc_head_", n, n * hidden, scales=1)
    for part in "e_proj", "h_proj":
        tensors.take_linear(part, f"{name}.{part}", hidden, hidden)


def _first(tensors: Tensors, *names: str, end: str = "") -> str:
    """That of the names which there is; as published, and as transformers writes them."""
    return next((name for name in names if tensors.has(name + end)), names[0])


def _streams(config: Config) -> StreamsSpec:
    n = config.integer("hc_mult", default=4)
    if n > _MOST_STREAMS:
        raise config.unsupported(f"hc_mult is {n}, up to {_MOST_STREAMS} are supported")
    rounds = config.integer("hc_sinkhorn_iters", default=20)
    return StreamsSpec(n, rounds, config.number("hc_eps", default=1e-6))


def _kinds(config: Config, n_layers: int) -> list[str]:
    """Of each layer; the published default: two heavily compressed ones, then both kinds in turn."""
    ratios = config.integers("compress_ratios")
    if set(ratios) - set(_OF_RATIO):
        raise config.unsupported(f"compress_ratios has {ratios}; known are {', '.join(map(str, _OF_RATIO))}")
    # Those of layers for multi-token prediction may follow.
    usual = [_OF_RATIO[ratio] for ratio in ratios][:n_layers] or [
        _SPARSE if i > 1 and i % 2 else _HEAVY for i in range(n_layers)
    ]
    return common.layer_kinds(config, n_layers, usual, (_WINDOW, _SPARSE, _HEAVY))


def _by_token(config: Config, n_layers: int) -> list[bool]:
    """Whether a layer's experts are chosen by a table of tokens."""
    first = config.integer("num_hash_layers", default=3, minimum=0)
    kinds = config.get("mlp_layer_types") or ["hash_moe" if i < first else "moe" for i in range(n_layers)]
    if not isinstance(kinds, list) or len(kinds) != n_layers or set(kinds) - {"hash_moe", "moe"}:
        raise config.wrong(f"mlp_layer_types must say hash_moe or moe for each of the {n_layers} layers")
    return [kind == "hash_moe" for kind in kinds]


def _attentions(config: Config, rope_dim: int) -> dict[str, CompressedAttentionSpec]:
    heads, dim = config.integer("num_attention_heads"), config.integer("head_dim", default=512)
    groups = config.integer("o_groups", default=8)
    if heads % groups:
        raise config.wrong(f"num_attention_heads ({heads}) is no multiple of o_groups ({groups})")
    window = CompressedAttentionSpec(
        n_heads=heads,
        head_dim=dim,
        rope_dim=rope_dim,
        query_rank=config.integer("q_lora_rank", default=1024),
        scale=dim**-0.5,
        norm_eps=config.number("rms_norm_eps", default=1e-6),
        o_groups=groups,
        o_rank=config.integer("o_lora_rank", default=1024),
    )
    rates = config.inner("compress_rates")
    sparse = rates.integer(_SPARSE, default=config.integer("compress_rate_csa", default=4))
    heavy = rates.integer(_HEAVY, default=config.integer("compress_rate_hca", default=128))
    for rate in sparse, heavy:
        if BLOCK % rate and rate % BLOCK:
            raise config.unsupported(f"compress_rates has {rate}, only what {BLOCK} divides or is divided by")
    index_dim = config.integer("index_head_dim", default=128)
    if index_dim < rope_dim:
        raise config.wrong(f"index_head_dim ({index_dim}) is less than the {rope_dim} elements that turn")
    return {
        _WINDOW: window,
        _HEAVY: evolve(window, rate=heavy),
        _SPARSE: evolve(
            window,
            rate=sparse,
            overlap=True,
            index_heads=config.integer("index_n_heads", default=64),
            index_dim=index_dim,
            index_top_k=config.integer("index_topk", default=512),
        ),
    }


def _ropes(config: Config) -> tuple[dict[str, RopeSpec], int]:
    """Of each kind of layers, and the longest sequence: only compressed positions may be stretched."""
    dim = config.integer("head_dim", default=512)
    turned = config.integer("qk_rope_head_dim", default=64)
    theta = config.number("compress_rope_theta", default=160000.0)
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise config.wrong(f"rope_parameters is {found!r}, it must be an object")
    if not isinstance(found.get("main"), dict) or not isinstance(found.get("compress"), dict):
        found = {"main": {}, "compress": {**found, "rope_theta": theta}}
    compressed = found["compress"]
    if "yarn" in (compressed.get("rope_type"), compressed.get("type")):
        # cos and sin are not multiplied by what YaRN has for that.
        compressed = {"attention_factor": 1.0, **compressed}
    main, compress = (
        Rope(config.but(rope_parameters=each or None, rope_scaling=None), default_partial=turned / dim)
        for each in (found["main"], compressed)
    )
    window, other = (rope.spec(dim, interleaved=True, partial=True) for rope in (main, compress))
    if len(window.inv_freq) != len(other.inv_freq):
        raise config.unsupported("rope_parameters turn more elements in some layers than in others")
    return {_WINDOW: window, _SPARSE: other, _HEAVY: other}, compress.max_positions


def _take_streams(tensors: Tensors, part: str, name: str, rows: int, cols: int, *, scales: int) -> None:
    tensors.take(f"{part}_streams", f"{name}fn", rows, cols)
    tensors.take(f"{part}_streams_bias", f"{name}base", rows)
    tensors.take(f"{part}_streams_scale", f"{name}scale", scales)


def _take_attention(tensors: Tensors, i: int, hidden: int, a: CompressedAttentionSpec) -> None:
    name = f"model.layers.{i}.attn"
    wide = a.n_heads * a.head_dim
    tensors.take_linear(f"{i}.q_latent", f"{name}.wq_a", a.query_rank, hidden)
    tensors.take(f"{i}.q_latent_norm", f"{name}.q_norm.weight", a.query_rank)
    tensors.take_linear(f"{i}.q", f"{name}.wq_b", wide, a.query_rank)
    tensors.take_linear(f"{i}.latent", f"{name}.wkv", a.head_dim, hidden)
    norm = _first(tensors, f"{name}.kv_norm.weight", f"{name}.norm.weight")
    tensors.take(f"{i}.latent_norm", norm, a.head_dim)
    tensors.take(f"{i}.sinks", f"{name}.attn_sink", a.n_heads)
    tensors.take_linear(f"{i}.o_in", f"{name}.wo_a", a.o_groups * a.o_rank, wide // a.o_groups)
    tensors.take_linear(f"{i}.o", f"{name}.wo_b", hidden, a.o_groups * a.o_rank)
    if a.rate:
        _take_compressor(tensors, f"{i}.compress", f"{name}.compressor", hidden, a, a.head_dim)
        tensors.take(f"{i}.compress_norm", f"{name}.compressor.norm.weight", a.head_dim)
    if a.index_top_k:
        indexer = f"{name}.indexer"
        _take_compressor(tensors, f"{i}.index", f"{indexer}.compressor", hidden, a, a.index_dim)
        tensors.take(f"{i}.index_entry_norm", f"{indexer}.compressor.norm.weight", a.index_dim)
        tensors.take_linear(f"{i}.index_q", f"{indexer}.wq_b", a.index_heads * a.index_dim, a.query_rank)
        tensors.take_linear(f"{i}.index_weights", f"{indexer}.weights_proj", a.index_heads, hidden)


def _take_compressor(
    tensors: Tensors, part: str, name: str, hidden: int, a: CompressedAttentionSpec, dim: int
) -> None:
    width = (2 if a.overlap else 1) * dim
    tensors.take_linear(f"{part}_kv", f"{name}.wkv", width, hidden)
    tensors.take_linear(f"{part}_gate", f"{name}.wgate", width, hidden)
    tensors.take(f"{part}_place_bias", f"{name}.ape", a.rate, width)
