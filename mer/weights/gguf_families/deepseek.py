"""`deepseek2`: DeepSeek-V2 and -V3, what is like them (Kimi-K2, GLM-4.7-Flash); `deepseek32`, `glm-dsa`."""

from __future__ import annotations

from typing import Any

from attrs import evolve

from mer.weights.gguf_families.family import GGUFFamily
from mer.weights.gguf_families.names import Names
from mer.weights.gguf_families.shared import SHARED_EXPERTS, deepseek_experts, scores
from mer.weights.gguf_keys import SOFTMAX, Keys, rope_of


def _config(keys: Keys) -> dict[str, Any]:
    rope_dim = keys["rope.dimension_count"]
    # In files with keys and values of the latent apart, key_length is that of the cache's rows.
    head = keys.get("attention.key_length_mla") or keys["attention.key_length"]
    config = {
        **deepseek_experts(keys),
        "q_lora_rank": keys.get("attention.q_lora_rank"),
        "kv_lora_rank": keys["attention.kv_lora_rank"],
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": head - rope_dim,
        "v_head_dim": keys.get("attention.value_length_mla") or keys["attention.value_length"],
    }
    multiplier = keys.get("rope.scaling.yarn_log_multiplier")
    if multiplier is not None:
        # A tenth of what config.json has for both.
        weight = round(10 * multiplier, 6)
        config["rope_parameters"] = rope_of(keys) | {"mscale": weight, "mscale_all_dim": weight}
    return config


_NAMES = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
    **SHARED_EXPERTS,
}
_INDEXER = {
    "indexer.attn_q_b": "self_attn.indexer.wq_b",
    "indexer.attn_k": "self_attn.indexer.wk",
    "indexer.k_norm": "self_attn.indexer.k_norm",
    "indexer.proj": "self_attn.indexer.weights_proj",
}
FAMILY = GGUFFamily(
    architecture="deepseek2",
    model_type="deepseek_v3",
    config=_config,
    names=Names(_NAMES),
    neighbours=True,
)
# Their files are read as what the metadata says: sigmoid scores, DeepSeek-V3.
GLM_LITE = evolve(FAMILY, model_type="glm4_moe_lite", is_of=lambda keys: False)


def _config_v2(keys: Keys) -> dict[str, Any]:
    config = _config(keys)
    # Those of its models that have groups choose in them.
    return config | {"topk_method": "group_limited_greedy" if config["n_group"] > 1 else "greedy"}


V2 = evolve(
    FAMILY,
    model_type="deepseek_v2",
    config=_config_v2,
    is_of=lambda keys: scores(keys) == SOFTMAX,
)


def _config_indexed(keys: Keys) -> dict[str, Any]:
    layers = range(keys["block_count"] - keys.get("nextn_predict_layers", 0))
    own = [f"blk.{i}.indexer.attn_k.weight" in keys.tensors for i in layers]
    return _config(keys) | {
        "index_n_heads": keys["attention.indexer.head_count"],
        "index_head_dim": keys["attention.indexer.key_length"],
        "index_topk": keys["attention.indexer.top_k"],
        "indexer_types": ["full" if each else "shared" for each in own],
    }


V32 = GGUFFamily(
    architecture="deepseek32",
    model_type="deepseek_v32",
    config=_config_indexed,
    names=Names(_NAMES | _INDEXER),
    neighbours=True,
)
GLM_DSA = evolve(V32, architecture="glm-dsa", model_type="glm_moe_dsa")
