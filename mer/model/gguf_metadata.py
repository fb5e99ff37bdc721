"""A model's numbers as the metadata of a GGUF file, and what llama.cpp can't compute of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, Literal

from attrs import frozen

from mer.errors import UnsupportedModelError
from mer.model.gguf_recurrent import interval, recurrent_parameters
from mer.model.spec import (
    Attention,
    AttentionSpec,
    ClampSpec,
    DeltaSpec,
    IndexerSpec,
    LatentAttentionSpec,
    ModelSpec,
)
from mer.weights.gguf_families import GGUFFamily
from mer.weights.gguf_writer import Value

_SOFTMAX, _SIGMOID = 1, 2  # of expert_gating_func


@frozen
class _Computes:
    """What llama.cpp computes for an architecture, whatever the file says.

    normalise: the weights of the chosen experts are made to add up to 1; None: as the file says. plain: the
    first layers may have no experts. square: q and o are [hidden, hidden]. windows: of which layers.
    frequencies: rope_freqs.weight is read. clamp: of the experts' SwiGLU. tied: the head may
    be the embedding. scaled: by routed_scaling_factor. heads: of keys. also: what its files always say.
    """

    normalise: bool | None = None
    plain: bool = False
    square: bool = False
    windows: Literal["none", "even layers", "any"] = "none"
    frequencies: bool = False
    clamp: ClampSpec | None = None
    multipliers: bool = False
    tied: bool = True
    scaled: bool = True
    heads: Literal["any", "as many of keys"] = "any"
    also: Mapping[str, Value] = {}


# By model_type. A family that is not here is not written.
_KNOWN: Final = {
    "bailing_moe_1": _Computes(plain=True, tied=False),
    "bailing_moe": _Computes(plain=True, square=True, tied=False),
    "deepseek_v32": _Computes(plain=True),
    "dots1": _Computes(plain=True, heads="as many of keys"),
    "ernie4_5_moe": _Computes(normalise=True, plain=True, also={"interleave_moe_layer_step": 1}),
    "gemma4_text": _Computes(normalise=True, windows="any"),
    "glm_moe_dsa": _Computes(plain=True),
    "lfm2_moe": _Computes(normalise=True, plain=True, scaled=False),
    "qwen3_5_moe_text": _Computes(normalise=True),
    "qwen3_next": _Computes(normalise=True),
    "llama": _Computes(plain=True, frequencies=True),
    "ministral3": _Computes(plain=True),
    "mistral": _Computes(plain=True, frequencies=True),
    "qwen2": _Computes(plain=True, square=True),
    "qwen3": _Computes(plain=True),
    "mixtral": _Computes(normalise=True, frequencies=True),
    "qwen2_moe": _Computes(normalise=False, square=True),
    "qwen3_moe": _Computes(normalise=True),
    "olmoe": _Computes(normalise=False, square=True),
    "gpt_oss": _Computes(normalise=True, windows="even layers", clamp=ClampSpec(1.702, 7.0)),
    "deepseek_v2": _Computes(plain=True),
    "deepseek_v3": _Computes(plain=True),
    "glm4_moe": _Computes(plain=True),
    "glm4_moe_lite": _Computes(plain=True),
    "granitemoe": _Computes(normalise=True, multipliers=True),
    "granitemoeshared": _Computes(normalise=True, multipliers=True),
    "hunyuan_v1_moe": _Computes(normalise=True),
    "minimax_m2": _Computes(normalise=True),
    "solar_open": _Computes(plain=True),
}
# What llama.cpp would answer otherwise, or not at all.
NOT_WRITTEN: Final = {
    "phimoe": "llama.cpp weighs the two experts of a token by their softmax over all experts, normed to one, "
    "where the model masks those that are far from the best (sparsemixer), so its answers would be others",
    "flex_olmo": "llama.cpp has no architecture with norms behind attention and experts alone",
    "deepseek_v4": "the gguf package has no names for its tensors",
}


def hyper_parameters(family: GGUFFamily, spec: ModelSpec) -> dict[str, Value]:
    """Keys (with the architecture before them) and values, as llama.cpp's converter writes them.

    Raises UnsupportedModelError for what llama.cpp would compute otherwise.
    """
    _check(family, spec)
    found: dict[str, Value] = {
        "block_count": spec.n_layers,
        "context_length": spec.max_positions,
        "embedding_length": spec.hidden,
        "feed_forward_length": spec.dense_inter or spec.moe_inter,
        "vocab_size": spec.vocab,
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
        "rope.dimension_count": 2 * len(spec.rope.inv_freq),
        "rope.freq_base": spec.rope.theta,
        **_attention(spec.attentions[0]),
        **_experts(spec),
        **_scaling(family, spec),
        **recurrent_parameters(spec),
        **_KNOWN[spec.family].also,
    }
    if _KNOWN[spec.family].multipliers:
        found |= {
            "attention.scale": spec.attention.scale,
            "embedding_scale": spec.embedding_scale,
            "residual_scale": spec.residual_scale,
            "logit_scale": 1 / spec.logit_scale,
        }
    if spec.family == "ernie4_5_moe":
        found["expert_shared_feed_forward_length"] = spec.shared_inter
    if spec.family == "qwen3_5_moe_text":
        pairs = len(spec.rope.inv_freq)  # a third each of three positions, which of a text are the same
        found["rope.dimension_sections"] = [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3, 0]
    if spec.family == "gemma4_text":
        found |= _gemma4(spec)
    windows = [layer.window for layer in spec.layers if layer.window]
    if windows:
        found["attention.sliding_window"] = windows[0]
    return {f"{family.architecture}.{key}": value for key, value in found.items()}


def _attention(a: Attention) -> dict[str, Value]:
    if isinstance(a, AttentionSpec):
        return {
            "attention.head_count": a.n_heads,
            "attention.head_count_kv": a.n_kv_heads,
            "attention.key_length": a.head_dim,
            "attention.value_length": a.head_dim,
        }
    assert isinstance(a, LatentAttentionSpec)
    # All heads share the latent, so llama.cpp's cache is that of one head, as long as the latent.
    ranks: dict[str, Value] = {"attention.kv_lora_rank": a.kv_rank}
    if a.query_rank is not None:
        ranks["attention.q_lora_rank"] = a.query_rank
    return {
        "attention.head_count": a.n_heads,
        "attention.head_count_kv": 1,
        "attention.key_length": a.latent_dim,
        "attention.value_length": a.kv_rank,
        "attention.key_length_mla": a.nope_dim + a.rope_dim,
        "attention.value_length_mla": a.value_dim,
        **ranks,
        **_indexer(a.indexer),
    }


def _indexer(indexer: IndexerSpec | None) -> dict[str, Value]:
    if indexer is None:
        return {}
    return {
        "attention.indexer.head_count": indexer.n_heads,
        "attention.indexer.key_length": indexer.head_dim,
        "attention.indexer.top_k": indexer.top_k,
    }


def _gemma4(spec: ModelSpec) -> dict[str, Value]:
    """Of the layers with a window, and of the global ones."""
    local = [layer.window is not None for layer in spec.layers]
    attention = [a for a in spec.attentions if isinstance(a, AttentionSpec)]
    heads = dict(zip(local, attention, strict=True))
    ropes = dict(zip(local, spec.ropes, strict=True))
    found: dict[str, Value] = {
        "feed_forward_length": spec.dense_inter or spec.shared_inter,
        "attention.head_count_kv": [a.n_kv_heads for a in attention],
        "attention.sliding_window_pattern": local,
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0,
    }
    for is_local, end in (False, ""), (True, "_swa"):
        if is_local in heads:
            found |= dict.fromkeys(
                (f"{key}{end}" for key in ("attention.key_length", "attention.value_length")),
                heads[is_local].head_dim,
            )
            found[f"rope.dimension_count{end}"] = heads[is_local].head_dim
            found[f"rope.freq_base{end}"] = ropes[is_local].theta
    if spec.logit_cap is not None:
        found["final_logit_softcapping"] = spec.logit_cap
    return found


def _experts(spec: ModelSpec) -> dict[str, Value]:
    r = spec.router
    if r is None:
        return {}
    found: dict[str, Value] = {
        "expert_count": r.n_experts,
        "expert_used_count": r.top_k,
        "expert_feed_forward_length": spec.moe_inter,
        "expert_gating_func": _SIGMOID if r.score == "sigmoid" else _SOFTMAX,
        "expert_weights_norm": r.normalise,
        "expert_weights_scale": r.scale,
    }
    if spec.shared_inter and not _KNOWN[spec.family].plain:
        found["expert_shared_feed_forward_length"] = spec.shared_inter
    if _KNOWN[spec.family].plain:
        found |= {
            "expert_group_count": r.n_groups,
            "expert_group_used_count": r.top_groups,
            "expert_shared_count": spec.shared_inter // spec.moe_inter,
            "leading_dense_block_count": spec.n_layers - spec.n_moe_layers,
        }
    return found


def _scaling(family: GGUFFamily, spec: ModelSpec) -> dict[str, Value]:
    scaling, a = spec.rope.scaling, spec.attention
    if scaling is None or scaling.kind in ("llama3", "factors"):
        return {}
    found: dict[str, Value] = {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
    if scaling.kind == "linear":
        return found
    found |= {
        "rope.scaling.original_context_length": scaling.original,
        "rope.scaling.yarn_beta_fast": scaling.beta_fast,
        "rope.scaling.yarn_beta_slow": scaling.beta_slow,
    }
    if isinstance(a, LatentAttentionSpec):
        # The scores' factor is (1 + multiplier * ln(factor)) squared; cos and sin have none.
        wanted = 1.0
        multiplier = math.sqrt(a.scale * math.sqrt(a.nope_dim + a.rope_dim)) - 1
        found["rope.scaling.yarn_log_multiplier"] = multiplier / math.log(scaling.factor)
    else:
        wanted = 0.1 * math.log(scaling.factor) + 1
        if spec.family == "ministral3":
            wanted = 1.0
            found["rope.scaling.yarn_log_multiplier"] = 1.0
            found["attention.temperature_scale"] = scaling.temperature
    if not math.isclose(spec.rope.scale, wanted, rel_tol=1e-6):
        raise _unsupported(
            family, f"multiplies rotary cos and sin by {wanted:.6g}, the model by {spec.rope.scale:.6g}"
        )
    return found


def _check(family: GGUFFamily, spec: ModelSpec) -> None:
    """Refuse what would be computed otherwise: such a file would answer, but nonsense."""
    known = _KNOWN[spec.family]
    a, r = spec.attention, spec.router
    plain = spec.n_layers - spec.n_moe_layers
    even = [layer.window is not None for layer in spec.layers] == [i % 2 == 0 for i in range(spec.n_layers)]
    windows = {layer.window for layer in spec.layers if layer.window}
    width = a.n_heads * a.head_dim if isinstance(a, AttentionSpec) else spec.hidden
    kinds = {"llama3", "factors"} if known.frequencies else set()
    for wrong, what in (
        (
            r is not None and known.normalise not in (None, r.normalise),
            f"{'does' if known.normalise else 'does not'} normalise the weights of the chosen experts, the "
            "model's norm_topk_prob says otherwise",
        ),
        (any(layer.moe_index is not None for layer in spec.layers[:plain]), "has experts from a layer on"),
        (plain and not known.plain, "has experts in every layer"),
        (known.square and width != spec.hidden, f"has heads that are {spec.hidden} wide together"),
        (known.windows == "none" and windows, "has no attention windows"),
        (
            known.windows == "even layers" and (not even or len(windows) != 1),
            "has a window in every other layer",
        ),
        (
            known.clamp != spec.clamp,
            "has other constants in the experts' SwiGLU",
        ),
        (isinstance(a, AttentionSpec) and a.clip is not None, "does not clip q, k and v (clip_qkv)"),
        (
            r is not None and r.n_groups > 1 and r.group_best != 2,
            "chooses groups by the sum of their two best experts",
        ),
        (
            spec.rope.scaling is not None and spec.rope.scaling.kind not in ("linear", "yarn", *kinds),
            f"has no rope scaling {spec.rope.scaling and spec.rope.scaling.kind!r}",
        ),
        (r is not None and not known.scaled and r.scale != 1, "does not scale the experts' sum"),
        (
            known.heads == "as many of keys" and isinstance(a, AttentionSpec) and a.n_heads != a.n_kv_heads,
            "has as many heads of keys as of queries",
        ),
        (
            isinstance(spec.recurrent, DeltaSpec) and not interval(spec),
            "has attention in every so many layers",
        ),
        (
            isinstance(spec.recurrent, DeltaSpec) and spec.recurrent.key_dim != spec.recurrent.value_dim,
            "has heads of values that are as wide as those of keys",
        ),
        (
            any(
                isinstance(x, LatentAttentionSpec) and x.indexer and not x.indexer.own
                for x in spec.attentions
            ),
            "has an indexer in every layer",
        ),
        (
            spec.family == "gemma4_text"
            and any(rope.scaling is not None and rope.scaling.kind != "factors" for rope in spec.ropes),
            "has no rope scaling",
        ),
        (spec.tied_embeddings and not known.tied, "has a head that is not the embedding"),
        (spec.rope.interleaved and not family.neighbours, "turns pairs (i, i + dim/2) of a head"),
    ):
        if wrong:
            raise _unsupported(family, what)


def _unsupported(family: GGUFFamily, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"this {family.model_type} can't be written as GGUF: llama.cpp's {family.architecture} {what}"
    )
